"""A copy of a model to edit, and what a model computes from its weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


class Twin:
    """A copy of a model to edit, with a map from the original's nodes and values to the copy's."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self._nodes: dict[ir.Node, ir.Node] = {}
        self._values: dict[ir.Value, ir.Value] = {}
        self._names: set[str] = set()
        self.made: dict[ir.Value, ir.TensorProtocol] = {}
        """New constants and what they held at first."""
        self._pair(model.graph, self.model.graph)

    def _pair(self, a: ir.Graph, b: ir.Graph) -> None:
        self._values.update(zip(a.inputs, b.inputs, strict=True))
        for name, value in a.initializers.items():
            self._values[value] = b.initializers[name]
        for x, y in zip(a, b, strict=True):
            self._nodes[x] = y
            self._values.update(zip(x.outputs, y.outputs, strict=True))
            for name, attribute in x.attributes.items():
                if attribute.type == ir.AttributeType.GRAPH:
                    self._pair(attribute.as_graph(), y.attributes[name].as_graph())
        self._names.update(v.name or "" for v in self._values)

    def node(self, node: ir.Node) -> ir.Node:
        """The copy of a node."""
        return self._nodes[node]

    def value(self, value: ir.Value) -> ir.Value:
        """The copy of a value."""
        return self._values[value]

    def pairs(self) -> Iterable[tuple[ir.Value, ir.Value]]:
        """(value, its copy) for all values."""
        return self._values.items()

    def sweep(self, nodes: Sequence[ir.Node]) -> None:
        """Take out those of `nodes` whose results nobody reads, and the initializers that only they read."""
        graph = self.model.graph
        for node in reversed([self._nodes[n] for n in nodes]):
            if node.graph is graph and not any(v.is_graph_output() or v.uses() for v in node.outputs):
                sources = [v for v in node.inputs if v is not None]
                graph.remove(node, safe=True)
                for value in sources:
                    name = value.name or ""
                    idle = not (value.uses() or value.is_graph_output() or value.is_graph_input())
                    if idle and graph.initializers.get(name) is value:
                        del graph.initializers[name]

    def fresh(self, hint: str) -> str:
        """A name no value has yet."""
        name, k = hint, 1
        while name in self._names:
            k += 1
            name = f"{hint}{k}"
        self._names.add(name)
        return name

    def constant(self, tensor: ir.TensorProtocol, hint: str) -> ir.Value:
        """A new constant in the main graph, visible in all subgraphs.

        Before IR version 4 an initializer would also have to be a graph input, so it is a `Constant` node there.
        """
        graph = self.model.graph
        name = self.fresh(hint)
        if self.model.ir_version >= 4:
            value = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
            )
            graph.register_initializer(value)
            self.made[value] = tensor
            return value
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1, name=name)
        node.outputs[0].name = name
        first = next(iter(graph), None)
        if first is None:
            graph.append(node)
        else:
            graph.insert_before(first, node)
        self.made[node.outputs[0]] = tensor
        return node.outputs[0]

    def after(
        self,
        value: ir.Value,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        before: ir.Node | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """A new node right behind the producer of `value` (or before `before`); returns its first output."""
        name = self.fresh(f"{value.name}_{op_type.lower()}_spa")
        node = ir.Node(domain, op_type, inputs, attributes, num_outputs=outputs, name=name)
        for k, output in enumerate(node.outputs):
            output.name = name if k == 0 else self.fresh(f"{name}_{k}")
        producer = value.producer()
        if before is not None:
            assert before.graph is not None
            before.graph.insert_before(before, node)
        elif producer is not None and producer.graph is not None:
            producer.graph.insert_after(producer, node)
        else:
            graph = value.graph if isinstance(value.graph, ir.Graph) else self.model.graph
            graph.insert_before(next(iter(graph)), node)
        return node.outputs[0]

    def publish(self, old: ir.Value, new: ir.Value) -> None:
        """Where `old` is an output of its graph, let `new` take its place and its name."""
        graph = old.graph
        if not isinstance(graph, ir.Graph) or not old.is_graph_output():
            return
        for k, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[k] = new
        name, old.name = old.name, self.fresh(f"{old.name}_unread")
        new.name, new.type = name, old.type

    def rank_zero(self, value: ir.Value) -> bool:
        """Whether a value is known to be a scalar."""
        return value.shape is not None and len(value.shape) == 0


def computed(model: ir.Model, values: Sequence[ir.Value]) -> list[NDArray[Any]]:
    """The values that a model computes from its initializers alone."""
    if not values:
        return []
    from onnx.reference import ReferenceEvaluator  # rarely needed, slow to import

    twin = Twin(model)
    graph = twin.model.graph
    graph.inputs.clear()
    graph.outputs.clear()
    graph.outputs.extend(twin.value(v) for v in values)
    twin.sweep(list(model.graph))
    return list(ReferenceEvaluator(ir.to_proto(twin.model)).run(None, {}))
