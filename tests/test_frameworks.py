"""The same networks from every framework: the same groups up to names, pruned alike, and still accurate.

The files were made by `python examples/frameworks/run.py --fixtures tests/frameworks`, which trains in each framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spa
from spa.runtime import open_session, run
from spa.signature import inputs_of

FOLDER = Path(__file__).parent / "frameworks"
FRAMEWORKS = ("torch-dynamo", "torch-torchscript", "keras", "tensorflow", "jax", "paddle")
FILES = sorted(FOLDER.glob("*.onnx"))

# In units as in torch: two widths of the residual CNN, one behind the pooling; the residual stream of the transformer,
# and in each of two blocks heads, dimensions of heads and neurons.
GROUPS = {
    "cnn": {("channel", 12): 2, ("channel", 16): 1},
    "transformer": {
        ("stream", 16): 1,
        ("head", 4): 2,
        ("qk-dim", 4): 2,
        ("v-dim", 4): 2,
        ("neuron", 48): 2,
    },
    "mlp": {("neuron", 24): 1, ("neuron", 32): 1},
}
MACS = {"cnn": 200608, "transformer": 99488}


def network_of(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def groups_of(analysis: Any) -> dict[tuple[str, int], int]:
    """How often there is a group of a kind and of so many units.

    The residual stream of a transformer is `hidden` in some graphs and `channel` in others: what a unit is called
    depends on the operator that makes it first, a convolution of patches or a product with a matrix.
    """
    found: dict[tuple[str, int], int] = {}
    for group in analysis.groups:
        kind = group.kind if group.exact else "stream"
        found[kind, group.units] = found.get((kind, group.units), 0) + 1
    return found


@pytest.fixture(scope="module")
def digits() -> Mapping[str, Any]:
    """Images and labels as they were trained on, and others."""
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    images = (data.images / 8 - 1).astype(np.float32)
    split = train_test_split(images, data.target, test_size=0.25, random_state=0, stratify=data.target)
    return dict(zip(("images", "test_images", "labels", "test_labels"), split, strict=True))


def shaped(images: np.ndarray[Any, Any], path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """In the layout of a model's input: rows of pixels, or a channel axis at either end."""
    (spec,) = inputs_of(path)
    assert spec.shape is not None
    return {spec.name: images.reshape(len(images), *[d for d in spec.shape[1:] if isinstance(d, int)])}


def accuracy(path: Path, digits: Mapping[str, Any]) -> float:
    session = open_session(path, provider="cpu", threads=1)
    scores = list(run(session, shaped(digits["test_images"], path)).values())[-1]
    return float((scores.argmax(1) == digits["test_labels"]).mean())


def test_every_framework_is_here() -> None:
    names = {p.stem for p in FILES}
    assert names == {f"{f}_{n}" for f in FRAMEWORKS for n in ("cnn", "transformer")} | {"sklearn_mlp"}
    assert sum(p.stat().st_size for p in FILES) < 500_000


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_groups_are_those_of_the_network(path: Path) -> None:
    analysis = spa.analyze(path)
    assert groups_of(analysis) == GROUPS[network_of(path)]
    assert analysis.macs == MACS.get(network_of(path), analysis.macs)  # skl2onnx does not name the batch


@pytest.mark.parametrize("network", ["cnn", "transformer"])
def test_a_unit_costs_the_same_in_every_framework(network: str) -> None:
    """So that a budget means the same: multiply-accumulates that leave with the first unit of each group."""
    costs = {
        framework: sorted((g.units, g.unit_macs) for g in spa.analyze(FOLDER / f"{framework}_{network}.onnx").groups)
        for framework in FRAMEWORKS
    }
    assert costs == dict.fromkeys(FRAMEWORKS, costs["torch-dynamo"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_same_command_prunes_all_of_them(path: Path, digits: Mapping[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "pruned.onnx"
    images = shaped(digits["images"], path)
    result = spa.prune(path, target="macs=0.6", output=out, method="obspa", calibration=images, seed=0)
    report = result.report
    assert report.verify is not None
    assert report.verify.passed
    assert report.macs.after <= 0.6 * report.macs.before
    dense, pruned = accuracy(path, digits), accuracy(out, digits)
    assert dense >= 0.9
    assert pruned >= dense - 0.05, f"{dense:.3f} -> {pruned:.3f}"
