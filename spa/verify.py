"""Prove that the surgery is exact: the pruned model against a full-size reference that it must equal.

Two references. `zeroed` needs no rule: the original model with exactly the slices of the plan set to zero; for exact
plans. `masked` works for statistic atoms too: removed channels stay alive, and only where an operator sums over them
(mean, normalise ...) their contribution is masked: zero in sums, survivors only in statistics, the lowest value where a
router chooses.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.blocks import blanked, picked
from spa.coupling import tensor_of
from spa.errors import RuntimeFailure, VerifyError
from spa.exactness import pinned
from spa.feeds import runnable_feeds
from spa.groups import Analysis
from spa.heap import released
from spa.plan import Removal
from spa.removal import Mask, changed_leaves
from spa.rules import Flow
from spa.runtime import Session, open_session, run
from spa.sites import constant_of
from spa.store import save, unpack
from spa.twin import Twin
from spa.unsigned import has_signed, unsigned

TOLERANCE = 1e-4
"""Largest accepted relative error in float32: rounding in another order, nothing else."""
HALF_TOLERANCE = 2e-2
"""In float16 and bfloat16, whose rounding is 2^-11 and 2^-8 per operation."""

LARGE = 64 << 20
"""Above this many bytes of weights ONNX Runtime maps them instead of holding its own copy."""

Feeds = Mapping[str, NDArray[Any]]
Kept = Mapping[str, Sequence[tuple[int, NDArray[np.intp]]]]
"""Inputs and outputs that lost positions: axes, with what is left there."""


@dataclass(frozen=True)
class Verification:
    """How far a pruned model is from its reference."""

    exact: bool
    """The reference is the original with the plan's slices zeroed (else: masked, statistics over the survivors)."""
    max_abs_error: float
    """Largest absolute difference over all outputs."""
    max_rel_error: float
    """Largest difference of an output, divided by the largest magnitude in that output."""
    tolerance: float
    """Relative error that would still be accepted."""
    outputs: int
    """Outputs compared."""
    compensated: bool = False
    """The model is the cut up to weights that were changed after it (`spa.verify`): the error says how far that moved
    the outputs, and is only required to be finite."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; of a compensated model, whether it is finite."""
        return self.max_rel_error <= (sys.float_info.max if self.compensated else self.tolerance)


def zeroed(model: ir.Model, removed: Sequence[Removal]) -> ir.Model:
    """The original model with the slices of a plan set to zero; knows no rules."""
    twin = Twin(model)
    for removal in removed:
        for value, uses in _targets(twin.model, removal):
            producer, tensor = value.producer(), constant_of(value)
            assert tensor is not None
            blank = blanked(tensor, removal.axis, np.array(removal.indices, dtype=np.intp))
            if removal.consumers is None and producer is None:
                value.const_value = blank
            elif removal.consumers is None and producer is not None:
                producer.attributes.clear()
                producer.attributes["value"] = ir.AttrTensor("value", blank)
            else:
                copy = twin.constant(blank, f"{value.name}_zeroed")
                for node, slot in uses:
                    node.replace_input_with(slot, copy)
    return twin.model


def _targets(model: ir.Model, removal: Removal) -> list[tuple[ir.Value, list[tuple[ir.Node, int]]]]:
    """The initializer a removal names, and the uses it means (as they stand now)."""
    found: list[tuple[ir.Value, list[tuple[ir.Node, int]]]] = []
    wanted = None if removal.consumers is None else {(c.output, c.input) for c in removal.consumers}
    for graph in model.graphs():
        values = [*graph.initializers.values(), *(n.outputs[0] for n in graph if n.op_type == "Constant")]
        for value in values:
            if wanted is None and value.name == removal.initializer:
                found.append((value, []))
    if wanted is None:
        return found
    # a use may already read a copy made by an earlier removal along another axis
    uses: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for graph in model.graphs():
        for node in graph:
            for slot, operand in enumerate(node.inputs):
                if operand is not None and node.outputs and (node.outputs[0].name, slot) in wanted:
                    uses.setdefault(operand, []).append((node, slot))
    return list(uses.items())


def masked(analysis: Analysis, kept: Mask) -> ir.Model:
    """The masked dense reference of a removal."""
    return _Masker(analysis, kept).run()


