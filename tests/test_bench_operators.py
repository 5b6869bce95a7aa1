"""Time per operator: what ONNX Runtime executes, what it fused, in runs that are not the timed ones."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from spa.bench import BenchReport, OperatorTime, Profile, operator_remarks, operator_tables, sweep
from spa.bench.operators import profile
from tests.small_models import cnn


def model_of(nodes: list[onnx.NodeProto], functions: list[onnx.FunctionProto] | None = None) -> bytes:
    """`x` [n, 16] -> `y`, with weights `w` [16, 16] and `b` [16]."""
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w", (16, 16)), ("b", (16,)))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)
    return bytes(model.SerializeToString())


X = {"x": np.ones((2, 16), np.float32)}


def rows(found: Profile) -> dict[str, OperatorTime]:
    return {row.operator: row for row in found.operators}


def test_a_fused_operator_is_named_and_so_is_what_is_gone() -> None:
    found = profile(
        model_of([helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]), X
    )
    by_name = rows(found)
    assert {name: (row.nodes, row.in_file) for name, row in by_name.items()} == {
        "FusedGemm": (1, 0),
        "Gemm": (0, 1),
        "Relu": (0, 1),
    }
    assert by_name["FusedGemm"].ms > 0 == by_name["Relu"].ms
    assert found.runs == 5


def test_every_node_counts_also_without_a_name() -> None:
    """Five sines in a row, none of them named: ONNX Runtime makes names up."""
    tensors = ["x", "h1", "h2", "h3", "h4", "y"]
    found = profile(model_of([helper.make_node("Sin", [a], [b]) for a, b in itertools.pairwise(tensors)]), X)
    assert rows(found)["Sin"].nodes == rows(found)["Sin"].in_file == 5
    assert len(found.nodes) == len({node.name for node in found.nodes}) == 5
    assert sum(node.ms for node in found.nodes) == pytest.approx(rows(found)["Sin"].ms)


def test_operators_of_functions_and_branches_are_in_the_file() -> None:
    body = helper.make_function(
        "own", "twice", ["a"], ["c"],
        [helper.make_node("Sin", ["a"], ["b"]), helper.make_node("Sin", ["b"], ["c"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["h"], [f"{op}_y"])], op, [], [helper.make_tensor_value_info(f"{op}_y", 1, None)]
        )
        for op in ("Cos", "Tan")
    ]
    yes = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5]))
    nodes = [
        helper.make_node("twice", ["x"], ["h"], domain="own"),
        yes,
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "yes"], ["more"]),
        helper.make_node("If", ["more"], ["y"], then_branch=branch[0], else_branch=branch[1]),
    ]
    counts = {name: (row.nodes, row.in_file) for name, row in rows(profile(model_of(nodes, [body]), X)).items()}
    assert counts["Sin"] == (2, 2)
    assert (counts["Cos"], counts["Tan"]) == ((1, 1), (0, 1))
    assert "twice" not in counts
    assert "Constant" not in counts


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> BenchReport:
    folder = tmp_path_factory.mktemp("operators")
    onnx.save(cnn(), folder / "cnn.onnx")
    onnx.save(cnn(1), folder / "other.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (found,) = sweep(
            [folder / "cnn.onnx", folder / "other.onnx"], ["cnn", "other"],
            provider="cpu", threads=(1,), batches=(2,), repeats=5, memory=False, operators=True,
        )  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["cnn.onnx", "other.onnx"]  # traces are gone
    return found


def test_all_nodes_of_the_file_are_accounted_for(report: BenchReport) -> None:
    written = Counter(node.op_type for node in cnn().graph.node)
    for model in report.models:
        found = model.profile
        assert found is not None
        assert {row.operator: row.in_file for row in found.operators if row.in_file} == written
        assert sum(row.ms for row in found.operators) == pytest.approx(sum(node.ms for node in found.nodes))
        for row in found.operators:
            assert row.nodes == sum(node.operator == row.operator for node in found.nodes)
        assert [node.ms for node in found.nodes] == sorted((node.ms for node in found.nodes), reverse=True)
        assert found.runs == 50  # as often as fast models may be
    plain = report.to_json()["models"][0]["profile"]
    assert set(plain["operators"][0]) == {"operator", "ms", "nodes", "in_file"}
    assert set(plain["nodes"][0]) == {"name", "operator", "ms"}


def test_tables_of_operators(report: BenchReport) -> None:
    console = Console(width=200, record=True, file=sys.stderr)
    for table in operator_tables(report):
        console.print(table)
    text = console.export_text()
    assert "time per operator: batch 2, threads 1, 50 profiled runs" in text
    profiles = [model.profile for model in report.models]
    for found in profiles:
        assert found is not None
        for row in found.operators:
            line = next((line for line in text.splitlines() if line.startswith(f"│ {row.operator} ")), None)
            assert (line is not None) == (row.nodes > 0)
            assert line is None or (f"{row.operator} *" in line) == (row.in_file == 0)
    gone = operator_remarks(report)
    assert len(gone) == 2
    assert gone[0].startswith("cnn: fused into others")
    assert "4 Relu" in gone[0]


def test_nothing_is_shown_where_nothing_was_profiled() -> None:
    (found,) = sweep(
        [model_of([helper.make_node("Sin", ["x"], ["y"])])], ["m"], provider="cpu", repeats=5, memory=False
    )
    assert found.models[0].profile is None
    assert operator_tables(found) == operator_remarks(found) == []
