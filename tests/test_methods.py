"""Every named method, end to end on trained networks, and what is said when it cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import spa
from spa.criteria import CRITERIA
from spa.errors import TargetError, UsageError
from spa.methods import AUTO, CHOICES, METHODS, resolve
from tests.net import Net
from tests.trained import images, trained

KINDS = {"cnn": {"channel"}, "vit": {"head", "neuron", "qk-dim", "v-dim"}}


def pruned(name: str, method: str, calibration: Any, share: float = 0.7, **more: Any) -> spa.Result:
    return spa.prune(trained(name), target=f"macs={share}", method=method, calibration=calibration, **more)


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_end_to_end(name: str, method: str) -> None:
    """The target is met, the surgery is proven, the file runs, and the report says how well it was fit."""
    kinds = METHODS[method].kinds
    if kinds and not set(kinds) & KINDS[name]:
        with pytest.raises(TargetError, match=r"nothing|is about units of kind"):
            pruned(name, method, {"image": images(64)})
        return
    model = trained(name)
    before = model.SerializeToString()
    share = 0.85 if method == "michel" else 0.7  # heads alone are less than a third of the network
    result = pruned(name, method, {"image": images(64)}, share)
    assert model.SerializeToString() == before
    report = result.report
    assert report.macs.after <= share * report.macs.before
    assert report.method == method
    assert report.verify is not None
    assert report.fit is not None
    assert report.fit.samples == 64
    assert report.fit.error_after <= report.fit.error_before * (0.7 if method == "obspa" else 1.5)
    small = result.model
    assert isinstance(small, onnx.ModelProto)
    onnx.checker.check_model(small)
    session = ort.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images(20)})
    assert logits.shape == (20, 10)
    assert np.isfinite(logits).all()
    if kinds:
        assert {g.kind for g in result.plan.groups} <= set(kinds)
    assert result.plan.settings["method"] == method
    assert result.plan.settings["criterion"] == METHODS[method].criterion


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_without_data(name: str, method: str) -> None:
    """Pictures that match the CNN's norms, and noise for the ViT, which has none."""
    kinds = METHODS[method].kinds
    if kinds and not set(kinds) & KINDS[name]:
        pytest.skip("made for other kinds of units")
    if (name, method) in (("vit", "obspa"), ("cnn", "obspa-paper")):
        pytest.skip("the other network will do")
    share = 0.85 if method == "michel" else 0.7
    result = pruned(name, method, "none", share, samples=64)
    assert result.report.macs.after <= share * result.report.macs.before
    assert result.report.fit is not None
    assert np.isfinite(result.report.fit.error_after)


def test_the_best_of_several() -> None:
    """`auto` is one of its candidates, with what that would have given alone."""
    data = {"x": np.random.default_rng(0).normal(size=(120, 8))}
    result = spa.prune(_mlp(), target="macs=0.6", method="auto", calibration=data)
    assert result.report.method in AUTO
    alone = spa.prune(_mlp(), target="macs=0.6", method=result.report.method, calibration=data)
    assert isinstance(result.model, onnx.ModelProto)
    assert isinstance(alone.model, onnx.ModelProto)
    assert result.plan.removed == alone.plan.removed
    assert result.model.SerializeToString() == alone.model.SerializeToString()


# -- options ---------------------------------------------------------------------------------------------------------


def test_parts_override_a_method() -> None:
    (method,) = resolve("flap", criterion="l1", compensate="obs", allocation=None)
    assert (method.criterion, method.compensate, method.allocation) == ("l1", "obs", METHODS["flap"].allocation)
    assert method.name == "flap"
    assert [m.name for m in resolve("auto", aggregation="max")] == list(AUTO)
    assert {m.aggregation for m in resolve("auto", aggregation="max")} == {"max"}
    (plain,) = resolve(None)
    assert (plain.criterion, plain.compensate, plain.needs_data) == ("l2", "none", "")
    assert resolve(None, criterion="l1")[0].name == "l1"


def test_every_method_is_made_of_known_parts() -> None:
    for name, method in METHODS.items():
        assert method.criterion in CRITERIA
        assert method.allocation in CHOICES["allocation"]
        assert method.compensate in CHOICES["compensate"]
        assert method.recalibrate in CHOICES["recalibrate"]
        assert method.text
        assert resolve(name)[0].settings()["method"] == name
    assert set(AUTO) <= set(METHODS)


@pytest.mark.parametrize("key", [*CHOICES, "method"])
def test_unknown_names(key: str) -> None:
    with pytest.raises(
        UsageError, match=rf"unknown {key} 'nonsense'; choose one of .*{'obspa' if key == 'method' else ''}"
    ):
        spa.prune(_mlp(), target="macs=0.5", calibration="none", **{key: "nonsense"})  # type: ignore[arg-type]  # that is the test


def test_a_criterion_is_no_method() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'taylor' \(taylor is a criterion: --criterion taylor\)"):
        resolve("taylor")


@pytest.mark.parametrize("options", [
    {"method": "flap"}, {"method": "auto"}, {"criterion": "variance"}, {"compensate": "obs"}, {"recalibrate": "auto"},
    {"criterion": "obspa", "allocation": "efficient"}, {"method": "spa-l1"},
])  # fmt: skip
def test_data_is_asked_for(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--calibration PATH, or --calibration none"):
        spa.prune(_mlp(), target="macs=0.5", **options)


def test_weights_need_no_data() -> None:
    for criterion in ("l1", "l2", "random", "bn-scale"):
        assert spa.prune(_mlp(), target="macs=0.5", criterion=criterion).report.fit is None


@pytest.mark.parametrize("method", ["obspa", "ob2c", "obspa-paper"])
def test_too_few_samples(method: str) -> None:
    """The message names how many are needed, and so many are enough."""
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"target": "macs=0.5", "method": method}
    with pytest.raises(UsageError, match=r"2 samples .* give at least \d+ samples") as caught:
        spa.prune(_mlp(), calibration={"x": rng.normal(size=(2, 8))}, **options)
    need = int(str(caught.value).split("at least ")[1].split()[0])
    spa.prune(_mlp(), calibration={"x": rng.normal(size=(need, 8))}, **options)


def _mlp() -> onnx.ModelProto:
    net = Net()
    x = net("Relu", net.gemm(net.input("x", "n", 8), "a", 8, 64))
    net.named(net.gemm(x, "b", 64, 5), "y")
    return net.model(y=("n", 5))
