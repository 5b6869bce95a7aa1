"""Recipes: the whole way in one file, and every mistake one sentence before anything runs."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import spa
from spa.edge import read_recipe, run
from tests.command_line import Ran
from tests.small_models import cnn
from tests.trained import trained

pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    onnx.save(trained("cnn"), folder / "cnn.onnx")
    from examples import digits

    train, test, train_labels, test_labels = digits.data()
    np.savez(folder / "calib.npz", x=train[:128], labels=train_labels[:128])
    np.savez(folder / "train.npz", x=train[:256], labels=train_labels[:256])
    np.savez(folder / "test.npz", x=test, labels=test_labels)
    return folder


@pytest.fixture
def folder(learned: Path, tmp_path: Path) -> Path:
    """The recipe's folder, with the learned files."""
    for file in learned.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


WHOLE = """
    model: cnn.onnx
    output: small.ort
    calibration: calib.npz
    evaluation: test.npz
    work: kept
    result: result.json
    stages:
      - prune:
          target: macs=0.7
          method: obspa
          cache: null
          gate: {accuracy_drop: 30%}
      - quantize: {platform: x86-vnni, exclude: [Gemm], gate: {agreement: 0.9, size: 60%}}
      - opset: 13
      - bench: {provider: cpu, threads: 1, batch: 1, repeats: 5, gate: {latency: 1000ms, speedup: 0.01}}
      - ort: {platform: any}
      - verify: {against: prune, gate: [agreement >= 0.9]}
"""


def test_a_recipe_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(folder, WHOLE)
    monkeypatch.chdir("/")  # paths count from the recipe
    ran = Ran(capsys, "run", recipe, "--json")
    assert ran.status == 0, ran.err
    body = ran.json()
    assert [s["stage"] for s in body["steps"]] == ["prune", "quantize", "opset", "bench", "ort", "verify"]
    assert body["passed"]
    assert body == json.loads((folder / "result.json").read_text())
    sizes = [s["bytes_after"] for s in body["steps"] if s["output"]]
    assert sizes == [Path(s["output"]).stat().st_size for s in body["steps"] if s["output"]]
    assert [s["bytes_before"] for s in body["steps"][1:3]] == sizes[:2]
    assert body["steps"][-1]["output"] is None
    kept = {"01-prune.onnx", "01-prune.plan.json", "02-quantize.onnx", "03-opset.onnx", "small.ort"}
    assert {p.name for p in (folder / "kept").iterdir()} == kept | {"small.required_operators.config"}
    assert not list(folder.glob(".spa-*"))
    # what it says is what ONNX Runtime and numpy say
    data = np.load(folder / "test.npz")
    answers = {}
    for name in ("cnn.onnx", "kept/01-prune.onnx", "kept/02-quantize.onnx", "small.ort"):
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        answers[name] = session.run(None, {session.get_inputs()[0].name: data["x"]})[0].argmax(1)
    prune, quantize, verify = (body["steps"][k]["fidelity"] for k in (0, 1, 5))
    assert prune["samples"] == len(data["x"])
    assert prune["accuracy_before"] == pytest.approx((answers["cnn.onnx"] == data["labels"]).mean())
    assert prune["accuracy"] == pytest.approx((answers["kept/01-prune.onnx"] == data["labels"]).mean())
    agreement = (answers["kept/01-prune.onnx"] == answers["kept/02-quantize.onnx"]).mean()
    assert quantize["agreement"] == pytest.approx(agreement)
    assert verify["agreement"] == pytest.approx((answers["kept/01-prune.onnx"] == answers["small.ort"]).mean())
    # the plan that was kept is the one that made the pruned model
    again = Ran(capsys, "apply", folder / "cnn.onnx", folder / "kept/01-prune.plan.json", "-o", folder / "again.onnx")
    assert again.status == 0, again.err
    assert spa.analyze(folder / "again.onnx").macs == spa.analyze(folder / "kept/01-prune.onnx").macs


def test_a_missed_gate_stops_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(
        folder,
        """
        model: cnn.onnx
        output: small.onnx
        stages:
          - opset: 16
          - quantize: {calibration: calib.npz, gate: {agreement: 0.5, size: 100}}
          - opset: 13
        """,
    )
    ran = Ran(capsys, "run", recipe, "--result", folder / "r.json", "--json")
    assert ran.status == 11
    assert "stage quantize missed size <= 100 (it is " in ran.err
    body = ran.json()
    assert body["error"]["code"] == "gate"
    assert [s["passed"] for s in body["steps"]] == [True, False]
    assert body["output"] is None
    assert json.loads((folder / "r.json").read_text())["passed"] is False
    assert not (folder / "small.onnx").exists()
    assert not list(folder.glob(".spa-*"))
    table = Ran(capsys, "run", recipe)
    assert table.status == 11
    assert "missed size <= 100" in table.out


