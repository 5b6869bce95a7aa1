"""`explain` against models whose answer is known, and the coupling graph against the solver."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import onnx
import pytest
from onnx import helper

import spa
from spa.explain import AxisExplanation, Place, coupling_graph, explain, inspection
from spa.groups import Analysis
from tests.small_models import attention, build, cnn, custom, stuck, weight


def axis(source: Analysis | onnx.ModelProto, tensor: str, number: int) -> AxisExplanation:
    return next(a for a in explain(source, tensor).axes if a.axis == number)


def test_a_prunable_axis_names_its_group_and_everything_it_is_coupled_with() -> None:
    found = axis(cnn(), "depth.weight", 0)
    assert found.prunable
    assert not found.frozen
    assert [(g.name, g.kind, g.units, g.exact) for g in found.groups] == [("expand:channel", "channel", 32, True)]
    coupled = {(c.tensor, c.axis): c.role for c in found.coupled}
    assert coupled == {
        ("expand.weight", 0): "out",
        ("expand.bias", 0): "out",
        ("depth.bias", 0): "out",
        ("project.weight", 1): "in",
        ("expand", 1): "activation",
        ("expand_relu", 1): "activation",
        ("depth", 1): "activation",
        ("depth_relu", 1): "activation",
    }


def test_a_residual_stream_is_coupled_across_both_of_its_writers() -> None:
    coupled = {(c.tensor, c.axis) for c in axis(cnn(), "project.weight", 0).coupled}
    assert {("stem.weight", 0), ("bn.scale", 0), ("expand.weight", 1), ("fc.weight", 1)} <= coupled


def test_an_input_axis_is_frozen_with_the_path_to_it() -> None:
    (frozen,) = axis(cnn(), "stem.weight", 1).frozen
    assert (frozen.reason, frozen.operator) == ("graph input", "")
    assert [(s.operator, s.node, s.tensor, s.axis) for s in frozen.path] == [("Conv", "stem", "x", 1)]


def test_the_path_is_the_shortest_one() -> None:
    (frozen,) = axis(attention(), "down.weight", 1).frozen
    assert frozen.reason == "graph input"
    assert [s.node for s in frozen.path] == ["down", "residual2", "residual"]
    assert (frozen.path[-1].tensor, frozen.path[-1].axis) == ("x", 2)


def test_where_it_was_frozen_needs_no_path() -> None:
    (frozen,) = axis(cnn(), "stem.weight", 2).frozen
    assert (frozen.operator, frozen.node, frozen.path) == ("Conv", "stem", ())


def test_an_unknown_operator_is_named_with_the_way_to_it() -> None:
    (frozen,) = axis(custom(), "b", 1).frozen
    assert "acme::Mystery" in frozen.reason
    assert (frozen.operator, frozen.node) == ("Mystery", "mystery")
    assert [(s.node, s.tensor, s.axis) for s in frozen.path] == [("second", "h3", 1)]


def test_activations_inputs_and_outputs_can_be_asked_for() -> None:
    analysis = spa.analyze(cnn())
    assert explain(analysis, "depth_relu").role == "activation"
    assert axis(analysis, "depth_relu", 1).prunable
    assert explain(analysis, "x").role == "input"
    assert not axis(analysis, "x", 1).prunable
    out = explain(analysis, "y")
    assert (out.role, out.shape) == ("output", ("batch", 10))
    assert {f.reason for f in axis(analysis, "y", 1).frozen} == {"graph output"}


def test_only_the_position_of_an_axis_is_said_to_be_so() -> None:
    (frozen,) = axis(cnn(), "depth.weight", 1).frozen
    assert frozen.reason == "the only position of an axis"


def test_a_constant_whose_uses_were_separated_is_explained_per_use() -> None:
    """Two unrelated layers share one bias, as exporters do that merge equal constants."""
    import numpy as np

    rng = np.random.default_rng(0)
    w = {"a": weight(rng, 8, 16), "b": weight(rng, 16, 16), "c": weight(rng, 16, 4), "shared": np.zeros(16, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h0"], "first"),
        helper.make_node("Add", ["h0", "shared"], ["h1"], "bias1"),
        helper.make_node("MatMul", ["h1", "b"], ["h2"], "second"),
        helper.make_node("Add", ["h2", "shared"], ["h3"], "bias2"),
        helper.make_node("MatMul", ["h3", "c"], ["y"], "third"),
    ]
    model = build(nodes, w, {"x": ["n", 8]}, {"y": ["n", 4]})
    found = explain(model, "shared").axes
    assert [(a.consumer, a.groups[0].name) for a in found] == [("h1", "first:neuron"), ("h3", "second:neuron")]


def test_positions_picked_by_constant_indices_are_coupled() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    w = {"a": weight(rng, 8, 6), "order": np.array([5, 0, 3]), "b": weight(rng, 3, 4)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h0"], "first"),
        helper.make_node("Gather", ["h0", "order"], ["h1"], "pick", axis=1),
        helper.make_node("MatMul", ["h1", "b"], ["y"], "second"),
    ]
    model = build(nodes, w, {"x": ["n", 8]}, {"y": ["n", 4]})
    assert ("b", 0) in {(c.tensor, c.axis) for c in axis(model, "a", 1).coupled}
    frozen = [nodes[0], helper.make_node("Gather", ["h0", "order"], ["y"], "pick", axis=1)]
    model = build(frozen, w, {"x": ["n", 8]}, {"y": ["n", 3]})
    paths = [[(s.node, s.tensor, s.axis) for s in f.path] for f in axis(model, "a", 1).frozen]
    assert [("first", "h0", 1), ("pick", "y", 1)] in paths


@pytest.mark.parametrize(
    ("name", "hint"),
    [("stem.weigth", "did you mean 'stem.weight'"), ("fc", "'fc.weight'"), ("%%", "spa inspect"), ("", "spa inspect")],
)
def test_an_unknown_tensor_is_refused_with_the_closest_names(name: str, hint: str) -> None:
    with pytest.raises(spa.UsageError, match="tensor") as caught:
        explain(cnn(), name)
    assert hint in str(caught.value)


def test_explanations_are_plain_json() -> None:
    import json

    body = json.loads(json.dumps(explain(cnn(), "stem.weight").to_json()))
    assert body["tensor"] == "stem.weight"
    assert body["shape"] == [16, 3, 3, 3]
    assert set(body["axes"][0]) == {"axis", "size", "consumer", "prunable", "groups", "frozen", "coupled", "note"}
    assert body["axes"][1]["frozen"][0]["path"] == [{"operator": "Conv", "node": "stem", "tensor": "x", "axis": 1}]


def test_inspection_agrees_with_the_analysis() -> None:
    analysis = spa.analyze(cnn())
    body = inspection(analysis)
    assert body["parameters"] == sum(t.size for v, t in analysis.coupling.weights.items())
    assert [g["name"] for g in body["groups"]] == [g.name for g in analysis.groups]
    assert {f["tensor"] for f in body["frozen"]} >= {"stem.weight", "fc.weight", "fc.bias"}


# -- the coupling graph against the solver ---------------------------------------------------------------------------


def check_graph(analysis: Analysis) -> None:
    """What the solver joined, the nodes join: for every group, all of its members are connected by the edges that carry
    its index spaces; and no such edge leads out of it.
    """
    graph = coupling_graph(analysis)
    leaves_of = nx.get_node_attributes(graph, "leaves")
    for group in analysis.groups:
        spaces = set(group.leaves)
        inside = {place for place, leaves in leaves_of.items() if not spaces.isdisjoint(leaves)}
        edges = [(a, b) for a, b, leaves in graph.edges(data="leaves") if not spaces.isdisjoint(leaves)]
        assert all(not spaces.isdisjoint(leaves_of[a] | leaves_of[b]) for a, b in edges)
        part = nx.Graph(edges)
        part.add_nodes_from(inside)
        members = {Place(m.value, m.axis, m.use) for m in group.members if Place(m.value, m.axis, m.use) in leaves_of}
        assert members
        components = [c for c in nx.connected_components(part) if c & members]
        assert len(components) == 1, f"{group.name} falls into {len(components)} parts"


def check_leaves(analysis: Analysis) -> None:
    """Restricted to one prunable index space that no picking joins with others, the graph is connected."""
    solution = analysis.coupling.solution
    graph = coupling_graph(analysis)
    carriers: dict[int, list[Place]] = {}
    for place, leaves in graph.nodes(data="leaves"):
        for leaf in leaves:
            carriers.setdefault(leaf, []).append(place)
    own = {leaf for g in analysis.groups if len(g.leaves) == 1 for leaf in g.leaves}
    for leaf in own & carriers.keys():
        if solution.label[solution.base[leaf]] == solution.base[leaf]:
            part = nx.Graph((a, b) for a, b, leaves in graph.edges(carriers[leaf], data="leaves") if leaf in leaves)
            part.add_nodes_from(carriers[leaf])
            assert set(part) == set(carriers[leaf])
            assert nx.is_connected(part)


@pytest.mark.parametrize("make", [cnn, attention, custom, stuck])
def test_the_coupling_graph_agrees_with_the_solver(make: object) -> None:
    assert callable(make)
    analysis = spa.analyze(make())
    check_graph(analysis)
    check_leaves(analysis)


@pytest.mark.slow
def test_the_coupling_graph_agrees_with_the_solver_on_recorded_models(data_root: Path) -> None:
    seen = 0
    for path in sorted((data_root / "zoo").glob("*.onnx")):
        try:
            analysis = spa.analyze(path)
        except spa.ModelError:
            continue
        check_graph(analysis)
        check_leaves(analysis)
        seen += 1
    assert seen


@pytest.mark.slow
def test_every_frozen_axis_of_recorded_models_has_a_way_to_the_border(data_root: Path) -> None:
    for path in sorted((data_root / "zoo").glob("*_ts.onnx")):
        analysis = spa.analyze(path)
        for frozen in analysis.frozen:
            for found in explain(analysis, frozen.tensor).axes:
                for part in found.frozen:
                    if part.reason in ("graph input", "graph output"):
                        assert part.path, f"{path.name}: {frozen.tensor} axis {found.axis}"
