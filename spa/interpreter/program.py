"""Graphs as flat programs: each node becomes a kernel with the slots it reads and writes.

Every value lives either on the host or on the device; a value that is read on the other side is moved once. What
depends on constants alone is computed here, while compiling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from spa.errors import RuntimeFailure
from spa.interpreter.base import Kernel, Node, Operator, State, Unsupported, lookup
from spa.interpreter.leaves import origin, reached
from spa.interpreter.ops.control import CONTROL, Control
from spa.interpreter.types import from_onnx
from spa.shapes.infer import Shapes

FOLD_LIMIT = 1 << 22
"""Constants with more elements are computed anew in each run instead of being kept."""
ABSENT = 0
"""The slot of an absent operand; it always holds None."""


@dataclass(eq=False)
class Step:
    """One call in a program."""

    kernel: Kernel
    reads: tuple[int, ...]
    """Slots of the node's inputs in order, then those of what its subgraphs read from outside."""
    writes: tuple[int, ...]
    """One slot per output, ABSENT for those without a name."""
    node: ir.Node | None = None
    """None for what no node asked for."""
    what: str = "a move between devices"
    """What it is without a node."""

    def label(self) -> str:
        """For messages."""
        return self.what if self.node is None else described(self.node)


def described(node: ir.Node) -> str:
    """`node 'conv1' (Conv)`."""
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    name = node.name or next((f"-> {v.name}" for v in node.outputs if v.name), "")
    return f"node '{name}' ({domain}{node.op_type})"


@dataclass(frozen=True)
class Missing:
    """A node that cannot be computed."""

    node: ir.Node
    version: int
    reason: str


Key = tuple[ir.Value, bool]
"""A value, and whether it is wanted on the host."""


