"""Plan to smaller model: slice the weights, and let every number that depends on a size follow. Generic over rules.

Values that the graph computes from a size keep their original value (1/sqrt(head size), counts of a mean): `Shape`
nodes that read a pruned axis keep returning what they returned. Shape operands are then edited entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import Axis
from spa.blocks import picked
from spa.exactness import pinned
from spa.groups import Analysis
from spa.removal import Mask, changed_leaves, variants
from spa.rules import Edit, Remap
from spa.symbols import Size, coefficient, is_static, symbol
from spa.twin import Twin, computed


def rewritten(analysis: Analysis, kept: Mask) -> Twin:
    """A new model in which the positions outside `kept` are gone; the analysed model is not touched.

    It comes with the map from the analysed model's nodes and values to its own.
    """
    return _Rewriter(analysis, kept).run()


class _Rewriter:
    def __init__(self, analysis: Analysis, kept: Mask) -> None:
        self.analysis = analysis
        self.coupling = analysis.coupling
        self.solution = analysis.coupling.solution
        self.kept = kept
        self.changed = changed_leaves(self.solution, kept)
        self.old: list[Size] = list(self.solution.leaf_size)
        self.new = self.solution.counts(kept)
        self.twin = Twin(self.coupling.model)
        named = {
            d.value for v in self.coupling.model.graph.inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim)
        }
        self.names: dict[Size | None, str] = {symbol(name): name for name in named if name}
        """Of axes of the inputs."""
        self._made: dict[tuple[Any, ...], ir.Value] = {}
        """Shape operands that were edited, by what they are: attention reshapes many values alike."""

    def run(self) -> Twin:
        self._pinned()
        self._weights()
        self._shape_readers()
        self._pins()
        self._edits()
        for remap in self.coupling.relations.remaps:
            if self._touched(remap.source) or self._touched(remap.target):
                self._remap(remap)
        self._shapes()
        read = [n for n in self.coupling.model.graph if any(v.uses() or v.is_graph_output() for v in n.outputs)]
        self.twin.sweep(read)  # what only computed numbers that are others now
        return self.twin

    def _touched(self, axis: Axis) -> bool:
        return self.solution.touched(axis, self.changed)

    # -- weights -----------------------------------------------------------------------------------------------------

    def _weights(self) -> None:
        for value, tensor in self.coupling.weights.items():
            groups = variants(self.analysis, value)
            made: dict[tuple[bytes, ...], ir.Value | None] = {}
            for uses, dims in groups:
                masks = [self.solution.keep(d, self.kept) if self._touched(d) else None for d in dims]
                key = tuple(b"" if m is None or m.all() else m.tobytes() for m in masks)
                if not any(key) and len(groups) == 1:
                    continue
                if key not in made:
                    sliced = slice_tensor(tensor, masks, value.name or "") if any(key) else tensor
                    made[key] = self._place(value, sliced, first=not made)
                replacement = made[key]
                for node, slot in uses:
                    self.twin.node(node).replace_input_with(slot, replacement)

    def _doubled(self) -> set[ir.Node]:
        """Computations on matrices that would have to be written twice: v / norm(v) cuts one v and keeps the other."""
        found: set[ir.Node] = set()
        for value, tensor in self.coupling.weights.items():
            groups = variants(self.analysis, value)
            if len(groups) > 1 and len(tensor.shape) > 1 and tensor.dtype.is_floating_point():
                keys = {tuple(self.solution.keep(d, self.kept).tobytes() for d in dims) for _, dims in groups}
                readers = {node for uses, _ in groups for node, _ in uses} if len(keys) > 1 else set()
                computing = {n for n in readers if n.op_type != "Identity"}
                found.update(n for n in computing if self.coupling.constants.issuperset(n.outputs))
        return found

    def _place(self, value: ir.Value, tensor: ir.TensorProtocol, first: bool) -> ir.Value:
        """Put a sliced tensor into the new model: in place of the original, or beside it."""
        twin = self.twin.value(value)
        if not first:
            return self.twin.constant(tensor, f"{value.name}_spa")
        producer = twin.producer()
        if producer is not None:
            producer.attributes.clear()
            producer.attributes["value"] = ir.AttrTensor("value", tensor)
        else:
            twin.const_value = tensor
        twin.shape = ir.Shape(tensor.shape.numpy())
        twin.type = ir.TensorType(tensor.dtype)
        return twin

    def _shapes(self) -> None:
        """Bring recorded shapes up to date; runtimes insist on those of subgraph inputs."""
        for value, twin in self.twin.pairs():
            dims = self.coupling.dims(value) if value.shape is not None and value not in self.coupling.weights else None
            if dims is None or value.shape is None or len(dims) != len(value.shape):
                continue
            sizes = self.coupling.shapes.shape(value) or [None] * len(dims)
            new = [self._size(*each) for each in zip(value.shape, dims, sizes, strict=True)]
            twin.shape = ir.Shape(new)  # type: ignore[arg-type]  # touched axes are static

    def _size(self, size: int | ir.SymbolicDim, dim: Axis, known: Size | None) -> Size | ir.SymbolicDim:
        """Of one axis of a value. ONNX's inference loses names of axes early, and runtimes fuse less without them."""
        if self._touched(dim):
            return self._new(dim) if isinstance(size, int) else size
        name = None if isinstance(size, int) or size.value else self.names.get(known)
        return size if name is None else ir.SymbolicDim(name)

    def _pinned(self) -> None:
        """Weights computed by a statistic over a pruned axis become initializers."""
        coupling, poison = self.coupling, self.analysis.poison
        statistics = {f.node for f in coupling.relations.flows if self._touched(f.axis) and pinned(coupling, f, poison)}
        statistics |= self._doubled()
        results: list[ir.Value] = []
        behind: set[ir.Value] = set()
        for op in coupling.ops if statistics else ():
            if all(v in coupling.constants for v in op.node.outputs):
                if op.node in statistics or any(v in behind for v in op.node.inputs):
                    behind.update(op.node.outputs)
            else:
                results.extend(v for v in op.node.inputs if v is not None and v in behind and v not in results)
        for value, array in zip(results, computed(coupling.model, results), strict=True):
            dims = coupling.dims(value) or ()
            masks = [self.solution.keep(d, self.kept) if self._touched(d) else None for d in dims]
            sliced = slice_tensor(ir.tensor(array), masks, value.name or "")
            twin = self.twin.value(value)
            twin.replace_all_uses_with(self.twin.constant(sliced, f"{value.name}_spa"))

    # -- sizes read from tensors -------------------------------------------------------------------------------------

    def _shape_readers(self) -> None:
        for op in self.coupling.ops:
            if op.node.op_type not in ("Shape", "Size") or op.node.domain not in ("", "ai.onnx"):
                continue
            source = op.node.inputs[0]
            dims = self.coupling.dims(source) if source is not None else None
            if dims is None or not any(self._touched(d) for d in dims):
                continue
            sizes = [(coefficient(self._old(d)), coefficient(self._new(d))) for d in dims]
            if op.node.op_type == "Shape":
                sizes = sizes[slice(op.attr("start", 0), op.attr("end", None))]
            else:
                sizes = [(int(np.prod([o for o, _ in sizes])), int(np.prod([n for _, n in sizes])))]
            self._restore(op.node, sizes)

    def _restore(self, node: ir.Node, sizes: Sequence[tuple[int, int]]) -> None:
        """Make the readers of a `Shape` node see the original sizes."""
        output = node.outputs[0]
        if self._fold(output):
            return
        restored: ir.Value | None = None
        for consumer, slot in list(output.uses()):
            folded = [self._fold(v) for v in consumer.outputs]
            if all(folded):
                continue
            if restored is None:
                restored = self._scaled(self.twin.value(output), [n for _, n in sizes], [o for o, _ in sizes])
            self.twin.node(consumer).replace_input_with(slot, restored)
        if output.is_graph_output():
            twin = self.twin.value(output)
            if restored is None:
                restored = self._scaled(twin, [n for _, n in sizes], [o for o, _ in sizes])
            self.twin.publish(twin, restored)

    def _fold(self, value: ir.Value) -> bool:
        """Replace a value that is known before run time by a constant; False if it is not."""
        known = self.coupling.shapes.const(value)
        if known is None or not all(isinstance(v, (int, np.integer, np.bool_, bool)) for v in known.reshape(-1)):
            return False
        dtype = self.coupling.shapes.dtype(value) or ir.DataType.INT64
        tensor = ir.tensor(np.array(known.tolist()).reshape(known.shape).astype(dtype.numpy()))
        twin = self.twin.value(value)
        constant = self.twin.constant(tensor, f"{value.name}_spa")
        if twin.is_graph_output():
            self.twin.publish(twin, self.twin.after(twin, "Identity", [constant]))
        twin.replace_all_uses_with(constant)
        return True

    def _scaled(self, value: ir.Value, divide: Sequence[int], multiply: Sequence[int]) -> ir.Value:
        """value / divide * multiply, entry by entry, in exact integers."""
        scalar = self.twin.rank_zero(value)
        for op_type, numbers in (("Div", divide), ("Mul", multiply)):
            array = np.array(numbers[0] if scalar else list(numbers), dtype=np.int64)
            constant = self.twin.constant(ir.tensor(array), f"{value.name}_{op_type.lower()}")
            value = self.twin.after(value, op_type, [value, constant])
        return value

    # -- numbers in attributes and operands --------------------------------------------------------------------------

    def _old(self, *axes: Axis) -> Size:
        return _total(self.solution.size(a, self.old) for a in axes)

    def _new(self, *axes: Axis) -> Size:
        return _total(self.solution.size(a, self.new) for a in axes)

    def _pins(self) -> None:
        for pin in self.coupling.relations.pins:
            if not self._touched(pin.axis):
                continue
            node = self.twin.node(pin.node)
            if isinstance(pin.slot, int):
                value = self.twin.constant(ir.tensor(np.array(pin.value)), f"{node.name}_pinned")
                if pin.slot >= len(node.inputs):
                    node.resize_inputs(pin.slot + 1)
                node.replace_input_with(pin.slot, value)
            elif isinstance(pin.value, tuple):
                node.attributes[pin.slot] = ir.AttrInt64s(pin.slot, pin.value)
            else:
                node.attributes[pin.slot] = ir.AttrFloat32(pin.slot, pin.value)

    def _edits(self) -> None:
        slots: dict[tuple[ir.Node, str | int], list[Edit]] = {}
        for edit in self.coupling.relations.edits:
            slots.setdefault((edit.node, edit.slot), []).append(edit)
        for (node, slot), edits in slots.items():
            if not any(self._touched(a) for e in edits for a in (*e.axes, *e.watch)):
                continue
            if isinstance(slot, str):
                self._edit_attribute(self.twin.node(node), slot, edits)
            else:
                self._edit_operand(node, slot, edits)

    def _edit_attribute(self, node: ir.Node, name: str, edits: Sequence[Edit]) -> None:
        if edits[0].entry is None:
            node.attributes[name] = ir.AttrInt64(name, _int(self._new(*edits[0].axes)))
            return
        attribute = node.attributes.get(name)
        entries = list(attribute.as_ints()) if attribute is not None else [0] * len(edits)
        for edit in edits:
            entries[edit.entry or 0] = _int(self._new(*edit.axes))
        node.attributes[name] = ir.AttrInt64s(name, entries)

    def _edit_operand(self, node: ir.Node, slot: int, edits: Sequence[Edit]) -> None:
        twin = self.twin.node(node)
        if slot >= len(node.inputs) or node.inputs[slot] is None:
            # an implicit equal split becomes explicit
            sizes = [_int(self._new(*e.axes)) for e in sorted(edits, key=lambda e: e.entry or 0)]
            if slot >= len(twin.inputs):
                twin.resize_inputs(slot + 1)
            constant = self.twin.constant(ir.tensor(np.array(sizes, dtype=np.int64)), f"{node.name}_sizes")
            twin.replace_input_with(slot, constant)
            twin.attributes.pop("num_outputs", None)
            return
        original, current = node.inputs[slot], twin.inputs[slot]
        assert original is not None
        assert current is not None
        entries = {e.entry or 0: (self._old(*e.axes), self._new(*e.axes)) for e in edits}
        twin.replace_input_with(slot, self._patched(original, current, entries))

    def _patched(self, original: ir.Value, current: ir.Value, entries: Mapping[int, tuple[Size, Size]]) -> ir.Value:
        """The shape operand `current` (a copy of `original`) with some entries set from old to new sizes."""
        known = self.coupling.shapes.const(original)
        if known is None or not _all_known(known):
            entries = {k: sizes for k, sizes in entries.items() if sizes[0] != sizes[1]}
        if not entries:
            return current
        key = (original, current, *sorted((k, str(old), str(new)) for k, (old, new) in entries.items()))
        if key not in self._made:
            self._made[key] = self._edited(original, current, entries)
        return self._made[key]

    def _edited(self, original: ir.Value, current: ir.Value, entries: Mapping[int, tuple[Size, Size]]) -> ir.Value:
        known = self.coupling.shapes.const(original)
        if known is not None and _all_known(known):
            values = np.array([int(v) for v in known.reshape(-1)], dtype=np.int64)
            for k, (_, new) in entries.items():
                values[k] = _int(new)
            dtype = self.coupling.shapes.dtype(original) or ir.DataType.INT64
            array = values.reshape(known.shape).astype(dtype.numpy())
            return self.twin.constant(ir.tensor(array), f"{original.name}_spa")
        producer, twin = original.producer(), current.producer()
        if producer is not None and twin is not None and producer.op_type == twin.op_type == "Concat":
            return self._patched_concat(producer, twin, entries, current)
        count = 1 if known is None else known.size
        count = max(count, *(k + 1 for k in entries))
        divide, multiply = [1] * count, [1] * count
        for k, (old, new) in entries.items():
            divide[k], multiply[k] = coefficient(old), coefficient(new)
        return self._scaled(current, divide, multiply)

    def _patched_concat(
        self, producer: ir.Node, twin: ir.Node, entries: Mapping[int, tuple[Size, Size]], current: ir.Value
    ) -> ir.Value:
        """Edit the pieces of a concatenated shape."""
        pieces: list[ir.Value | None] = []
        start = 0
        for original, piece in zip(producer.inputs, twin.inputs, strict=True):
            shape = self.coupling.shapes.shape(original) if original is not None else None
            width = int(shape[0]) if shape is not None and is_static(shape[0]) else 1
            inside = {k - start: sizes for k, sizes in entries.items() if start <= k < start + width}
            assert original is not None
            assert piece is not None
            pieces.append(self._patched(original, piece, inside) if inside else piece)
            start += width
        return self.twin.after(current, "Concat", pieces, [ir.AttrInt64("axis", 0)])

    # -- positions ---------------------------------------------------------------------------------------------------

    def _remap(self, remap: Remap) -> None:
        node = self.twin.node(remap.node)
        source, target = self.solution.keep(remap.source, self.kept), self.solution.keep(remap.target, self.kept)
        rank = np.cumsum(source) - 1
        if remap.slot >= 0:
            value = remap.node.inputs[remap.slot]
            known = self.coupling.shapes.const(value) if value is not None else None
            assert known is not None
            assert value is not None
            old = np.array([int(v) % len(source) for v in known.reshape(-1)], dtype=np.int64)
            array = rank[old[target]].reshape(-1, *known.shape[1:])
            node.replace_input_with(remap.slot, self.twin.constant(ir.tensor(array), f"{value.name}_spa"))
            return
        # a strided Slice keeps its survivors as a Gather
        starts, axes, steps = (self._numbers(remap.node, s) for s in (1, 3, 4))
        axis = axes[0] if axes else 0
        ends = self._numbers(remap.node, 2)
        step = steps[0]
        stop = None if step < 0 and ends[0] < -len(source) else ends[0]
        old = np.array(range(len(source))[slice(starts[0], stop, step)], dtype=np.int64)
        data = node.inputs[0]
        assert data is not None
        index = self.twin.constant(ir.tensor(rank[old[target]]), f"{node.name}_index")
        gathered = self.twin.after(data, "Gather", [data, index], [ir.AttrInt64("axis", axis)], before=node)
        self.twin.publish(node.outputs[0], gathered)
        node.outputs[0].replace_all_uses_with(gathered)

    def _numbers(self, node: ir.Node, slot: int) -> list[int]:
        value = node.inputs[slot] if slot < len(node.inputs) else None
        known = self.coupling.shapes.const(value) if value is not None else None
        return [] if known is None else [int(v) for v in known.reshape(-1)]


def _all_known(values: NDArray[Any]) -> bool:
    return all(isinstance(v, (int, np.integer)) for v in values.reshape(-1))


def _total(sizes: Iterable[Size]) -> Size:
    total: Size = 0
    for size in sizes:
        total = total + size
    return total


def _int(size: Size) -> int:
    assert isinstance(size, int), size
    return size


def slice_tensor(tensor: ir.TensorProtocol, masks: Sequence[Mask | None], name: str) -> ir.TensorProtocol:
    """`tensor` with only the positions in `masks` (per axis, None keeps all); read and cut when it is written."""
    picks = [(axis, np.flatnonzero(mask)) for axis, mask in enumerate(masks) if mask is not None and not mask.all()]
    return picked(tensor, picks, name)
