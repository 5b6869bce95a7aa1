"""The registry of operators, and what an operator's builder can see of a node.

A builder resolves attributes and constant operands once and returns the kernel: a function of the node's inputs
(tensors, None where an optional one is absent) that returns the output, or a tuple of outputs.

Numbers that only say how long or where something is (shapes, axes, sizes) stay on the CPU: such a value is *on the
host*. An operator whose inputs are all on the host is computed there, so that shape arithmetic never waits for a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

from spa.interpreter.types import FLOATS, HELD
from spa.shapes.infer import Shapes

Kernel: TypeAlias = Callable[..., Any]
Place = Literal["follow", "host"]


class Unsupported(Exception):
    """A builder cannot do what its node asks for; the message says why in a few words."""


@dataclass
class State:
    """What kernels may look at while they run."""

    training: bool = False
    unified: torch.dtype | None = None
    """The type that all floats have after `Interpreter.to(dtype)`, None for those of the model."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    update: bool = True
    """Whether training may change statistics; not while a checkpointed segment is computed again."""

    def held(self, dtype: ir.DataType, host: bool = False) -> torch.dtype:
        """The torch type of values that are `dtype` in the model."""
        if self.unified is not None and dtype in FLOATS and not host:
            return self.unified
        return HELD[dtype]

    def place(self, x: Any) -> Any:
        """A value from the host where it meets others."""
        if not isinstance(x, Tensor):
            return [self.place(item) for item in x] if isinstance(x, list) else x
        if self.unified is not None and x.is_floating_point() and x.dtype != self.unified:
            x = converted(x, self.unified)
        return x if x.device == self.device else x.to(self.device, non_blocking=True)


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another float type; finite numbers stay finite (masks are written as the lowest float32)."""
    limit = torch.finfo(dtype).max
    if torch.finfo(x.dtype).max > limit:
        x = torch.where(x.isinf(), x, x.clamp(-limit, limit))
    return x.to(dtype)


class Node:
    """A node while its kernel is built."""

    def __init__(
        self,
        node: ir.Node,
        version: int,
        state: State,
        host: bool,
        facts: Shapes,
        constant: Callable[[ir.Value], Tensor | None],
        stored: Callable[[ir.Value], bool | None] = lambda _: None,
    ) -> None:
        self.ir = node
        self.version = version
        self.state = state
        self.host = host
        """Whether it is computed on the host."""
        self.facts = facts
        self._constant = constant
        self._stored = stored
        self.bodies: Mapping[str, Any] = {}
        """Compiled subgraphs by attribute (`spa.interpreter.program.Body`)."""

    # -- what stands there -------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> int:
        """How many outputs are there, up to the last one with a name."""
        named = [k for k, value in enumerate(self.ir.outputs) if value.name]
        return named[-1] + 1 if named else 0

    def wants(self, slot: int) -> bool:
        """Whether the output is present."""
        return slot < len(self.ir.outputs) and bool(self.ir.outputs[slot].name)

    def has(self, slot: int) -> bool:
        """Whether the input is present."""
        return slot < len(self.ir.inputs) and self.ir.inputs[slot] is not None

    def attr(self, name: str, default: Any = None) -> Any:
        """Attribute value, `default` if it is not set."""
        attribute = self.ir.attributes.get(name)
        return default if attribute is None or attribute.value is None else attribute.value

    # -- what is known -----------------------------------------------------------------------------------------------

    def const(self, slot: int) -> Tensor | None:
        """The constant in an input, None if there is none or it depends on inputs or parameters."""
        value = self.ir.inputs[slot] if self.has(slot) else None
        return None if value is None else self._constant(value)

    def stored(self, slot: int) -> bool | None:
        """Whether the input is a statistic that this node alone reads; None if it is computed from something."""
        value = self.ir.inputs[slot] if self.has(slot) else None
        return None if value is None else self._stored(value)

    def dtype(self, slot: int = 0) -> ir.DataType | None:
        """Element type of an input as far as it is known."""
        value = self.ir.inputs[slot] if self.has(slot) else None
        return None if value is None else self.facts.dtype(value)

    def out_dtype(self, slot: int = 0) -> ir.DataType | None:
        """Element type of an output as far as it is known."""
        return self.facts.dtype(self.ir.outputs[slot]) or self.ir.outputs[slot].dtype

    def rank(self, slot: int = 0) -> int | None:
        """Dimensions of an input as far as they are known."""
        value = self.ir.inputs[slot] if self.has(slot) else None
        shape = None if value is None else self.facts.shape(value)
        return None if shape is None else len(shape)

    def numbers(
        self, slot: int, attribute: str = "", default: Sequence[Any] | None = None
    ) -> Callable[[Tensor | None], list[Any] | None]:
        """Reads a list of numbers from an input on the host, or from the attribute that held it in older opsets."""
        value = self.attr(attribute) if attribute else None
        if value is not None:
            fixed: list[Any] | None = [value] if isinstance(value, int | float) else list(value)
        elif not self.has(slot):
            fixed = None if default is None else list(default)
        elif (known := self.const(slot)) is not None:
            fixed = known.reshape(-1).tolist()
        else:
            return lambda t: None if t is None else t.reshape(-1).tolist()
        return lambda _: fixed

    def number(self, slot: int, attribute: str = "", default: Any = None) -> Callable[[Tensor | None], Any]:
        """As `numbers`, for one."""
        read = self.numbers(slot, attribute, None if default is None else [default])

        def first(t: Tensor | None) -> Any:
            values = read(t)
            return values[0] if values else default

        return first

    def held(self, dtype: ir.DataType | int) -> Callable[[], torch.dtype]:
        """The torch type that values of an ONNX type have when the kernel runs. Raises: Unsupported."""
        kind = ir.DataType(dtype)
        if kind not in HELD:
            raise Unsupported(f"{kind.name} tensors")
        return lambda: self.state.held(kind, self.host)


Builder: TypeAlias = Callable[[Node], Kernel]


@dataclass(frozen=True)
class Operator:
    """How an operator becomes torch."""

    build: Builder
    since: int = 1
    host: frozenset[int] = frozenset()
    """Input slots that are read as numbers on the CPU."""
    place: Place = "follow"
    """`host`: the outputs are sizes, whatever the inputs are."""
    pure: bool = True
    """Equal inputs give equal outputs: computed once if they are constant."""


_OPERATORS: dict[tuple[str, str], list[Operator]] = {}


def operator(
    names: str,
    *,
    since: int = 1,
    domain: str = "",
    host: Iterable[int] = (),
    place: Place = "follow",
    pure: bool = True,
) -> Callable[[Builder], Builder]:
    """Register the builder of each operator in `names`, from opset `since` of `domain` on."""

    def enter(build: Builder) -> Builder:
        for name in names.split():
            entries = _OPERATORS.setdefault((domain, name), [])
            entries.append(Operator(build, since, frozenset(host), place, pure))
            entries.sort(key=lambda entry: entry.since)
        return build

    return enter


def plain(names: str, kernel: Kernel, *, since: int = 1, domain: str = "") -> None:
    """Register operators that are a torch function of their inputs."""

    def build(_: Node) -> Kernel:
        return kernel

    build.__module__ = sys._getframe(1).f_globals["__name__"]  # the family that it is listed under
    operator(names, since=since, domain=domain)(build)


def lookup(domain: str, name: str, version: int) -> Operator | None:
    """The entry of an operator in opset `version`, None if there is none."""
    found = None
    for entry in _OPERATORS.get(("" if domain == "ai.onnx" else domain, name), ()):
        if entry.since <= version:
            found = entry
    return found


def table() -> Mapping[tuple[str, str], Sequence[Operator]]:
    """All operators: (domain, name) -> entries, oldest first."""
    return _OPERATORS


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis."""
    return axis + rank if axis < 0 else axis


def wide(kernel: Kernel) -> Kernel:
    """`kernel` for unsigned integers above 8 bits: computed in int64, wrapped back."""

    def run(*inputs: Tensor | None) -> Any:
        first = next(x for x in inputs if x is not None)
        result = kernel(*(x if x is None or x.dtype == torch.bool else x.to(torch.int64) for x in inputs))
        return result.to(first.dtype) if result.dtype == torch.int64 else result

    return run
