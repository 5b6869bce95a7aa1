"""What a source form sees of a node: its operands as Python, and the module that the code belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

from spa.interpreter.base import Node
from spa.interpreter.export.names import Names, given, identifier, number, snake
from spa.interpreter.export.sizes import Sizes
from spa.interpreter.types import FLOATS, HELD
from spa.symbols import Size

Turn: TypeAlias = bool
"""Whether a matrix stands in the module the other way round."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the exported module, and where it is from."""

    value: ir.Value | None
    """The initializer (or output of a `Constant` node); None for a constant that was computed."""
    tensor: Tensor
    """As it is in the exported module."""
    turned: Turn = False
    """Whether it is the transposed initializer."""
    learned: bool = True
    """Whether training changes it: a parameter, or a statistic."""


@dataclass
class Layout:
    """The exported module under construction."""

    names: Names
    sizes: Sizes
    lines: list[str] = field(default_factory=list)
    """Of `__init__`."""
    weights: dict[str, Weight] = field(default_factory=dict)
    """By the name in the state dict."""
    imports: set[str] = field(default_factory=set)


@dataclass
class Call:
    """One node while its line is written."""

    node: Node
    layout: Layout
    operands: Sequence[str | None]
    """Python per input; None for an absent one, and for a weight, which `arg` writes down when it is asked for."""
    leaves: Mapping[int, tuple[ir.Value, Tensor]]
    """Inputs that are parameters or statistics."""
    alone: frozenset[int]
    """Those of `leaves` that nothing else reads."""
    hold: Callable[[int], str]
    """Writes a weight or constant down, and says how it is read."""
    device: str = ""
    """Where new tensors are made, as Python; empty on the CPU."""
    values: Sequence[ir.Value | None] = ()
    """The inputs; those of `node.ir`, but for a bias that was fused."""

    # -- operands ----------------------------------------------------------------------------------------------------

    @property
    def operator(self) -> str:
        """The node's operator."""
        return self.node.ir.op_type

    def arg(self, slot: int) -> str:
        """An input, `None` if it is absent."""
        if slot >= len(self.values) or self.values[slot] is None:
            return "None"
        known = self.operands[slot]
        return self.hold(slot) if known is None else known

    def args(self) -> list[str]:
        """All inputs, without absent ones at the end."""
        found = [self.arg(k) for k in range(len(self.values))]
        while found and found[-1] == "None":
            found.pop()
        return found

    def scalar(self, slot: int, beside: int | None = None) -> str | None:
        """A constant of one number as that number, where it cannot add axes to what stands `beside` it."""
        x = self.node.const(slot)
        value = self.values[slot] if slot < len(self.values) else None
        if x is None and value is not None and (fixed := self.layout.sizes.fixed(value)) is not None:
            x = torch.tensor(fixed, dtype=HELD[self.node.dtype(slot) or ir.DataType.FLOAT])
        if x is None or x.numel() != 1 or x.is_complex():
            return None
        other = None if beside is None else self.node.rank(beside)
        if x.dim() and (other is None or other < x.dim()):
            return None
        found = x.item()
        if isinstance(found, float) and abs(found) == float("inf"):
            self.layout.imports.add("math")
        return number(found) if x.dtype == torch.float32 or not isinstance(found, float) else repr_signed(found)

    def ints(self, slot: int, attribute: str = "") -> list[str] | None:
        """Integers of an input or attribute as Python; None if there are none, or they are known only when it runs."""
        given_ = self.node.attr(attribute) if attribute else None
        if given_ is not None:
            return [str(n) for n in ([given_] if isinstance(given_, int) else given_)]
        if not self.node.has(slot):
            return None
        value = self.node.ir.inputs[slot]
        known = None if value is None else self.layout.sizes.items(value)
        if known is not None:
            return known[0]
        fixed = self.node.const(slot)
        return None if fixed is None or fixed.is_floating_point() else [str(int(n)) for n in fixed.reshape(-1).tolist()]

    def numbers(self, slot: int, attribute: str = "") -> list[int] | None:
        """Integers that do not depend on the inputs."""
        texts = self.ints(slot, attribute)
        if texts is None or not all(t.lstrip("-").isdecimal() for t in texts):
            return None
        return [int(t) for t in texts]

    def shape(self, slot: int = 0) -> tuple[Size, ...] | None:
        """Dims of an input."""
        value = self.values[slot] if slot < len(self.values) else None
        if slot in self.leaves:
            return tuple(self.leaves[slot][1].shape)
        return self.layout.sizes.shape(value)

    def sizes(self, slot: int = 0) -> list[int] | None:
        """Dims of an input if all are numbers."""
        shape = self.shape(slot)
        found = [d for d in shape or () if isinstance(d, int)]
        return found if shape is not None and len(found) == len(shape) else None

    def rank(self, slot: int = 0) -> int | None:
        """How many axes an input has."""
        shape = self.shape(slot)
        return None if shape is None else len(shape)

    def floats(self, slot: int = 0) -> bool:
        """Whether an input is known to hold floats."""
        return self.node.dtype(slot) in FLOATS

    def dtype(self, kind: ir.DataType | int | None) -> str | None:
        """A torch type as Python; None for what torch has no type for."""
        if kind is None or ir.DataType(kind) not in HELD:
            return None
        held = HELD[ir.DataType(kind)]
        narrow = ir.DataType(kind).bitwidth < 8 or (held == torch.float32 and ir.DataType(kind) != ir.DataType.FLOAT)
        return None if narrow else str(held)

    # -- modules -----------------------------------------------------------------------------------------------------

    def learned(self, slot: int) -> Tensor | None:
        """A parameter or statistic that nothing but this node reads."""
        return self.leaves[slot][1] if slot in self.alone else None

    def module(self, made: str, weights: Mapping[str, int], turned: Sequence[str] = ()) -> str:
        """A submodule that owns the weights in these slots; returns how it is read."""
        first = self.leaves[next(iter(weights.values()))][0]
        name = self.layout.names.new(self._hint(first) or snake(self.operator))
        self.layout.lines.append(f"self.{name} = {made}")
        for attribute, slot in weights.items():
            value, tensor = self.leaves[slot]
            turn = attribute in turned
            self.layout.weights[f"{name}.{attribute}"] = Weight(value, tensor.t() if turn else tensor, turn)
        return f"self.{name}"

    def plain_module(self, made: str) -> str:
        """A submodule without weights."""
        name = self.layout.names.new(identifier(self._scope()) or snake(self.operator))
        self.layout.lines.append(f"self.{name} = {made}")
        return f"self.{name}"

    def _hint(self, weight: ir.Value) -> str:
        """What the module should be called: as its weight, or as the place of its node."""
        name = given(weight.name)
        if name.rpartition(".")[2] in ("weight", "gamma", "scale", "kernel"):
            return identifier(name.rpartition(".")[0])
        return identifier(self._scope()) or (identifier(name) if name else "")

    def _scope(self) -> str:
        """`/layer1/conv1` of node `/layer1/conv1/Conv`."""
        where, _, last = (self.node.ir.name or "").rpartition("/")
        return where if last.startswith(self.operator) else given(self.node.ir.name).replace("node_", "")


def repr_signed(x: float) -> str:
    """A double, negative ones in brackets."""
    return f"({x!r})" if x < 0 else repr(x)
