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
from spa.external import Weights, placeholder
from spa.inference import children
from spa.runtime import LENT, Provider, Session, Value, open_session, place, run_values
from spa.shelf import Shelf
from spa.store import fill, heavy, light

Feeds = Mapping[str, NDArray[Any]]
_ELEMENTS = {
    "tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(uint16)": 4, "tensor(int16)": 5,
    "tensor(int32)": 6, "tensor(int64)": 7, "tensor(string)": 8, "tensor(bool)": 9, "tensor(float16)": 10,
    "tensor(double)": 11, "tensor(uint32)": 12, "tensor(uint64)": 13, "tensor(bfloat16)": 16,
}  # fmt: skip
"""ONNX Runtime's names of element types -> `onnx.TensorProto.DataType`."""
LARGE = 512 << 20
"""Bytes of weights above which sessions read them where they are, and are not optimised."""


@dataclass
class Segments:
    """A model whose parts can be run, with weights that may be exchanged between runs."""

    proto: onnx.ModelProto
    """Light: large tensors are placeholders (`spa.external`), so that no weight is held twice."""
    weights: Weights
    """What the placeholders stand for."""
    provider: Provider = "cpu"
    threads: int = 0
    overrides: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    """Tensors that replace initializers of `proto`, or its `Constant` nodes."""

    def __post_init__(self) -> None:
        graph = self.proto.graph
        self.initializers = {t.name: t for t in graph.initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.initializers]
        self.outputs = [o.name for o in graph.output]
        self.large = sum(tensor.nbytes for tensor in self.weights) > LARGE
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
        proto, weights = light(model)
        nodes = [(linear_part(node), node) for node in proto.graph.node]
        if any(linear for linear, _ in nodes):
            del proto.graph.node[:]
            for linear, node in nodes:
                proto.graph.node.extend([*linear, node])
        return Segments(proto, weights, provider, threads)

    def override(self, name: str, array: NDArray[Any] | ir.TensorProtocol) -> None:
        """Exchange an initializer or what a `Constant` node holds; its type stays."""
        if isinstance(array, np.ndarray):
            dtype = ir.DataType(self._constant_type(name))
            array = ir.Tensor(array.astype(dtype.numpy()), dtype, name=name)
        self.overrides[name] = array

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
        proto, needed, weights = self._cut(wanted, at_hand)
        fill(proto.graph, weights)
        return proto, needed

    def _cut(self, wanted: Sequence[str], at_hand: Collection[str]) -> tuple[onnx.ModelProto, list[str], Weights]:
        """As `extract`, but with placeholders for `weights`."""
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
        weights = list(self.weights)
        for k in sorted(nodes):
            out.graph.node.add().CopyFrom(self.proto.graph.node[k])
        for name in sorted(constants):
            if name in self.overrides:
                weights.append(self.overrides[name])
                placeholder(out.graph.initializer.add(), weights[-1], len(weights) - 1, name)
            else:
                out.graph.initializer.add().CopyFrom(self.initializers[name])
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
        return out, list(needed), weights

    def _open(
        self, wanted: Sequence[str], at_hand: Collection[str], provider: Provider, optimize: bool
    ) -> tuple[Session, list[str]]:
        """A session that computes `wanted`, and what it reads.

        Weights of large models stay where they are: copies, and copies in float32 of those in float16, would fill the
        memory.
        """
        proto, needed, weights = self._cut(wanted, at_hand)
        lent = heavy(proto.graph, weights) if self.large and provider == "cpu" else {}
        fill(proto.graph, weights, lent)
        shelf = Shelf(LARGE // 4)  # for those that are not in a file, as those of a pruned model
        for tensor in proto.graph.initializer:
            if tensor.name in lent:
                tensor.external_data[0].value = LENT
        session = open_session(
            proto.SerializeToString(),
            provider=provider,
            threads=self.threads,
            optimize=optimize and not lent,
            arena=False,
            repack=not lent,
            weights={name: shelf.keep(np.asarray(tensor.numpy(), order="C")) for name, tensor in lent.items()},
        )
        return session, needed

    def _learn_types(self) -> None:
        """Ask ONNX Runtime for the types of values behind operators that shape inference does not know."""
        names = [name for name in self.producer if not self.types.get(name)]
        at_hand = [name for name in self.inputs if self.types.get(name)]
        session, _ = self._open(names, at_hand, "cpu", optimize=False)
        for arg in session.get_outputs():
            self.types[arg.name] = _ELEMENTS.get(arg.type, 0)

    def runner(self, wanted: Iterable[str], at_hand: Collection[str], *, optimize: bool = False) -> Runner:
        """Ready to compute `wanted` from `at_hand`, batch after batch; optimising pays where few values are wanted."""
        names = list(dict.fromkeys(wanted))
        passing = [n for n in names if n in at_hand or n in self.inputs or n in self.initializers]
        computed = [n for n in names if n not in set(passing)]
        session, reads_ = None, list[str]()
        if computed:
            session, reads_ = self._open(computed, at_hand, self.provider, optimize)
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