def test_pruned_and_fine_tuned_towards_the_original(folder: Path) -> None:
    recipe = write(
        folder,
        """
        model: cnn.onnx
        output: tuned.onnx
        evaluation: test.npz
        stages:
          - prune: {target: macs=0.5, cache: null}
          - finetune: {data: train.npz, teacher: model, plan: prune, epochs: 1, held_out: 0, lr: 1e-3}
        """,
    )
    outcome = run(recipe)
    prune, tuned = outcome.steps
    assert prune.fidelity is not None
    assert tuned.fidelity is not None
    assert tuned.fidelity.accuracy_before == prune.fidelity.accuracy
    assert tuned.fidelity.error > 0
    assert outcome.output == folder / "tuned.onnx"
    assert [
        p.name for p in folder.iterdir() if p.name not in {"recipe.yaml", "tuned.onnx"} and not p.is_symlink()
    ] == []


def test_the_users_own_metric_is_a_gate(folder: Path) -> None:
    (folder / "metric.py").write_text(
        "import numpy as np\n\ndef metric(outputs, labels):\n    (scores,) = outputs.values()\n"
        "    return float((scores.argmax(1) == labels).mean())\n"
    )
    text = "model: cnn.onnx\noutput: h.onnx\nevaluation: test.npz\nmetric: metric.py\nstages:\n"
    outcome = run(write(folder, text + "  - float16: {gate: {metric: 0.5, metric_drop: 0.01}}\n"))
    fidelity = outcome.steps[0].fidelity
    assert fidelity is not None
    assert fidelity.metric == fidelity.accuracy
    (folder / "metric.py").write_text("def metric(outputs, labels):\n    return outputs['nothing']\n")
    with pytest.raises(spa.UsageError, match="metric: failed with KeyError"):
        run(write(folder, text + "  - float16\n"))


def test_check_only_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(folder, WHOLE)
    body = Ran(capsys, "run", recipe, "--check", "--json").json()
    assert body["stages"] == ["prune", "quantize", "opset", "bench", "ort", "verify"]
    assert not (folder / "kept").exists()


def test_the_same_recipe_gives_the_same_bytes(folder: Path) -> None:
    text = "model: cnn.onnx\noutput: a.onnx\ncalibration: calib.npz\nstages:\n"
    recipe = write(folder, text + "  - prune: {target: macs=0.7, cache: null}\n  - quantize: {platform: arm}\n")
    run(recipe)
    run(recipe, output=folder / "b.onnx")
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


