"""A multiplicative gate of 1 on every prunable unit: what its removal does to the loss, as derivatives.

A gate multiplies the unit's activation where an operator sums over it (the input of the next layer), so that gate 0 is
the unit removed and gate 1 the model as it is; of experts it multiplies what the router chooses from. First derivatives
give Taylor, Fisher and head importance; products of the Hessian with a vector over all gates give the Hessian criteria.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from spa.consumers import sums, units_along
from spa.errors import UsageError
from spa.groups import Analysis, Group
from spa.interpreter.plan import Read
from spa.rules import Flow, Op, Operand

Index = NDArray[np.int64]


class Gates:
    """One vector of gates per group, and where they multiply.

    Where two activations are multiplied and summed (queries and keys) the first one carries the gate; the state inside
    an LSTM has it on the recurrent weight. Groups have no gate, and are listed in `without`, if no sum reads them, or
    one that a gate cannot reach: in a subgraph, or inside a fused attention after a bias.

    Args:
        analysis: of the very model object that the interpreter runs.
        groups: those to be gated; all if None.
        samples: gates of each sample of a batch on its own, [samples, units]: one backward pass of summed losses then
            gives all per-sample derivatives. Activations must have the batch first (or the batch and axes after it in
            one); others, and weights, are refused.
        device, dtype: of the gates.
    """

    def __init__(
        self,
        analysis: Analysis,
        groups: Sequence[Group] | None = None,
        *,
        samples: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.groups = tuple(analysis.groups if groups is None else groups)
        self.samples = samples
        beyond = _out_of_reach(analysis, self.groups)
        reads = _reads(analysis, [group for group in self.groups if group.name not in beyond])
        gated = {name for parts in reads.values() for _, name, _ in parts}
        self.without = tuple(g.name for g in self.groups if g.name not in gated)
        """Groups that have no gate."""
        units = {g.name: g.units for g in self.groups if g.name in gated}
        shape = (samples,) if samples else ()
        self.vectors: dict[str, Tensor] = {
            name: torch.ones(*shape, n, device=device, dtype=dtype, requires_grad=True) for name, n in units.items()
        }
        """Group -> its gates, [units] or [samples, units]; ones that require gradients."""
        starts = dict(zip(units, np.concatenate([[0], np.cumsum(list(units.values()))]).tolist(), strict=False))
        end = sum(units.values())
        self._places = [
            (read, d, rank, torch.from_numpy(index).to(device)) for read, d, rank, index in _merged(reads, starts, end)
        ]
        if samples and any(node.inputs[slot] in analysis.coupling.constants for node, slot, _ in reads):
            raise UsageError(
                "gates of single samples cannot multiply weights (a recurrent layer); use one for all samples."
            )

    def multipliers(self) -> Mapping[Read, Tensor]:
        """Per read a tensor that broadcasts against what is read (`Interpreter.forward(gates=...)`)."""
        if not self.vectors:
            return {}
        some = next(iter(self.vectors.values()))
        lead = some.shape[:-1]
        flat = torch.cat([*self.vectors.values(), some.new_ones(*lead, 1)], -1)
        out: dict[Read, Tensor] = {}
        for read, d, rank, index in self._places:
            shape = [1] * rank
            shape[d] = len(index)
            factor = flat.index_select(-1, index)
            if self.samples:
                if d == 0:
                    raise UsageError(
                        "gates of single samples need the batch on the first axis of every gated activation."
                    )
                shape[0] = self.samples
            factor = factor.reshape(shape)
            out[read] = out[read] * factor if read in out else factor
        return out

    def set(self, name: str, values: Iterable[float]) -> None:
        """Put other numbers into the gates of a group (0 removes a unit)."""
        with torch.no_grad():
            self.vectors[name].copy_(torch.tensor(list(values), dtype=self.vectors[name].dtype))


_RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")


def _choice(flow: Flow, op: Op) -> tuple[int, int] | None:
    """The operand that carries the gate: the first activation, or the weight of a state; None if there is none."""
    operands = [(slot, d) for slot, d in flow.inputs if op.inputs[slot] is not None]
    for slot, d in operands:
        operand = op.inputs[slot]
        if operand is not None and not operand.constant:
            return slot, d
    return operands[0] if operands and flow.node.op_type in _RECURRENT else None


def _out_of_reach(analysis: Analysis, groups: Sequence[Group]) -> set[str]:
    """Groups that are summed over where no gate can be: half a gate would say half of the truth."""
    coupling, solution = analysis.coupling, analysis.coupling.solution
    ops = {op.node: op for op in coupling.ops}
    owner: dict[int, list[str]] = {}
    for group in groups:
        for leaf in group.leaves:
            owner.setdefault(leaf, []).append(group.name)
    out: set[str] = set()
    for flow in coupling.relations.flows:
        if flow.leaving != "sum" or not flow.inputs:
            continue
        names = {name for leaf in solution.leaves(flow.axis) for name in owner.get(leaf, ())}
        if names and not _reachable(flow, ops[flow.node], coupling.model.graph):
            out |= names
    return out


def _reachable(flow: Flow, op: Op, main: ir.Graph) -> bool:
    """Whether a factor at an input of the node is a factor of the unit."""
    if all(operand is None or operand.constant for operand in op.inputs):
        return True  # computed from weights only: no activation is summed
    biased = flow.node.op_type == "MultiHeadAttention" and op.input(3) is not None
    return flow.node.graph is main and _choice(flow, op) is not None and not biased


Parts = dict[tuple[ir.Node, int, int], list[tuple[int, str, Index]]]


def _reads(analysis: Analysis, groups: Sequence[Group]) -> Parts:
    """(node, slot, axis) -> [(rank, group, unit per position of the axis or -1), ...]."""
    found: dict[tuple[ir.Node, int, int], dict[str, set[int]]] = {}
    operands: dict[tuple[ir.Node, int], Operand] = {}
    for flow, op, leaf, owners in sums(analysis, groups):
        chosen = _choice(flow, op)
        if chosen is not None:
            operand = op.inputs[chosen[0]]
            assert operand is not None
            operands[op.node, chosen[0]] = operand
            for group in owners:
                found.setdefault((op.node, *chosen), {}).setdefault(group.name, set()).add(leaf)
    by_name = {group.name: group for group in groups}
    out: Parts = {}
    for (node, slot, d), parts in found.items():
        operand = operands[node, slot]
        for name, leaves in parts.items():
            units = units_along(analysis, by_name[name], leaves, operand.dims[d])
            if (units >= 0).any():
                out.setdefault((node, slot, d), []).append((len(operand.dims), name, units))
    return out


def _merged(reads: Parts, starts: Mapping[str, int], end: int) -> list[tuple[Read, int, int, Index]]:
    """Per read and axis the positions in the vector of all gates, `end` (a constant 1) for none."""
    out: list[tuple[Read, int, int, Index]] = []
    for (node, slot, d), parts in reads.items():
        layers: list[Index] = []
        for _, name, units in parts:
            mine = units >= 0
            layer = next((x for x in layers if (x[mine] == end).all()), None)
            if layer is None:  # heads and the dimensions inside of them share positions: their gates multiply
                layer = np.full(len(units), end, dtype=np.int64)
                layers.append(layer)
            layer[mine] = units[mine] + starts[name]
        out.extend(((node, slot), d, parts[0][0], layer) for layer in layers)
    return out
