"""Pruning in steps: one removal from the original in the end, scores of the model as it is by then in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import spa
from spa.errors import UsageError
from tests.models import BUILT
from tests.net import Net
from tests.test_collect import samples
from tests.trained import images, trained

SOME = [n for n in ("residual_cnn", "vit_split", "decoder", "swin", "branches", "fused_bert") if n in BUILT]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("steps", [2, 3])
def test_one_proven_removal(name: str, steps: int) -> None:
    model = BUILT[name].build()
    result = spa.prune(model, target="params=0.8", criterion="l1", steps=steps, align=1)
    assert result.report.verify is not None
    assert result.report.verify.passed
    assert result.report.parameters.after <= 0.8 * result.report.parameters.before
    assert result.plan.settings["steps"] == steps
    again = spa.apply(model, result.plan)
    assert isinstance(result.model, onnx.ModelProto)
    assert isinstance(again.model, onnx.ModelProto)
    assert result.model.SerializeToString() == again.model.SerializeToString()


def test_norms_that_do_not_change_give_what_one_step_gives() -> None:
    """A network of one group: weights of units that stay are untouched, so that their order is."""
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 6), "a", 6, 40))
    net.named(net.gemm(x, "b", 40, 3), "y")
    model = net.model(y=("n", 3))
    one, many = (spa.prune(model, target="units=0.5", criterion="l2", align=1, steps=n).plan for n in (1, 4))
    assert one.removed == many.removed


def test_scores_follow_the_model() -> None:
    """Two copies of one unit are worthless each, as the other does the same; when one has left, the other counts."""
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 6), "a", 6, 12))
    net.named(net.gemm(x, "b", 12, 3), "y")
    net.weights["a.weight"][1] = net.weights["a.weight"][0] = 0.1
    net.weights["a.bias"][:2] = 1.0
    net.weights["b.weight"][:, :2] = 1.5
    how: dict[str, Any] = {"target": "units=0.85", "criterion": "obspa-paper", "compensate": "obs-dense", "align": 1}
    how["calibration"] = {"x": np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)}
    removed = [set(spa.prune(net.model(y=("n", 3)), steps=n, **how).plan.groups[0].removed) for n in (1, 2)]
    assert [len(units) for units in removed] == [2, 2]
    assert removed[0] == {0, 1}
    assert len({0, 1} & removed[1]) == 1


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_with_samples_and_compensation(name: str) -> None:
    """Each step goes on from the compensated model; the result is as good as that of one step, or nearly."""
    how: dict[str, Any] = {"target": "macs=0.6", "method": "fisher-obs", "calibration": {"image": images(96)}}
    one, two = (spa.prune(trained(name), steps=n, **how).report for n in (1, 2))
    assert two.macs.after <= 0.6 * two.macs.before
    assert two.fit is not None
    assert one.fit is not None
    assert two.fit.error_after <= 3 * one.fit.error_after + 1e-3
    assert two.fit.error_after < two.fit.error_before


def test_told_step_by_step() -> None:
    told: list[tuple[str, int, int]] = []
    model = BUILT["residual_cnn"].build()
    spa.prune(
        model, target="macs=0.7", criterion="variance", calibration=samples(model, 40), steps=3,
        progress=lambda *event: told.append(event),
    )  # fmt: skip
    assert [(done, total) for stage, done, total in told if stage == "step"] == [(1, 3), (2, 3)]


def test_too_few() -> None:
    with pytest.raises(UsageError, match="--steps: 0 is too few"):
        spa.prune(BUILT["residual_cnn"].build(), target="macs=0.7", steps=0)