class _Masker:
    def __init__(self, analysis: Analysis, kept: Mask) -> None:
        self.coupling = analysis.coupling
        self.poison = analysis.poison
        self.solution = analysis.coupling.solution
        self.kept = kept
        self.changed = changed_leaves(self.solution, kept)
        self.twin = Twin(self.coupling.model)
        self.by_node = {op.node: op for op in self.coupling.ops}

    def run(self) -> ir.Model:
        restricted: dict[ir.Node, set[int]] = {}
        for flow in self.coupling.relations.flows:
            leaves = set(self.solution.leaves(flow.axis)) & self.changed
            if not leaves or flow.leaving == "pass" or pinned(self.coupling, flow, self.poison):
                continue
            slot = self._float_carrier(flow) if flow.leaving in ("sum", "choice") else None
            if slot is None:
                restricted.setdefault(flow.node, set()).update(leaves)
            else:
                self._mask(flow.node, *slot, leaves, lowest=flow.leaving == "choice")
        for node, leaves in restricted.items():
            self._restrict(node, leaves)
        return self.twin.model

    def _float_carrier(self, flow: Flow) -> tuple[int, int] | None:
        """The operand to zero: a floating-point one, a constant if there is one."""
        op = self.by_node[flow.node]
        found = []
        for slot, d in flow.inputs:
            operand = op.inputs[slot]
            dtype = self.coupling.shapes.dtype(operand.value) if operand is not None else None
            if operand is not None and dtype is not None and dtype.is_floating_point():
                found.append((not operand.constant, slot, d))
        return min(found)[1:] if found else None

    def _mask_of(self, node: ir.Node, slot: int, d: int, leaves: set[int], output: bool = False) -> Mask:
        op = self.by_node[node]
        operand = (op.outputs if output else op.inputs)[slot]
        assert operand is not None
        return self.solution.keep(operand.dims[d], self._only(leaves))

    def _only(self, leaves: set[int]) -> Mask:
        """`kept`, with everything outside of `leaves` kept."""
        out = np.ones_like(self.kept)
        for leaf in leaves:
            span = slice(self.solution.base[leaf], self.solution.base[leaf + 1])
            out[span] = self.kept[span]
        return out

    def _mask(self, node: ir.Node, slot: int, d: int, leaves: set[int], lowest: bool) -> None:
        """Zero the removed positions of one operand of a sum; make them the lowest, so that no one chooses them."""
        op = self.by_node[node]
        operand = op.inputs[slot]
        assert operand is not None
        shape = [1] * len(operand.dims)
        mask = self._mask_of(node, slot, d, leaves)
        shape[d] = len(mask)
        twin = self.twin.node(node)
        value = twin.inputs[slot]
        assert value is not None
        tensor = constant_of(value)
        if tensor is not None and not lowest:  # some kernels want their weights constant
            blank = blanked(tensor, d, np.flatnonzero(~mask))
            twin.replace_input_with(slot, self.twin.constant(blank, f"{value.name}_masked"))
            return
        dtype = self.coupling.shapes.dtype(operand.value) or ir.DataType.FLOAT
        alive = self.twin.constant(ir.tensor(mask.reshape(shape)), "mask")
        fill = np.array(dtype.min if lowest else 0, dtype.numpy())
        mask_value = self.twin.constant(ir.Tensor(fill, dtype=dtype), "lowest" if lowest else "zero")
        twin.replace_input_with(slot, self.twin.after(value, "Where", [alive, value, mask_value], before=twin))

    def _restrict(self, node: ir.Node, leaves: set[int]) -> None:
        """Run one operator on the survivors only, and lay its outputs out at full size again."""
        op = self.by_node[node]
        twin = self.twin.node(node)
        for slot, operand in enumerate(op.inputs):
            for d, dim in enumerate(operand.dims if operand is not None else ()):
                if self.solution.touched(dim, leaves):
                    keep = np.flatnonzero(self._mask_of(node, slot, d, leaves))
                    value = twin.inputs[slot]
                    assert value is not None
                    twin.replace_input_with(slot, self._gather(value, keep, d, before=twin))
        self._resize(node, leaves)
        for slot, operand in enumerate(op.outputs):
            value = twin.outputs[slot]
            for d, dim in enumerate(operand.dims if operand is not None else ()):
                if self.solution.touched(dim, leaves):
                    value.shape = None
                    value = self._spread(value, self._mask_of(node, slot, d, leaves, output=True), d)

    def _resize(self, node: ir.Node, leaves: set[int]) -> None:
        """Sizes in attributes (hidden_size, N, K) follow the survivors, defaults that depend on a size do not."""
        counts = self.solution.counts(self._only(leaves))
        attributes = self.twin.node(node).attributes
        for edit in self.coupling.relations.edits:
            if edit.node is not node or not isinstance(edit.slot, str):
                continue
            size = sum((self.solution.size(a, counts) for a in edit.axes), start=0)
            if not isinstance(size, int):
                continue
            if edit.entry is None:
                attributes[edit.slot] = ir.AttrInt64(edit.slot, size)
            elif edit.slot in attributes:
                entries = list(attributes[edit.slot].as_ints())
                entries[edit.entry] = size
                attributes[edit.slot] = ir.AttrInt64s(edit.slot, entries)
        for pin in self.coupling.relations.pins:
            if pin.node is node and isinstance(pin.slot, str) and isinstance(pin.value, float):
                attributes[pin.slot] = ir.AttrFloat32(pin.slot, pin.value)

    def _gather(self, value: ir.Value, index: NDArray[np.int64], axis: int, before: ir.Node) -> ir.Value:
        tensor = constant_of(value)
        if tensor is not None and not value.is_graph_input():  # some kernels want their weights constant
            return self.twin.constant(picked(tensor, [(axis, index)], "kept"), f"{value.name}_kept")
        constant = self.twin.constant(ir.tensor(index), "kept")
        return self.twin.after(value, "Gather", [value, constant], [ir.AttrInt64("axis", axis)], before=before)

    def _spread(self, value: ir.Value, mask: Mask, axis: int) -> ir.Value:
        """Full-size axis again: survivors at their places, any survivor elsewhere (nobody may read it)."""
        index = np.maximum(np.cumsum(mask) - 1, 0)
        readers = list(value.uses())
        constant = self.twin.constant(ir.tensor(index), "spread")
        wide = self.twin.after(value, "Gather", [value, constant], [ir.AttrInt64("axis", axis)])
        for node, slot in readers:
            node.replace_input_with(slot, wide)
        return wide


