"""`Interpreter`: an ONNX model as a torch module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter

from spa.errors import UnsupportedModelError, UsageError
from spa.graph import Graph
from spa.interpreter import families
from spa.interpreter.base import State, converted
from spa.interpreter.leaves import Leaves, find
from spa.interpreter.plan import Plan, Read, plan_for
from spa.interpreter.program import Compiler, Key, Missing, all_nodes, described
from spa.interpreter.types import to_numpy, to_tensor
from spa.shapes.infer import infer

families.load()


class Multipliers(Protocol):
    """What multiplies activations where they are read: `spa.interpreter.gates.Gates` or alike."""

    def multipliers(self) -> Mapping[Read, Tensor]:
        """Per read (a node and its input slot) a tensor that broadcasts against what is read."""


class Interpreter(Module):
    """A model that can be differentiated and trained.

    Parameters are the float initializers (and tensors in `Constant` nodes), one `Parameter` for each; an initializer
    that several nodes share is one. Single numbers in arithmetic (the 0.5 of a GELU), masks (they contain numbers as
    low as -1e30) and whatever says a size are constants. The statistics of BatchNormalization are buffers, which train
    mode updates with the model's momentum as torch does (with the unbiased variance). In train mode Dropout drops.

    `.to(dtype)` makes that the type of all floats; without it they have the types of the model.

    Args:
        model: from `spa.load`, or an `onnx_ir.Model` without local functions. It is read, never changed.
        parameters: names of the initializers to be learned, instead of those found by the rule above.

    Raises:
        UnsupportedModelError: nodes that cannot be computed; the message names them.
        UsageError: a name in `parameters` is no float initializer.
    """

    def __init__(self, model: ir.Model | Graph, *, parameters: Collection[str] | None = None) -> None:
        super().__init__()
        self.model = model.model if isinstance(model, Graph) else model
        self._state = State()
        compiler, self._leaves = compiled(self.model, self._state, parameters)
        self._compiler = compiler
        self._constants = compiler.constants
        self._held: dict[ir.Value, Tensor] = {}
        self._names = {value.name or "": value for value in self._leaves.parameters}
        for k, tensor in enumerate(self._leaves.parameters.values()):
            self.register_parameter(f"w{k}", Parameter(tensor))
        for k, tensor in enumerate(self._leaves.statistics.values()):
            self.register_buffer(f"s{k}", tensor)
        self._attributes = {value: f"w{k}" for k, value in enumerate(self._leaves.parameters)} | {
            value: f"s{k}" for k, value in enumerate(self._leaves.statistics)
        }
        self._inputs = [v for v in self.model.graph.inputs if v not in self._attributes]
        self._plans: dict[Any, Plan] = {}
        self.segments = 0
        """Activation checkpointing: how many segments are computed again in the backward pass instead of being kept;
        0 keeps all activations."""

    # -- weights -----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, Parameter]:
        """Parameters by the name of their initializer (of the output, for `Constant` nodes)."""
        return {name: getattr(self, self._attributes[value]) for name, value in self._names.items()}

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Means and variances of BatchNormalization by the name of their initializer."""
        return {value.name or "": getattr(self, self._attributes[value]) for value in self._leaves.statistics}

    def trained(self) -> dict[str, NDArray[Any]]:
        """Parameters and statistics as they are now, by initializer name, in the model's own types."""
        found: Mapping[str, Tensor] = {**self.weights, **self.statistics}
        kinds = {v.name or "": self._leaves.dtypes[v] for v in self._attributes}
        return {name: np.array(to_numpy(tensor, kinds[name])) for name, tensor in found.items()}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._state.device

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that must be fed."""
        return tuple(v.name or "" for v in self._inputs if v not in self._constants)

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        feeds: Mapping[str, Tensor | NDArray[Any]],
        outputs: Sequence[str] | None = None,
        gates: Multipliers | None = None,
    ) -> dict[str, Tensor]:
        """Values by name.

        Args:
            feeds: every input of the graph, as tensors (or arrays).
            outputs: names of values of the main graph, intermediate ones included; the model's outputs if None.
                Only what they need is computed.
            gates: multiplies activations where certain nodes read them.

        Raises:
            UsageError: a feed or an asked-for value does not exist, or a feed is missing.
            RuntimeFailure: a node fails on these feeds; the message names it.
        """
        names = tuple(v.name or "" for v in self.model.graph.outputs) if outputs is None else tuple(outputs)
        factors = {} if gates is None else gates.multipliers()
        plan = self._plan(names, tuple(factors))
        self._state.training = self.training
        env = plan.env()
        for slot, key in plan.leaves:
            env[slot] = self._leaf(key)
        self._feed(plan, env, feeds)
        for slot, factor in zip(plan.factors, factors.values(), strict=True):
            env[slot] = factor
        plan.run(env, self._state)
        return {name: env[slot] for name, slot in zip(names, plan.outputs, strict=True)}

    def _plan(self, names: tuple[str, ...], reads: tuple[Read, ...]) -> Plan:
        key = (names, reads, self.segments)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_for(self._compiler, self._compiler.main, names, reads, self.segments)
        return plan

    def _leaf(self, key: Key) -> Tensor:
        value, host = key
        attribute = self._attributes.get(value)
        if attribute is not None:
            found: Tensor = getattr(self, attribute)
            return found
        if host:
            return self._constants[value]
        held = self._held.get(value)
        if held is None:
            held = self._held[value] = self._state.place(self._constants[value])
        return held

    def _feed(self, plan: Plan, env: list[Any], feeds: Mapping[str, Any]) -> None:
        for value in self._inputs:
            name = value.name or ""
            if name not in feeds:
                if plan.needs(value) and value not in self._constants:
                    raise UsageError(f"the model's input '{name}' is not fed; pass it in `feeds`.")
                continue
            slot = plan.slot(value)
            if slot is not None:
                env[slot] = _fed(feeds[name], self._state)
        for name in feeds.keys() - {v.name for v in self.model.graph.inputs}:
            raise UsageError(f"the model has no input '{name}'; it has {', '.join(self.inputs)}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Interpreter:
        """One with the same model object and weights of its own."""
        twin = Interpreter(self.model, parameters=tuple(self.weights))
        twin = twin.to(device=self.device, dtype=self._state.unified)
        twin.load_state_dict(self.state_dict())
        for name, parameter in self.weights.items():
            twin.weights[name].requires_grad_(parameter.requires_grad)
        twin.segments = self.segments
        memo[id(self)] = twin
        return twin.train(self.training)

    # -- moving ------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Interpreter:
        """Follow `.to`, `.cuda`, `.half` ...: parameters and buffers, constants, and the type of all floats."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        single, half = fn(torch.zeros(0)), fn(torch.zeros(0, dtype=torch.float16))
        if single.dtype == half.dtype:
            self._state.unified = single.dtype
        self._state.device = single.device
        self._held.clear()
        return self


