"""Costs are polynomials of the kept sizes: they must equal what is counted on models that were really cut."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import spa
from spa.cost import METRICS, default_dims
from spa.groups import Analysis
from spa.removal import Mask, kept_without
from spa.rewrite import rewritten
from tests import outside
from tests.models import BUILT
from tests.net import feeds, sizes

DIMS = {"n": 3, "t": 6}
COUNTED = [name for name, built in BUILT.items() if built.runtime and name not in ("one_zero_bias", "merged")]


def random_removal(analysis: Analysis, rng: np.random.Generator) -> Mask:
    """Any number of units, from none to all but one, out of every group."""
    removed = []
    for group in analysis.groups:
        count = int(rng.integers(0, group.units))
        removed.append((group, rng.choice(group.units, count, replace=False).tolist()))
    return kept_without(analysis, removed)


@pytest.mark.parametrize("name", COUNTED)
def test_polynomials_equal_counts(name: str) -> None:
    model = BUILT[name].build()
    dims = sizes(model, DIMS)
    analysis = spa.analyze(model, dims=dims)
    inputs = feeds(model, dims=DIMS)
    rng = np.random.default_rng(0)
    for _ in range(3):
        kept = random_removal(analysis, rng)
        counts = [n if isinstance(n, int) else full for n, full in
                  zip(analysis.coupling.solution.counts(kept), analysis.cost.full, strict=True)]  # fmt: skip
        expected = analysis.cost.totals(counts)
        pruned = ir.to_proto(rewritten(analysis, kept).model)
        found = outside.parameters(pruned)
        assert found == expected["parameters"] or (BUILT[name].written_down and found < expected["parameters"])
        macs = outside.macs(pruned, inputs)
        assert macs is None or macs == expected["macs"]
        assert macs is not None or name in ("modern", "fused_bert", "branches", "homonyms", "loop", "scan", "experts")


@pytest.mark.parametrize("name", ["residual_cnn", "decoder", "lstm_tagger", "flat_cnn", "vit_split"])
def test_changes_add_up(name: str) -> None:
    """`change` is the difference of two totals, and leaves its argument as it was."""
    analysis = spa.analyze(BUILT[name].build())
    cost = analysis.cost
    rng = np.random.default_rng(1)
    counts = list(cost.full)
    for group in analysis.groups:
        units = int(rng.integers(1, group.units))
        new = {leaf: counts[leaf] - n * units for leaf, n in group.leaves.items()}
        before, untouched = cost.totals(counts), list(counts)
        change = cost.change(counts, new)
        assert counts == untouched
        for leaf, count in new.items():
            counts[leaf] = count
        after = cost.totals(counts)
        assert {m: after[m] - before[m] for m in METRICS} == pytest.approx(change)


@pytest.mark.parametrize("name", ["residual_cnn", "decoder", "unet", "shuffle_net"])
def test_what_a_unit_saves(name: str) -> None:
    """`unit_macs` and `unit_parameters` are what the model is smaller by when one unit leaves."""
    model = BUILT[name].build()
    analysis = spa.analyze(model, dims=sizes(model, DIMS))
    inputs = feeds(model, dims=DIMS)
    full = outside.macs(model, inputs)
    assert full == analysis.macs
    assert outside.parameters(model) == analysis.parameters
    for group in analysis.groups:
        pruned = ir.to_proto(rewritten(analysis, kept_without(analysis, [(group, [0])])).model)
        macs = outside.macs(pruned, inputs)
        assert full is not None
        assert macs is not None
        assert full - macs == group.unit_macs, group.name
        assert outside.parameters(model) - outside.parameters(pruned) == group.unit_parameters, group.name


def test_bytes_are_those_of_the_file(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    for name in ("two_layers", "half", "qdq"):
        onnx.save(BUILT[name].build(), path)
        analysis = spa.analyze(path)
        assert analysis.cost.totals(analysis.cost.full)["bytes"] == path.stat().st_size


def test_assumed_sizes() -> None:
    """Leading axes count once, tokens 128 times, pixels 224 x 224, unless told otherwise."""
    info = onnx.helper.make_tensor_value_info
    inputs = [
        info("image", onnx.TensorProto.FLOAT, ["n", 3, "h", "w"]),
        info("ids", onnx.TensorProto.INT64, ["n", "t"]),
    ]
    nodes = [onnx.helper.make_node("Identity", ["image"], ["y"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, [info("y", 1, None)]))
    assert default_dims(ir.from_proto(model)) == {"n": 1, "h": 224, "w": 224, "t": 128}
    assert default_dims(ir.from_proto(model), {"t": 7, "n": 2}) == {"n": 2, "h": 224, "w": 224, "t": 7}


def test_axes_without_a_name_count_like_those_with_one() -> None:
    model = BUILT["lstm_tagger"].build()
    named = spa.analyze(model).macs
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    assert spa.analyze(model).macs == named


def test_dims_scale_the_cost() -> None:
    model = BUILT["lstm_tagger"].build()
    one, many = spa.analyze(model, dims={"n": 1, "t": 1}), spa.analyze(model, dims={"n": 5, "t": 7})
    assert many.macs == 35 * one.macs
    assert many.parameters == one.parameters
