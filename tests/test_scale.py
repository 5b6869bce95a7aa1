"""Large models: weights in several files, weights that are not there, and sessions that hold none of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

import spa
from benchmarks.decoders import Decoder, write_decoder
from spa.cli.app import app
from spa.errors import ExternalDataError
from spa.executors import segments
from spa.executors.segments import Segments, placed
from spa.graph import load, save
from spa.pipeline import analyze
from spa.runtime import fetch

SHAPE = Decoder(layers=3, width=64, heads=4, kv_heads=2, hidden=192, vocabulary=160, random=True)
IDS = np.random.default_rng(0).integers(0, SHAPE.vocabulary, (24, 12))


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "decoder.onnx"
    path.parent.mkdir()
    write_decoder(path, replace(SHAPE, files=3))
    return path


def logits(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input_ids": IDS})[0])


def test_a_model_in_several_files_is_written_in_several_files(decoder: Path, tmp_path: Path) -> None:
    parts = sorted(decoder.parent.glob("decoder.onnx.data*"))
    assert len(parts) == 3
    largest = max(part.stat().st_size for part in parts)
    assert load(decoder).shard == largest
    out, whole = tmp_path / "out.onnx", tmp_path / "whole.onnx"
    result = spa.prune(decoder, target="params=0.7", output=out)
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error < 1e-5
    written = sorted(path.name for path in tmp_path.glob("out.onnx*"))
    assert written == ["out.onnx", "out.onnx.data", "out.onnx.data_1"]
    assert max(path.stat().st_size for path in tmp_path.glob("out.onnx.data*")) <= largest
    assert result.report.bytes.after == sum(path.stat().st_size for path in tmp_path.glob("out.onnx*"))
    write_decoder(tmp_path / "single.onnx", SHAPE)
    spa.prune(tmp_path / "single.onnx", target="params=0.7", output=whole)
    assert [path.name for path in tmp_path.glob("whole.onnx.data*")] == ["whole.onnx.data"]
    np.testing.assert_array_equal(logits(out), logits(whole))


def test_a_weight_larger_than_a_part_has_a_file_of_its_own(decoder: Path, tmp_path: Path) -> None:
    graph = load(decoder)
    save(graph.model, tmp_path / "m.onnx", external=True, shard=1)
    tensors = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False).graph.initializer
    outside = {t.external_data[0].value for t in tensors if t.external_data}
    assert len(outside) == sum(1 for t in tensors if t.external_data)
    np.testing.assert_array_equal(logits(tmp_path / "m.onnx"), logits(decoder))


def test_the_output_may_not_be_among_the_parts_of_the_input(decoder: Path) -> None:
    first = decoder.with_name("decoder.onnx.data")
    for tensor in (model := onnx.load(str(decoder), load_external_data=False)).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == "decoder.onnx.data_1":
                entry.value = "other.onnx.data_1"
    decoder.with_name("decoder.onnx.data_1").rename(decoder.with_name("other.onnx.data_1"))
    onnx.save(model, str(decoder))
    before = first.read_bytes()
    arguments = ["prune", str(decoder), "-o", str(decoder.with_name("other.onnx")), "--target", "params=0.7"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code != 0
    assert "would overwrite" in str(answer.exception) + answer.output
    assert first.read_bytes() == before


def test_weights_that_are_absent_are_not_needed_to_analyse(decoder: Path) -> None:
    present = analyze(decoder)
    for part in decoder.parent.glob("decoder.onnx.data*"):
        part.unlink()
    with pytest.raises(ExternalDataError, match="cannot be opened"):
        load(decoder)
    graph = load(decoder, weights=False)
    absent = analyze(graph)
    assert [(g.name, g.kind, g.units) for g in absent.groups] == [(g.name, g.kind, g.units) for g in present.groups]
    assert absent.parameters == present.parameters
    assert absent.prunable_parameters == present.prunable_parameters
    assert graph.file_bytes > 4 * SHAPE.parameters
    tensor = graph.model.graph.initializers["embedding.weight"].const_value
    assert tensor is not None
    with pytest.raises(ExternalDataError, match=r"embedding\.weight.*left out"):
        tensor.numpy()
    refused = CliRunner().invoke(app, ["inspect", str(decoder)])
    shown = CliRunner().invoke(app, ["inspect", str(decoder), "--no-weights", "--json"])
    assert refused.exit_code != 0
    assert len(json.loads(shown.stdout)["groups"]) == len(present.groups)


@pytest.mark.parametrize("half", [False, True])
def test_sessions_that_borrow_their_weights_compute_the_same(
    tmp_path: Path, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "decoder.onnx"
    write_decoder(path, replace(SHAPE, half=half))
    model = load(path).model
    feeds = placed({"input_ids": IDS})
    own = fetch(Segments.of(model, "cpu").runner(["logits"], ())(feeds)["logits"])
    monkeypatch.setattr(segments, "LARGE", 0)
    parts = Segments.of(model, "cpu")
    assert parts.large
    run = parts.runner(["logits"], (), optimize=True)
    np.testing.assert_array_equal(fetch(run(feeds)["logits"]), own)
    zeros = np.zeros((64, SHAPE.vocabulary))
    parts.override("lm_head.weight", zeros)
    assert not fetch(parts.runner(["logits"], ())(feeds)["logits"]).any()
    np.testing.assert_array_equal(fetch(run(feeds)["logits"]), own)


def test_obspa_is_the_same_on_borrowed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=IDS)
    write_decoder(tmp_path / "decoder.onnx", replace(SHAPE, layers=1))
    found = []
    for name, large in (("own", 1 << 40), ("lent", 0)):
        monkeypatch.setattr(segments, "LARGE", large)
        result = spa.prune(
            tmp_path / "decoder.onnx",
            target="params=0.8",
            method="obspa",
            calibration=tmp_path / "ids.npz",
            output=tmp_path / f"{name}.onnx",
            check=False,
        )
        assert result.report.fit is not None
        found.append(result.report.fit.error_after)
    assert found[1] == pytest.approx(found[0], rel=0.05)  # optimised or not: other roundings, other ties


CHILD = """
import sys
import numpy as np
from spa.executors import segments
from spa.executors.segments import Segments, placed
from spa.graph import load

def own():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10

segments.LARGE = int(sys.argv[2])
feeds = placed({"input_ids": np.zeros((1, 8), np.int64)})
parts = Segments.of(load(sys.argv[1]).model, "cpu", 1)
before = own()
run = parts.runner(["logits"], ())
run(feeds)
print(own() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_borrowed_weights_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    write_decoder(path, Decoder(4, 768, 4, 4, 3072, 1000, half=True))
    size = sum(part.stat().st_size for part in tmp_path.iterdir())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    lent, held = (
        int(subprocess.run(
            [sys.executable, "-c", CHILD, str(path), str(large)], env=environment, check=True, capture_output=True
        ).stdout)
        for large in (0, 1 << 40)
    )  # fmt: skip
    assert size > 70 << 20
    assert lent < 0.3 * size
    assert held > 0.9 * size  # what is measured is the weights