HEAD = "model: cnn.onnx\noutput: out.onnx\n"
MISTAKES: dict[str, tuple[str, str]] = {
    "not YAML": ("model: [cnn.onnx", "line 1: is not YAML"),
    "a list": ("- float16\n", "a recipe is a mapping"),
    "nothing": ("", "a recipe is a mapping"),
    "a key twice": (HEAD + "model: other.onnx\nstages: [float16]\n", "line 3: key 'model' comes twice"),
    "no model": ("output: out.onnx\nstages: [float16]\n", "key 'model' is missing"),
    "no stages": (HEAD, "key 'stages' is missing"),
    "stages that are none": (HEAD + "stages: float16\n", "stages must be a list"),
    "an unknown key": (HEAD + "calibrations: x.npz\nstages: [float16]\n", "'calibrations'; did you mean 'calibration'"),
    "an unknown stage": (HEAD + "stages: [float61]\n", "stage 1: unknown stage 'float61'; did you mean 'float16'"),
    "an unknown option": (
        HEAD + "stages:\n  - float16\n  - quantize: {calibration: noise, per_chanel: true}\n",
        "stage 2 (quantize): unknown key 'per_chanel'; did you mean 'per_channel'",
    ),
    "an unknown gate": (HEAD + "stages: [{float16: {gate: {agrement: 1}}}]\n", "stage 1 (float16): gate: unknown gate"),
    "a gate that is none": (HEAD + "stages: [{float16: {gate: 3}}]\n", "gate must be a mapping"),
    "a missing option": (HEAD + "stages: [prune]\n", "stage 1 (prune): key 'target' is missing"),
    "no version": (HEAD + "stages: [opset]\n", "stage 1 (opset): key 'version' is missing"),
    "a word for a number": (HEAD + "stages: [{opset: {version: old}}]\n", "version must be a whole number, not 'old'"),
    "a choice that is none": (
        HEAD + "stages: [{ort: {style: fast}}]\n", "style must be one of fixed, runtime, not 'fast'",
    ),
    "yes for a word": (
        HEAD + "stages: [{prune: {target: macs=0.7, criterion: no}}]\n", "put the word in quotes",
    ),
    "options that are none": (HEAD + "stages: [{float16: fast}]\n", "options must be a mapping"),
    "a file that is not there": (HEAD + "calibration: no.npz\nstages: [float16]\n", "calibration: "),
    "a model that is not there": ("model: no.onnx\noutput: o.onnx\nstages: [float16]\n", "model: "),
    "a folder that is not there": ("model: cnn.onnx\noutput: no/o.onnx\nstages: [float16]\n", "create it first"),
    "the input as output": ("model: cnn.onnx\noutput: cnn.onnx\nstages: [float16]\n", "is read as model"),
    "a stage after ort": (
        "model: cnn.onnx\noutput: o.ort\nstages: [ort, float16]\n", "stage float16 comes after ort",
    ),
    "quantised twice": (
        HEAD + "calibration: noise\nstages: [quantize, quantize]\n", "stage quantize-2 needs float32 and comes after",
    ),
    "ort without its name": (HEAD + "stages: [ort]\n", "output: "),
    "only looking": (HEAD + "stages: [verify]\n", "no stage makes a file"),
    "a stage that is not before": (
        HEAD + "stages: [float16, {verify: {against: prune}}]\n", "against: 'prune' is no stage before it",
    ),
    "criterion unknown to prune": (HEAD + "stages: [{prune: {target: macs=0.7, criterion: l3}}]\n", "stage prune: "),
    "labels that are not there": (HEAD + "stages: [{float16: {gate: {accuracy: 0.9}}}]\n", "needs labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = MISTAKES[name]
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text, encoding="utf-8")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ran = Ran(capsys, "run", recipe)
    assert ran.status == 2, ran.err
    assert says in ran.err
    assert len(ran.err.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_recipe_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "run", tmp_path / "no.yaml")
    assert ran.status == 2
    assert "cannot be read (No such file" in ran.err


def test_without_pyyaml_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(spa.UsageError, match=r"pip install \"spa-prune\[edge\]\""):
        read_recipe(write(tmp_path, "model: x\n"))


def test_every_option_of_prune_is_a_key(tmp_path: Path) -> None:
    """The recipe follows the function: what `spa.prune` learns, recipes know."""
    import inspect

    from spa.edge.recipe import _OWN, KINDS
    from spa.edge.schema import options_of

    known = set(options_of(KINDS["prune"](), _OWN))
    keywords = {n for n, p in inspect.signature(spa.prune).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords - known == {"output", "progress"}


@pytest.mark.slow
def test_a_real_model(data_root: Path, tmp_path: Path) -> None:
    """ResNet-20 on CIFAR-10: INT8 after pruning keeps what pruning left."""
    source = data_root / "data" / "models" / "resnet20_cifar10_bn.onnx"
    images = data_root / "data" / "data" / "cifar10_lossless.npz"
    if not source.is_file() or not images.is_file():
        pytest.skip(f"no {source.name} or {images.name} in {data_root}")
    stored = np.load(images)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def normal(x: Any) -> Any:
        return ((x / 255 - mean[:, None, None]) / std[:, None, None]).astype(np.float32)

    np.savez(tmp_path / "calib.npz", x=normal(stored["calib_x"][:256]))
    np.savez(tmp_path / "test.npz", x=normal(stored["test_x"]), labels=stored["test_y"].astype(np.int64))
    recipe = write(
        tmp_path,
        f"""
        model: {source}
        output: small.onnx
        calibration: calib.npz
        evaluation: test.npz
        stages:
          - prune: {{target: macs=0.9, method: obspa, cache: null}}
          - quantize: {{gate: {{accuracy_drop: 0.02, agreement: 0.95, size: 45%}}}}
        """,
    )
    outcome = run(recipe)
    assert outcome.passed, outcome.steps[-1].checks
    assert outcome.steps[0].fidelity is not None
    assert outcome.steps[0].fidelity.accuracy_before == pytest.approx(0.917, abs=0.002)  # as published
