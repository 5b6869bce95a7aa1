"""Parts of a model: whatever computes some of its values from others, as a model of its own.

Statistics are gathered along a model layer by layer. A segment runs only from the values that are at hand (a cut
through the graph) to those that are asked for, with weights as they are by then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from spa.errors import UnsupportedModelError
from spa.executors.fused import linear_part
from spa.inference import children
from spa.runtime import Provider, Session, Value, open_session, place, run_values
from spa.store import to_proto

Feeds = Mapping[str, NDArray[Any]]
_ELEMENTS = {
    "tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(uint16)": 4, "tensor(int16)": 5,
    "tensor(int32)": 6, "tensor(int64)": 7, "tensor(string)": 8, "tensor(bool)": 9, "tensor(float16)": 10,
    "tensor(double)": 11, "tensor(uint32)": 12, "tensor(uint64)": 13, "tensor(bfloat16)": 16,
}  # fmt: skip
"""ONNX Runtime's names of element types -> `onnx.TensorProto.DataType`."""


@dataclass
class Segments:
    """A model whose parts can be run, with weights that may be exchanged between runs."""

    proto: onnx.ModelProto
    provider: Provider = "cpu"
    threads: int = 0
    overrides: dict[str, onnx.TensorProto] = field(default_factory=dict)
    """Tensors that replace initializers of `proto`, or its `Constant` nodes."""

    def __post_init__(self) -> None:
        graph = self.proto.graph
        self.initializers = {t.name: t for t in graph.initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.initializers]
        self.outputs = [o.name for o in graph.output]
        self.producer = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
        self.reads = [tuple(dict.fromkeys(reads(node))) for node in graph.node]
        infos = (*graph.input, *graph.value_info, *graph.output)
        self.types = {i.name: i.type.tensor_type.elem_type for i in infos if i.type.HasField("tensor_type")}
        self._asked = False
        self.constant = set(self.initializers)
        for k, node in enumerate(graph.node):
            if all(name in self.constant for name in self.reads[k]) and not node.op_type.startswith("Random"):
                self.constant.update(node.output)
        self.last: dict[str, int] = dict.fromkeys(self.outputs, len(graph.node))
        for k, names in enumerate(self.reads):
            for name in names:
                self.last[name] = max(self.last.get(name, -1), k)

    @staticmethod
    def of(model: ir.Model, provider: Provider = "cpu", threads: int = 0) -> Segments:
        """The parts of a model; it is copied. Linear parts of fused operators can be asked for (`fused.SUFFIX`)."""
        proto = to_proto(model)
        nodes = [(linear_part(node), node) for node in proto.graph.node]
        if any(linear for linear, _ in nodes):
            del proto.graph.node[:]
            for linear, node in nodes:
                proto.graph.node.extend([*linear, node])
        return Segments(proto, provider, threads)

    def override(self, name: str, array: NDArray[Any]) -> None:
        """Exchange an initializer or what a `Constant` node holds; its type stays."""
        dtype = ir.DataType(self._constant_type(name)).numpy()
        self.overrides[name] = ir.to_proto(ir.tensor(array.astype(dtype), name=name))

    def _constant_type(self, name: str) -> int:
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        attributes = self.proto.graph.node[self.producer[name]].attribute
        return next((a.t.data_type for a in attributes if a.HasField("t")), onnx.TensorProto.FLOAT)

    def live(self, position: int) -> list[str]:
        """Values that nodes before `position` (or the graph's inputs) give to nodes from there on."""
        made = [(name, -1) for name in self.inputs] + list(self.producer.items())
        return [n for n, k in made if k < position <= self.last.get(n, -1) and n not in self.constant]

    def extract(self, wanted: Sequence[str], at_hand: Collection[str]) -> tuple[onnx.ModelProto, list[str]]:
        """A model that computes `wanted`, and which of `at_hand` it reads.

        Raises:
            UnsupportedModelError: a value at the cut has no known type.
        """
        nodes, needed, constants = set[int](), dict[str, None](), set[str]()
        todo = list(wanted)
        seen = set[str]()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in at_hand or name in self.inputs:
                needed[name] = None
            elif name in self.initializers or name in self.overrides:
                constants.add(name)
            elif name in self.producer:
                k = self.producer[name]
                nodes.add(k)
                todo.extend(self.reads[k])
        out = onnx.ModelProto(ir_version=self.proto.ir_version)
        out.opset_import.extend(self.proto.opset_import)
        out.graph.name = "segment"
        for k in sorted(nodes):
            out.graph.node.add().CopyFrom(self.proto.graph.node[k])
        for name in constants:
            out.graph.initializer.add().CopyFrom(self.overrides.get(name) or self.initializers[name])
        if self.proto.ir_version < 4:  # then initializers had to be inputs
            out.ir_version = 4
        if not self._asked and not all(self.types.get(name) for name in needed):
            self._asked = True
            self._learn_types()
        for name in needed:
            if not self.types.get(name):
                raise UnsupportedModelError(f"the type of {name!r} is not known, so that no statistics can be taken")
            info = out.graph.input.add(name=name)
            info.type.tensor_type.elem_type = self.types[name]
        for name in wanted:
            out.graph.output.add(name=name)
        return out, list(needed)

    def _learn_types(self) -> None:
        """Ask ONNX Runtime for the types of values behind operators that shape inference does not know."""
        names = [name for name in self.producer if not self.types.get(name)]
        at_hand = [name for name in self.inputs if self.types.get(name)]
        proto, _ = self.extract(names, at_hand)
        session = open_session(
            proto.SerializeToString(), provider="cpu", threads=self.threads, optimize=False, arena=False
        )
        for arg in session.get_outputs():
            self.types[arg.name] = _ELEMENTS.get(arg.type, 0)

    def runner(self, wanted: Iterable[str], at_hand: Collection[str], *, optimize: bool = False) -> Runner:
        """Ready to compute `wanted` from `at_hand`, batch after batch; optimising pays where few values are wanted."""
        names = list(dict.fromkeys(wanted))
        passing = [n for n in names if n in at_hand or n in self.inputs or n in self.initializers]
        computed = [n for n in names if n not in set(passing)]
        session, reads_ = None, list[str]()
        if computed:
            proto, reads_ = self.extract(computed, at_hand)
            session = open_session(
                proto.SerializeToString(), provider=self.provider, threads=self.threads, optimize=optimize, arena=False
            )
        return Runner(session, reads_, computed, [n for n in passing if n not in self.initializers])


@dataclass(frozen=True)
class Runner:
    """One segment, opened."""

    session: Session | None
    reads: Sequence[str]
    computed: Sequence[str]
    passing: Sequence[str]

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The wanted values of one batch."""
        out = {name: values[name] for name in self.passing}
        if self.session is not None:
            out.update(run_values(self.session, {n: values[n] for n in self.reads}, self.computed))
        return out


def reads(node: onnx.NodeProto) -> list[str]:
    """Values that a node reads, those that its subgraphs capture included."""
    out = [name for name in node.input if name]
    for child in children(node):
        inner = {i.name for i in child.input} | {t.name for t in child.initializer}
        for sub in child.node:
            out.extend(name for name in reads(sub) if name not in inner)
            inner.update(sub.output)
        out.extend(o.name for o in child.output if o.name not in inner)
    return out


def placed(batch: Feeds) -> dict[str, Value]:
    """A batch, handed to ONNX Runtime."""
    return {name: place(np.ascontiguousarray(array)) for name, array in batch.items()}