def _fed(value: Any, state: State) -> Any:
    if isinstance(value, list):
        return [_fed(item, state) for item in value]
    if value is None:
        return None
    tensor = value if isinstance(value, Tensor) else to_tensor(value)
    if state.unified is not None and tensor.is_floating_point() and tensor.dtype != state.unified:
        tensor = converted(tensor, state.unified)
    return tensor.to(state.device)


def compiled(
    model: ir.Model, state: State | None = None, parameters: Collection[str] | None = None
) -> tuple[Compiler, Leaves]:
    """A model as a program, and its numbers.

    Raises:
        UnsupportedModelError: nodes that cannot be computed; the message names them.
        UsageError: a name in `parameters` is no float initializer.
    """
    leaves = find(model, parameters)
    compiler = _compile(model, state or State(), leaves)
    if compiler.missing:
        raise UnsupportedModelError(_complaint(compiler.missing))
    return compiler, leaves


def _compile(model: ir.Model, state: State, leaves: Leaves) -> Compiler:
    learned: dict[ir.Value, Tensor] = {**leaves.parameters, **leaves.statistics}
    compiler = Compiler(model, state, infer(model), learned, frozenset(leaves.statistics), leaves.tensors)
    compiler.load()
    assert compiler.main is not None  # compiled here, so that what is missing is known
    return compiler


def _complaint(missing: Sequence[Missing]) -> str:
    """One sentence about the first node of each operator."""
    first: dict[tuple[str, str, str], Missing] = {}
    for item in missing:
        first.setdefault((item.node.domain, item.node.op_type, item.reason), item)
    told = [f"{described(m.node)} of opset {m.version} ({m.reason})" for m in list(first.values())[:5]]
    more = f" and {len(first) - 5} more" if len(first) > 5 else ""
    where = "; ".join(told)
    return f"Gradients cannot pass through {where}{more}: replace them, or use a method without gradients."


@dataclass(frozen=True)
class Support:
    """An operator of a model and whether it can be interpreted."""

    domain: str
    operator: str
    version: int
    """The opset that the model imports for the domain."""
    nodes: int
    reasons: Mapping[str, str]
    """Node -> why it cannot be computed; empty if all can."""

    @property
    def ok(self) -> bool:
        """Whether every such node of the model can be computed."""
        return not self.reasons


def supported(model: ir.Model | Graph) -> list[Support]:
    """Every operator of a model with what cannot be computed of it, by domain and name."""
    model = model.model if isinstance(model, Graph) else model
    compiler = _compile(model, State(), find(model, None))
    bad: dict[tuple[str, str], dict[str, str]] = {}
    for item in compiler.missing:
        bad.setdefault((item.node.domain, item.node.op_type), {})[described(item.node)] = item.reason
    counts: dict[tuple[str, str], int] = {}
    for node in all_nodes(model.graph):
        counts[node.domain, node.op_type] = counts.get((node.domain, node.op_type), 0) + 1
    return [
        Support(domain, name, compiler.version(domain), count, bad.get((domain, name), {}))
        for (domain, name), count in sorted(counts.items())
    ]