def compare(
    reference: ir.Model | Path,
    pruned: ir.Model | Path,
    *,
    exact: bool,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    feeds: Feeds | None = None,
    original: ir.Model,
    border: Kept | None = None,
    runs: int = 1,
) -> Verification:
    """Run both models on the same inputs and compare all outputs.

    Args:
        reference: full-size model the pruned one must equal.
        pruned: the pruned model.
        exact: what kind of reference it is, for the record.
        seed: of the synthetic inputs.
        dims: sizes of symbolic axes of the inputs.
        feeds: inputs to use instead of synthetic ones.
        original: the model before pruning: its inputs, the sizes of its tables, its precision.
        border: inputs and outputs of which the pruned model has a part; that part is compared.
        runs: how many synthetic inputs to compare.

    Raises:
        RuntimeFailure: one of the models does not run.
    """
    limited = _weight_bytes(original) > LARGE
    tolerance = HALF_TOLERANCE if half_precision(original) else TOLERANCE

    def choose(wide: Session) -> list[Feeds]:
        if feeds is not None:
            return [feeds]
        return [runnable_feeds(original, wide, seed + k, dict(dims or {})) for k in range(runs)]

    if has_signed(original):
        reference, pruned = _exact(reference), _exact(pruned)
    with _folder(pruned if limited and isinstance(pruned, Path) else None) as folder:
        # one after the other, as each may need as much memory as there is
        inputs, wanted = _outputs(reference, folder / "reference", "the original model", limited, choose)
        narrow = [_part(given, border or {}) for given in inputs]
        _, got = _outputs(pruned, folder / "pruned", "the pruned model", limited, lambda _: narrow)
    worst = Verification(exact, 0.0, 0.0, tolerance, 0)
    for want, have in zip(wanted, got, strict=True):
        worst = _worse(worst, measure(_part(want, border or {}), have, exact, tolerance))
    return worst


def _exact(model: ir.Model | Path) -> ir.Model:
    """With integer products that are the same on all processors."""
    return unsigned(ir.load(model) if isinstance(model, Path) else model)


def border(analysis: Analysis, kept: Mask) -> Kept:
    """What a removal leaves of the inputs and outputs of the graph."""
    coupling, solution = analysis.coupling, analysis.coupling.solution
    found: dict[str, list[tuple[int, NDArray[np.intp]]]] = {}
    if not coupling.free:
        return found
    for value in (*coupling.model.graph.inputs, *coupling.model.graph.outputs):
        for axis, dim in enumerate(coupling.dims(value) or ()):
            mask = solution.keep(dim, kept) if isinstance(coupling.axes.size(dim), int) else np.ones(1, bool)
            if not mask.all():
                found.setdefault(value.name or "", []).append((axis, np.flatnonzero(mask)))
    return found


def _part(values: Feeds, border: Kept) -> Feeds:
    """Values with only the positions that are left."""
    out = dict(values)
    for name, cuts in border.items():
        for axis, index in cuts if name in out else ():
            out[name] = np.take(out[name], index, axis=axis)
    return out


def _weight_bytes(model: ir.Model) -> int:
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    tensors += [tensor_of(node) for node in model.graph.all_nodes()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype != ir.DataType.STRING)


@contextmanager
def _folder(beside: Path | None) -> Iterator[Path]:
    """A temporary folder; big files go beside the result, as the system's temporary folder may live in memory."""
    where = beside.parent if beside is not None and os.access(beside.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".spa-verify-", dir=where) as name:
        yield Path(name)


