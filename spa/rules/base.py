"""What a rule can see of a node (`Op`), what it can say about it (`Relations`), and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import Axes, Axis, Reason
from spa.symbols import Size

Leaving = Literal["pass", "sum", "mean", "stat", "choice"]
"""How an index leaves an operator: passed on, contracted by addition, by a mean, met by a statistic, or not chosen."""


@dataclass(frozen=True)
class Operand:
    """One input or output of a node as a rule sees it."""

    value: ir.Value
    shape: tuple[Size, ...]
    dims: tuple[Axis, ...]
    """The axes of the value, one per dimension."""
    const: NDArray[Any] | None
    """The value itself where it is small and known; unknown entries of integer tensors are None."""
    constant: bool
    """Computed from constants only (a weight, or a function of weights)."""


@dataclass(frozen=True)
class Flow:
    """What one node does with one index space."""

    node: ir.Node
    axis: Axis
    leaving: Leaving
    inputs: tuple[tuple[int, int], ...]
    """(input slot, dimension) that carry the axis."""
    outputs: tuple[tuple[int, int], ...]
    """(output slot, dimension) that carry it."""
    role: str = ""
    """Kind of unit this use makes of the axis (head, qk-dim ...), empty if it says nothing."""


@dataclass(frozen=True)
class Edit:
    """A number in the graph that must follow the sizes: attribute or operand entry = sum of the sizes of `axes`."""

    node: ir.Node
    slot: str | int
    """Attribute name, or input slot."""
    entry: int | None
    """Position inside the list or tensor; None for a scalar."""
    axes: tuple[Axis, ...]
    watch: tuple[Axis, ...] = ()
    """Axes whose shrinking makes the number invalid as it is written (an end counted from the back)."""


@dataclass(frozen=True)
class Remap:
    """An input that holds positions of `source` and must be renumbered (constant Gather indices)."""

    node: ir.Node
    slot: int
    source: Axis
    target: Axis


@dataclass(frozen=True)
class Pin:
    """An attribute or input whose default depends on `axis`: written out as it was before `axis` shrinks."""

    node: ir.Node
    slot: str | int
    """Attribute name, or input slot."""
    value: float | tuple[int, ...]
    axis: Axis


@dataclass(frozen=True)
class Cost:
    """coefficient x product of the sizes of `axes` multiply-accumulates."""

    node: ir.Node
    coefficient: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Choice:
    """An axis that a node chooses from, or shares out: a position may only leave as one that is never chosen."""

    flow: Flow
    count: int | str
    """How many are chosen; 0 where all get a share; a sentence where one that is not chosen cannot leave."""
    reason: Reason
    """Why the axis is frozen until it proves to be one of experts."""


@dataclass
class Relations:
    """Everything the rules said about a graph, besides the relations in `Axes`."""

    flows: list[Flow] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    remaps: list[Remap] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    """As rules stated them; once a graph is coupled, those whose positions may leave."""


class Op:
    """A node with its operands, and the verbs a rule may use."""

    def __init__(
        self,
        node: ir.Node,
        inputs: Sequence[Operand | None],
        outputs: Sequence[Operand | None],
        axes: Axes,
        relations: Relations,
        version: int,
        resolve: Callable[[ir.Value], Operand | None],
    ) -> None:
        self.node = node
        self.inputs = inputs
        self.outputs = outputs
        self.axes = axes
        self.relations = relations
        self.version = version
        self.resolve = resolve
        """Operand of any value of the graph or its subgraphs, None if its rank is unknown."""

    # -- reading -----------------------------------------------------------------------------------------------------

    def input(self, slot: int) -> Operand | None:
        """Input `slot`, None if it is absent."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    def output(self, slot: int = 0) -> Operand | None:
        """Output `slot`, None if it is absent."""
        return self.outputs[slot] if slot < len(self.outputs) else None

    def attr(self, name: str, default: Any = None) -> Any:
        """Attribute value (ints, floats, lists, strings), `default` if it is not set."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def ints(self, slot: int, attribute: str | None = None) -> list[int | None] | None:
        """Entries of a constant integer input (or of `attribute` in old opsets); unknown entries are None."""
        operand = self.input(slot)
        if operand is None:
            value = self.attr(attribute) if attribute else None
            return None if value is None else [int(v) for v in value]
        if operand.const is None:
            return None
        return [int(v) if isinstance(v, (int, np.integer)) else None for v in operand.const.reshape(-1)]

    # -- saying ------------------------------------------------------------------------------------------------------

    def flow(
        self,
        axis: Axis,
        inputs: Iterable[tuple[int, int]],
        outputs: Iterable[tuple[int, int]] = (),
        leaving: Leaving = "pass",
        role: str = "",
    ) -> None:
        """Record what this node does with `axis`."""
        self.axes.mentioned.add(axis)
        self.relations.flows.append(Flow(self.node, axis, leaving, tuple(inputs), tuple(outputs), role))

    def choose(self, d: int, count: int | str, outputs: Iterable[tuple[int, int]] = (), slot: int = 0) -> None:
        """Dimension `d` of an input is chosen from or shared out (see `Choice.count`): frozen unless of experts."""
        operand = self.inputs[slot]
        assert operand is not None
        axis = operand.dims[d]
        reason = Reason(f"{self.node.op_type} runs over this axis", self.node.op_type, self.node.name or "")
        self.axes.freeze(axis, reason)
        flow = Flow(self.node, axis, "choice", ((slot, d),), tuple(outputs), "expert")
        self.relations.choices.append(Choice(flow, count, reason))

    def edit(self, slot: str | int, entry: int | None, *axes: Axis, watch: tuple[Axis, ...] = ()) -> None:
        """Tie an attribute or operand entry to the size of `axes`."""
        self.axes.mentioned.update(axes)
        self.relations.edits.append(Edit(self.node, slot, entry, axes, watch))

    def remap(self, slot: int, source: Axis, target: Axis) -> None:
        """Input `slot` holds positions of `source`, one per position of `target`."""
        self.relations.remaps.append(Remap(self.node, slot, source, target))

    def pin(self, slot: str | int, value: float | tuple[int, ...], axis: Axis) -> None:
        """Write an attribute or input out with `value` before `axis` shrinks."""
        self.relations.pins.append(Pin(self.node, slot, value, axis))

    def cost(self, *axes: Axis, coefficient: int = 1) -> None:
        """Add coefficient x product(axes) multiply-accumulates."""
        self.relations.costs.append(Cost(self.node, coefficient, axes))

    def freeze(self, axis: Axis, why: str) -> None:
        """Nothing of `axis` may be removed, because of this node."""
        self.axes.freeze(axis, Reason(why, self.node.op_type, self.node.name or ""))

    def freeze_all(self, why: str) -> None:
        """Freeze every axis of every operand."""
        for operand in (*self.inputs, *self.outputs):
            if operand is not None:
                for axis in operand.dims:
                    self.freeze(axis, why)


Apply: TypeAlias = Callable[[Op], None]


@dataclass(frozen=True)
class Zero:
    """When is an output zero on a removed index, given that its inputs are?"""

    any_of: tuple[int, ...] = ()
    """Zero if one of these inputs is (factors)."""
    all_of: tuple[int, ...] | Literal["all"] = ()
    """... and all of these that are present are (summands); an input without the index counts as not zero."""
    parts: bool = False
    """Inputs without the index do not matter (concatenation)."""
    never: bool = False
    """Not known to be zero."""
    outputs: tuple[int, ...] = ()
    """The outputs this is about; all if empty."""


FACTOR = Zero(any_of=(0,))
NEVER = Zero(never=True)


@dataclass(frozen=True)
class Rule:
    """Knowledge about one operator."""

    apply: Apply
    text: str
    """The notation line, or one sentence."""
    zero: Zero | Callable[[Op], Zero] = NEVER
    divisors: tuple[int, ...] = ()
    """Inputs that must not be zeroed (denominators, logarithms): zero would turn into NaN."""
    points: Mapping[int, int] = field(default_factory=dict)
    """Quantised input -> the input with its zero point: a zero there stands for zero only if the zero point is zero."""
    selects: bool = False
    """Reads parts of its operand: a bias that several such uses share is one tensor, not an accident of export."""
    combines: bool = False
    """Combines several operands position by position: a constant shared by such uses is not tied by them."""

    def zero_of(self, op: Op) -> Zero:
        """`zero` for one node."""
        return self.zero if isinstance(self.zero, Zero) else self.zero(op)


_RULES: dict[tuple[str, str], list[tuple[int, Rule]]] = {}


def register(operators: str, rule: Rule, *, since: int = 1, domain: str = "") -> None:
    """Register `rule` for each operator named in `operators`, from opset `since` on."""
    for name in operators.split():
        entries = _RULES.setdefault((domain, name), [])
        entries.append((since, rule))
        entries.sort(key=lambda entry: entry[0])


def lookup(domain: str, operator: str, version: int) -> Rule | None:
    """The rule of an operator in opset `version`, None if there is none."""
    domain = "" if domain == "ai.onnx" else domain
    found = None
    for since, rule in _RULES.get((domain, operator), ()):
        if since <= version:
            found = rule
    return found


def table() -> Mapping[tuple[str, str], Sequence[tuple[int, Rule]]]:
    """All rules: (domain, operator) -> [(since, rule), ...]."""
    return _RULES