class Body:
    """A compiled subgraph: a function of its inputs and of what it reads from outside."""

    def __init__(self, scope: Scope, graph: ir.Graph) -> None:
        self.steps = scope.steps
        self.inputs = [scope.slots[v, scope.compiler.on_host(v)] for v in graph.inputs]
        self.outputs = [scope.read(v, scope.compiler.on_host(v)) for v in graph.outputs]
        self.host = [scope.compiler.on_host(v) for v in graph.outputs]
        self.captured = list(scope.captured)
        self.size = scope.size
        self._slots = [scope.captured[key] for key in self.captured]
        last: dict[int, int] = {}
        for k, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.reads, k))
        keep = {ABSENT, *self.outputs}
        self._frees = [tuple({r for r in s.reads if last[r] == k} - keep) for k, s in enumerate(self.steps)]

    def __call__(self, captured: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The outputs."""
        env: list[Any] = [None] * self.size
        for slot, value in zip(self._slots, captured, strict=True):
            env[slot] = value
        for slot, value in zip(self.inputs, inputs, strict=False):
            env[slot] = value
        execute(zip(self.steps, self._frees, strict=True), env)
        return [env[slot] for slot in self.outputs]


_FAILURES = (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, AttributeError)


def execute(plan: Iterable[tuple[Step, tuple[int, ...]]], env: list[Any]) -> None:
    """Run steps, and let go of what was read for the last time.

    Raises: RuntimeFailure naming the node that fails.
    """
    step = None
    try:
        for step, frees in plan:
            result = step.kernel(*[env[k] for k in step.reads])
            writes = step.writes
            if len(writes) == 1:
                env[writes[0]] = result[0] if type(result) is tuple else result
            else:
                for slot, value in zip(writes, result, strict=False):
                    if slot:
                        env[slot] = value
            for slot in frees:
                env[slot] = None
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        cause = (lines[0] if lines else type(error).__name__).rstrip(".")
        label = step.label() if step is not None else "the model"
        raise RuntimeFailure(f"{label} cannot be computed: {cause}.") from error


class Scope:
    """The slots and steps of one graph under construction."""

    def __init__(self, compiler: Compiler, outer: Scope | None) -> None:
        self.compiler = compiler
        self.outer = outer
        self.slots: dict[Key, int] = {}
        self.steps: list[Step] = []
        self.size = 1
        self.captured: dict[Key, int] = {}
        self.mine: set[ir.Value] = set()
        """Values that this graph computes or is given."""

    def new(self) -> int:
        """A fresh slot."""
        self.size += 1
        return self.size - 1

    def define(self, value: ir.Value, host: bool) -> int:
        """The slot of a value that is computed here."""
        self.mine.add(value)
        self.compiler.host[value] = host
        slot = self.slots[value, host] = self.new()
        return slot

    def read(self, value: ir.Value | None, host: bool) -> int:
        """The slot of a value on the wanted side; moves or captures it if necessary."""
        if value is None or value in self.compiler.absent:
            return ABSENT
        key = (value, host)
        if key in self.slots:
            return self.slots[key]
        slot = self.slots[key] = self.new()
        if value in self.compiler.constants:
            self._inherit(key, slot)
        elif self.compiler.on_host(value) == host:
            if self.outer is None:
                self.compiler.leaves[key] = slot
            else:
                self.captured[key] = slot
        elif value in self.mine or self.outer is None:
            source = self.read(value, not host)
            kernel: Kernel = to_host if host else self.compiler.state.place
            self.steps.append(Step(kernel, (source,), (slot,)))
        else:
            self.captured[key] = slot
        return slot

    def _inherit(self, key: Key, slot: int) -> None:
        if self.outer is None:
            self.compiler.leaves[key] = slot
        else:
            self.captured[key] = slot


def to_host(x: Any) -> Any:
    """A value of the device on the CPU: waits for it."""
    return x.cpu() if isinstance(x, Tensor) else x


@dataclass
class Compiler:
    """Turns a model into a program; `missing` lists what it cannot turn."""

    model: ir.Model
    state: State
    facts: Shapes
    parameters: Mapping[ir.Value, Any]
    """Values that are learned or kept as statistics: they are not constant."""
    stored: frozenset[ir.Value]
    """Those of them that training overwrites."""
    tensors: Mapping[ir.Value, ir.TensorProtocol]
    """All initializers."""
    constants: dict[ir.Value, Tensor] = field(default_factory=dict)
    host: dict[ir.Value, bool] = field(default_factory=dict)
    leaves: dict[Key, int] = field(default_factory=dict)
    """Slots of the main program that are filled before it runs: parameters and constants."""
    absent: set[ir.Value] = field(default_factory=set)
    missing: list[Missing] = field(default_factory=list)
    _main: Scope | None = None

    @property
    def main(self) -> Scope:
        """The compiled main graph."""
        if self._main is None:
            self._main = self.graph(self.model.graph, None, [False] * len(self.model.graph.inputs))
        return self._main

    def on_host(self, value: ir.Value) -> bool:
        """Where a value lives; constants are wherever they are wanted."""
        return self.host.get(value, value in self.constants)

    def version(self, domain: str) -> int:
        """The opset of a domain that the model imports."""
        imports = self.model.opset_imports
        domain = "" if domain == "ai.onnx" else domain
        return imports.get(domain) or imports.get(domain or "ai.onnx") or 1

    def load(self) -> None:
        """Make constants of the initializers that are no parameters."""
        for value, tensor in self.tensors.items():
            if value not in self.parameters:
                try:
                    self.constants[value] = from_onnx(tensor)
                except (TypeError, KeyError, ValueError):
                    continue  # strings and the like: whoever reads them says so

    def constant(self, value: ir.Value) -> Tensor | None:
        """What is known of a value while kernels are built."""
        return self.constants.get(value)

    def statistic(self, value: ir.Value) -> bool | None:
        """Whether a value is a statistic with one reader; None if it is no initializer."""
        value = origin(value)
        if value not in self.parameters and value not in self.constants:
            return None
        return value in self.stored and len(list(reached(value))) == 1

    def graph(self, graph: ir.Graph, outer: Scope | None, places: Sequence[bool]) -> Scope:
        """Compile a graph whose inputs are on the host where `places` says so."""
        scope = Scope(self, outer)
        for value, host in zip(graph.inputs, places, strict=True):
            if value not in self.parameters and value not in self.constants:
                scope.define(value, host)
        for node in graph:
            try:
                self._node(scope, node)
            except Unsupported as error:
                self._give_up(scope, node, str(error))
            except (KeyError, ValueError, TypeError, AttributeError) as error:  # an attribute that is not there
                self._give_up(scope, node, f"its attributes are not understood ({type(error).__name__}: {error})")
        return scope

    def _give_up(self, scope: Scope, node: ir.Node, reason: str) -> None:
        self.missing.append(Missing(node, self.version(node.domain), reason))
        for value in node.outputs:
            if (value, False) not in scope.slots:
                scope.define(value, False)

    def _node(self, scope: Scope, node: ir.Node) -> None:
        if node.outputs and node.outputs[0] in self.parameters:
            return  # a Constant that is learned
        version = self.version(node.domain)
        found = lookup(node.domain, node.op_type, version)
        control = CONTROL.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if control is not None:
            self._control(scope, node, version, control)
            return
        if found is None:
            raise Unsupported("no such operator here")
        if any(v is not None and self.facts.dtype(v) == ir.DataType.STRING for v in (*node.inputs, *node.outputs)):
            raise Unsupported("STRING tensors")
        places = self._places(node, found)
        host = found.place == "host" or all(places)
        spec = Node(node, version, self.state, host, self.facts, self.constant, self.statistic)
        kernel = found.build(spec)
        if found.pure and self._fold(node, kernel):
            return
        reads = tuple(scope.read(v, place) for v, place in zip(node.inputs, places, strict=True))
        writes = tuple(scope.define(v, host) if v.name else ABSENT for v in node.outputs)
        self.absent.update(v for v in node.outputs if not v.name)
        scope.steps.append(Step(kernel, reads, writes, node))

    def _places(self, node: ir.Node, found: Operator) -> list[bool]:
        """Per input whether it is read on the host."""
        data = [v for k, v in enumerate(node.inputs) if k not in found.host and v is not None]
        follow = all(self.on_host(v) for v in data)
        if found.place == "host":  # only its shape is read
            return [k in found.host or (v is not None and self.on_host(v)) for k, v in enumerate(node.inputs)]
        return [k in found.host or v is None or follow for k, v in enumerate(node.inputs)]

    def _fold(self, node: ir.Node, kernel: Kernel) -> bool:
        """Compute a node of constants now. An error is one of the run, should the node be needed at all."""
        if not all(v is None or v in self.constants for v in node.inputs):
            return False
        try:
            with torch.no_grad():
                result = kernel(*[None if v is None else self.constants[v] for v in node.inputs])
        except _FAILURES:
            return False
        results = result if type(result) is tuple else (result,)
        if not all(isinstance(r, Tensor) and r.numel() <= FOLD_LIMIT for r in results):
            return False
        for value, tensor in zip(node.outputs, results, strict=False):
            if value.name:
                self.constants[value] = tensor.detach()
        return True

    def _control(self, scope: Scope, node: ir.Node, version: int, control: Control) -> None:
        """If, Loop, Scan: compile the bodies, and let them read what they need from outside."""
        places = control.places(node, [v is None or self.on_host(v) for v in node.inputs])
        while True:
            mark = len(self.missing)
            bodies = {
                name: Body(self.graph(graph, scope, control.inputs(node, name, places)), graph)
                for name, graph in subgraphs(node)
            }
            changed = control.settle(node, places, {name: body.host for name, body in bodies.items()})
            if changed == places:
                break
            places = changed
            del self.missing[mark:]
        spec = Node(node, version, self.state, False, self.facts, self.constant)
        spec.bodies = bodies
        hosts = control.results(node, places, {name: body.host for name, body in bodies.items()})
        keys = list(dict.fromkeys(key for body in bodies.values() for key in body.captured))
        reads = [scope.read(v, place) for v, place in zip(node.inputs, places, strict=True)]
        reads += [scope.read(*key) for key in keys]
        kernel = control.build(spec, keys, hosts)
        writes = tuple(scope.define(v, h) if v.name else ABSENT for v, h in zip(node.outputs, hosts, strict=True))
        scope.steps.append(Step(kernel, tuple(reads), writes, node))


def subgraphs(node: ir.Node) -> list[tuple[str, ir.Graph]]:
    """Subgraphs of a node by attribute name."""
    return [(a.name, a.as_graph()) for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph:
        yield node
        for _, sub in subgraphs(node):
            yield from all_nodes(sub)
