"""Attention heads in another basis: what has low rank loses nothing, the losses are those of Eckart and Young."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa
from spa.cache import Cache
from spa.calibration import Calibration
from spa.compensate import heads
from spa.compensate.heads import Rows
from spa.compensate.rotation import FLOOR, Mixer, Rotation, find_rotations
from spa.executors.collect import Setup
from spa.executors.segments import Segments, placed
from spa.graph import load
from spa.groups import Analysis
from spa.measured import Measured
from spa.removal import kept_without
from spa.rewrite import rewritten
from spa.runtime import fetch
from tests.models import BUILT
from tests.test_collect import samples

Array = np.ndarray
RANK = 3


def thin(model: onnx.ModelProto, rank: int) -> onnx.ModelProto:
    """Projections whose rows, biases included, span `rank` dimensions in each head."""
    rng = np.random.default_rng(5)
    blocks_of = {"qkv": 0, "q": 6, "k": 2, "v": 2}
    for tensor in model.graph.initializer:
        name = tensor.name.partition(".")[0]
        if name not in blocks_of or not tensor.name.endswith("weight"):
            continue
        count = blocks_of[name] or _heads_of(model)
        w = numpy_helper.to_array(tensor)
        blocks = [b @ rng.normal(size=(b.shape[1], rank)) for b in np.split(w, count, axis=1)]
        mixed = [b @ rng.normal(size=(rank, w.shape[1] // count)) * 0.1 for b in blocks]
        tensor.CopyFrom(numpy_helper.from_array(np.concatenate(mixed, 1).astype(w.dtype), tensor.name))
    for tensor in model.graph.initializer:
        if tensor.name.partition(".")[0] in blocks_of and tensor.name.endswith("bias"):
            tensor.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(tensor), tensor.name))
    return model


def _heads_of(model: onnx.ModelProto) -> int:
    """Blocks of the fused projection."""
    size = next(i for i in model.graph.initializer if i.name == "qkv.weight").dims[1]
    return {96: 12, 144: 9}[size]


def rotations(model: onnx.ModelProto, count: int = 24) -> tuple[Analysis, Measured, dict[str, Rotation]]:
    analysis = spa.analyze(load(model))
    data = samples(model, count)
    measured = Measured(analysis, analysis.groups, data, Setup())
    return analysis, measured, find_rotations(analysis.groups, measured)


def run(parts: Segments, data: Calibration, names: list[str]) -> list[Array]:
    return [np.concatenate([fetch(parts.runner(names, ())(placed(b))[n]) for b in data.batches(8)]) for n in names]


@pytest.mark.parametrize(
    ("name", "found"),
    [("vit_split", {"qk-dim", "v-dim"}), ("vit_reshape", {"qk-dim"}), ("decoder", {"v-dim"}), ("residual_cnn", set())],
)
def test_what_has_low_rank_loses_nothing(name: str, found: set[str]) -> None:
    """All but the rank may leave, whichever units these are; rotary embeddings keep queries and keys as they are."""
    model = thin(BUILT[name].build(), RANK)
    analysis, measured, every = rotations(model)
    assert {r.heads.group.kind for r in every.values()} == found
    rng = np.random.default_rng(1)
    before = Segments.of(analysis.coupling.model)
    (expected,) = run(before, measured.data, before.outputs)
    for rotation in every.values():
        group = rotation.heads.group
        kept = kept_without(analysis, [(group, rng.permutation(group.units)[: group.units - RANK].tolist())])
        plain, mixed = rewritten(analysis, kept), rewritten(analysis, kept)
        Mixer(measured, every, kept).write(mixed)
        errors = [
            np.abs(run(Segments.of(t.model), measured.data, before.outputs)[0] - expected).max() for t in (plain, mixed)
        ]
        assert errors[1] < 0.02 * errors[0]
        assert rotation.losses[: group.units - RANK].sum() < group.units * FLOOR * rotation.losses.sum()
        assert (np.diff(rotation.losses) >= -1e-12).all()


def test_losses_of_queries_and_keys_are_the_best_there_are() -> None:
    """Over all pairs of a query and a centred key the best product of rank r errs by the smaller singular values."""
    model = BUILT["vit_reshape"].build()
    analysis, measured, every = rotations(model)
    (rotation,) = every.values()
    site = rotation.heads.products[0].queries[0].site
    parts = Segments.of(analysis.coupling.model)
    assert site.bias is not None
    assert site.bias.const_value is not None
    (y,) = run(parts, measured.data, [site.name])
    y = y.reshape(-1, y.shape[-1]).astype(np.float64) + site.bias.const_value.numpy()

    def of(rows: Rows) -> Array:
        return np.asarray(y[:, rows.index])

    squares = []
    for product in rotation.heads.products:
        (query,), (key,) = product.queries, product.keys
        k = of(key) - of(key).mean(0)
        squares.append(np.linalg.svd(of(query) @ k.T, compute_uv=False)[: len(query.index)] ** 2)
    power = np.sum(squares, axis=0) / np.sum(squares)
    values = rotation.losses[::-1] - power  # what the values add, relative to all that they add
    assert (values >= -1e-4).all()
    np.testing.assert_allclose(values.sum(), 1.0, rtol=1e-3)


def test_the_refit_goes_on_from_the_mixed_basis() -> None:
    """After another layer has changed too, the whole method still loses next to nothing on heads of low rank."""
    model = thin(BUILT["vit_split"].build(), RANK)
    data = {"image": np.random.default_rng(0).normal(size=(128, 3, 8, 8)).astype(np.float32)}
    errors = {}
    for compensate in ("obs", "obs-dense"):
        result = spa.prune(
            model,
            target="units=0.5",
            method="obspa",
            allocation="uniform",
            kinds=["qk-dim", "v-dim"],
            calibration=data,
            compensate=compensate,
            align=1,
        )
        assert result.report.fit is not None
        errors[compensate] = result.report.fit.error_after
    assert errors["obs"] < 1e-2 * errors["obs-dense"]


def test_heads_are_found_again_without_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BUILT["decoder"].build()
    analysis, data = spa.analyze(load(model)), samples(model, 4)
    first = heads.find_heads(analysis.groups, Measured(analysis, analysis.groups, data, Setup(), Cache(tmp_path, "m")))
    monkeypatch.setattr(heads, "_probed", None)
    again = heads.find_heads(analysis.groups, Measured(analysis, analysis.groups, data, Setup(), Cache(tmp_path, "m")))
    assert first.keys() == again.keys()
    assert first
    for name in first:
        for a, b in zip(first[name].outlets, again[name].outlets, strict=True):
            assert a.values.site.name == b.values.site.name
            np.testing.assert_array_equal(a.values.index, b.values.index)
            assert [c.index.tolist() for c in a.readers] == [c.index.tolist() for c in b.readers]