def _outputs(
    model: ir.Model | Path, folder: Path, name: str, limited: bool, choose: Callable[[Session], list[Feeds]]
) -> tuple[list[Feeds], list[Feeds]]:
    """Inputs and what a model answers to them; its session and its files are gone afterwards."""
    folder.mkdir()
    try:
        path = _file(model, folder, limited)
        session = _open(path, name, limited)
        with released(path.parent) if limited else nullcontext():
            inputs = choose(session)
            return inputs, [run(session, given) for given in inputs]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file(model: ir.Model | Path, folder: Path, limited: bool) -> Path:
    """The model as a file; `limited`: with big weights where they can be mapped."""
    path = folder / "model.onnx"
    if isinstance(model, ir.Model):
        if limited:
            return unpack(model, path)
        save(model, path, external=False)
        return path
    return unpack(model, path) if limited and model.stat().st_size > LARGE else model


def _open(path: Path, name: str, limited: bool) -> Session:
    try:
        # as written: the optimiser fuses some quantised products into coarser kernels in one model and not in the other
        return open_session(path, optimize=False, arena=not limited, repack=not limited)
    except RuntimeFailure as error:
        cause = str(error).rpartition("]: ")[2] or str(error)
        raise RuntimeFailure(
            f"{name} cannot be verified because ONNX Runtime does not load it ({cause.rstrip('.')}); "
            "pass --no-verify (check=False) to go without the proof"
        ) from None


def _worse(a: Verification, b: Verification) -> Verification:
    return b if b.max_rel_error >= a.max_rel_error else a


def half_precision(model: ir.Model) -> bool:
    """Whether a model computes in float16 or bfloat16 anywhere."""
    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    if any(v.dtype in half for graph in model.graphs() for v in graph.initializers.values()):
        return True
    return any(v.dtype in half for node in model.graph.all_nodes() for v in node.outputs)


def measure(reference: Feeds, pruned: Feeds, exact: bool, tolerance: float = TOLERANCE) -> Verification:
    """Compare named outputs; infinities and NaNs must stand at the same places."""
    absolute = relative = 0.0
    for name, a in reference.items():
        b = pruned.get(name)
        if b is None or a.shape != b.shape:
            return Verification(exact, float("inf"), float("inf"), tolerance, len(reference))
        if a.dtype.kind in "OUS":
            difference = np.array([0.0 if np.array_equal(a, b) else 1.0])
            scale = 1.0
        else:
            x, y = a.astype(np.float64), b.astype(np.float64)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            difference = np.where(same, 0.0, np.abs(x - y))
            difference = np.nan_to_num(difference, nan=np.inf)
            finite = np.abs(x[np.isfinite(x)])
            scale = float(finite.max()) if finite.size else 0.0
        error = float(difference.max()) if difference.size else 0.0
        absolute = max(absolute, error)
        relative = max(relative, error / scale if scale else error)
    return Verification(exact, absolute, relative, tolerance, len(reference))


def same_structure(cut: ir.Model, pruned: ir.Model) -> bool:
    """Whether `pruned` is `cut` up to the numbers in floating-point weights, and biases that were added.

    Inputs, outputs and operators must be the same, and tensors of the same name must have the same type and shape;
    those that are not floating-point (indices, sizes) also the same numbers.
    """
    if _surface(cut) != _surface(pruned):
        return False
    here, there = (Counter((n.domain, n.op_type) for n in m.graph.all_nodes()) for m in (cut, pruned))
    if here - there or set(there - here) - {("", "Add")}:
        return False
    wanted, found = _constants(cut), _constants(pruned)
    return all(_alike(tensor, found[name]) for name, tensor in wanted.items() if name in found)


def _surface(model: ir.Model) -> list[list[str | None]]:
    graph = model.graph
    fed = [v.name for v in graph.inputs if v.name not in graph.initializers]
    return [fed, [v.name for v in graph.outputs]]


def _constants(model: ir.Model) -> dict[str | None, ir.TensorProtocol]:
    found = {v.name: v.const_value for graph in model.graphs() for v in graph.initializers.values()}
    found |= {node.outputs[0].name: tensor_of(node) for node in model.graph.all_nodes() if node.op_type == "Constant"}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _alike(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.dtype.is_floating_point() or np.array_equal(a.numpy(), b.numpy())


def require(verification: Verification, name: str) -> None:
    """Raise if a verification failed.

    Raises:
        VerifyError: the error is above the tolerance.
    """
    if not verification.passed:
        raise VerifyError(
            f"{name} differs from its reference by {verification.max_rel_error:.3g} of the output's magnitude "
            f"(accepted: {verification.tolerance:g}); nothing was written, please report this model"
        )
