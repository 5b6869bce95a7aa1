"""The examples of docs/any-time.md, as they stand there: each is run, and what it made is judged."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

import spa  # noqa: E402
from spa.graph import load  # noqa: E402
from spa.groups import analyze_model  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "any-time.md"
TEXT = PAGE.read_text(encoding="utf-8")
FIRST, BEFORE, TUNE, SHRINK, PRUNE, STEPS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the first block defines, with a trained network, in a folder of its own."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("any-time"))
        names: dict[str, Any] = {}
        run(FIRST, names)
        run(TUNE, names)
        yield names


@pytest.mark.filterwarnings("ignore")
def run(code: str, names: dict[str, Any]) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter calls itself deprecated
        exec(compile(code, str(PAGE), "exec"), names)


def macs(path: str) -> float:
    return analyze_model(load(path).model).macs


def left(path: str, of: str) -> float:
    return macs(path) / macs(of)


def test_before_training(space: dict[str, Any]) -> None:
    run(BEFORE, space)
    accuracy = space["accuracy"]
    assert left("small-trained.onnx", "untrained.onnx") <= 0.5
    assert accuracy("small-untrained.onnx") < 0.3
    assert accuracy("small-trained.onnx") > 0.85
    nodes = onnx.load("small-trained.onnx").graph.node
    used = [name for n in nodes if n.op_type == "BatchNormalization" for name in n.input[1:]]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("criterion", ["grasp", "crop"])
def test_other_criteria_before_training(space: dict[str, Any], criterion: str) -> None:
    result = spa.prune("untrained.onnx", target="macs=0.5", criterion=criterion, calibration=space["some"])
    tuned = spa.finetune(result.model, data=space["train"], epochs=4, lr=0.05)
    assert tuned.after is not None
    assert tuned.after > 0.6


def test_train_prune_and_tune(space: dict[str, Any]) -> None:
    accuracy = space["accuracy"]
    dense, pruned, tuned = (accuracy(f"{n}.onnx") for n in ("dense", "pruned", "tuned"))
    assert left("tuned.onnx", "dense.onnx") <= 0.4
    assert dense > 0.9
    assert pruned < dense - 0.1
    assert tuned > dense - 0.05


def test_shrink_and_prune(space: dict[str, Any]) -> None:
    run(SHRINK, space)
    accuracy = space["accuracy"]
    assert left("shrunk-pruned.onnx", "dense.onnx") <= 0.4
    assert space["shrunk"].gone > 0.9 * space["shrunk"].penalised
    assert accuracy("shrunk-pruned.onnx") > accuracy("pruned.onnx")
    assert accuracy("shrunk-pruned.onnx") > accuracy("shrunk.onnx") - 0.02


def test_train_and_prune(space: dict[str, Any]) -> None:
    run(PRUNE, space)
    plain = spa.prune("dense.onnx", target="macs=0.6", criterion="random", output="random.onnx")
    assert plain.output is not None
    assert left("compensated.onnx", "dense.onnx") <= 0.6
    assert space["accuracy"]("compensated.onnx") > space["accuracy"]("random.onnx") + 0.1


def test_in_steps_before_training(space: dict[str, Any]) -> None:
    run(STEPS, space)
    assert left("flow-trained.onnx", "untrained.onnx") <= 0.3
    assert space["accuracy"]("flow-trained.onnx") > 0.8


def test_the_commands_say_the_same(space: dict[str, Any]) -> None:
    """Every option of the shell blocks exists, with the values of the Python blocks beside them."""
    from typer.main import get_command

    from spa.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    lines = [line for text in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in text.splitlines()]
    assert len(lines) == 6
    for line in lines:
        _, command, *words = line.split()
        options = {o for p in commands[command].params for o in p.opts}
        assert {w for w in words if w.startswith("-")} <= options
        for name, value in itertools.pairwise(words):
            if name in ("--target", "--criterion", "--method"):
                assert f'"{value}"' in TEXT
