"""Recorded models of many exporters: pruned as far as asked, and proved. Skipped where their folder is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import spa
from tests import outside
from tests.zoo import MISSING, ROOT, Recorded, recorded, trained

TOLERANCE = 1e-4
HALF = {"resnet_fp16_dy", "resnet_fp16_ts", "unet_nearest_gn_f16conv"}
HALF_TOLERANCE = 1e-2
"""float16 rounds at 2^-11, and sums of some hundred terms are made in another order."""

EXPLAINED = {
    "channel_gather_slice_pad_dy": "the one channel axis of the only large layer is a graph output in part",
    "channel_gather_slice_pad_ts": "the one channel axis of the only large layer is a graph output in part",
    "hf_siglip_v_dy": "the hidden state (axis 2) is a graph output, which freezes the patch embedding",
    "hf_siglip_v_ts": "the hidden state (axis 2) is a graph output, which freezes the patch embedding",
    "hf_t5_enc_dy": "the hidden state (axis 2) is a graph output, which freezes the token embedding",
    "hf_t5_enc_ts": "the hidden state (axis 2) is a graph output, which freezes the token embedding",
    "skl_logreg": "one linear classifier: its input and output are those of the graph",
    "skl_pipe_mlp": "an ai.onnx.ml::Scaler holds constants of the size of the graph input",
    "tf_grouped_jitcompile_known_bad_keras": "the convolutions are StatefulPartitionedCall nodes, a custom operator",
}
"""Models of which less than 95 % of the parameters can leave, and what is frozen there."""

EXPLAINED_TRAINED = {
    "minilm_l6_v2_sentence": "the sentence embedding is the mean of the hidden state, so its width is an output",
    "silero_vad_16k_op15": "the Fourier basis of the input, and an LSTM whose state is a graph input and output",
    "ultraface_rfb320": "the prior boxes are constants of the size of the graph output",
}
QUICK = [
    "resnet20_cifar10_bn",
    "vit_small_cifar10_qkv_fused",
    "stories260K_rotate_half_dynamo",
    "squeezenet1.1_imagenet",
    "mobilenetv2_1.0_224_imagenet",
    "mnist_cntk",
    "silero_vad_16k_op15",
    "yunet_n_dynamic",
]


def _parameters(models: list[Recorded]) -> list[object]:
    if not models:
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=MISSING))]
    return [pytest.param(m, id=m.name) for m in models]


@pytest.fixture(params=_parameters(recorded()))
def model(request: pytest.FixtureRequest) -> Recorded:
    return request.param


def as_far_as_possible(source: Path, target: str, scope: str, output: Path) -> spa.Result:
    """Pruned to the target, or else to the best point that the error names; all groups where none is exact."""
    wanted: str | list[str] = target
    for _ in range(3):
        try:
            return spa.prune(source, target=wanted, scope=scope, output=output)
        except spa.TargetError as error:
            best = re.findall(r"is (\w+)=\S+ \(([\d.]+) of the original\)", str(error))
            if best:
                wanted = [f"{metric}={share}" for metric, share in best]
            elif "need --scope all" in str(error):
                scope = "all"
            else:
                raise
    raise AssertionError(f"{source.name}: the point that the error names cannot be reached either")


def test_prunable_share(model: Recorded) -> None:
    analysis = spa.analyze(model.path)
    share = analysis.prunable_parameters / max(analysis.parameters, 1)
    if model.name in EXPLAINED:
        assert share < 0.95, "the explanation is out of date"
        assert not share or analysis.frozen
    else:
        worst = [f"{f.tensor} axis {f.axis}: {f.reason.text} ({f.parameters})" for f in analysis.frozen[:5]]
        assert share >= 0.95, worst
    assert len({g.name for g in analysis.groups}) == len(analysis.groups)


@pytest.mark.parametrize(("scope", "target"), [("exact", "macs=0.7"), ("all", "macs=0.5")])
def test_pruned(model: Recorded, scope: str, target: str, tmp_path: Path) -> None:
    """Verified by `spa` in the run, and exact plans once more from outside, on the recorded inputs."""
    if model.status.startswith("ort-fail"):
        pytest.skip("ONNX Runtime does not load the original")
    output = tmp_path / "small.onnx"
    if model.name == "skl_logreg":
        with pytest.raises(spa.TargetError, match="nothing in this model can be pruned"):
            spa.prune(model.path, target=target, scope=scope, output=output)
        return
    result = as_far_as_possible(model.path, target, scope, output)
    _check(model, result, output)


def _check(model: Recorded, result: spa.Result, output: Path) -> None:
    tolerance = HALF_TOLERANCE if model.name in HALF else TOLERANCE
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error <= tolerance
    assert result.report.macs.after < result.report.macs.before
    plan = json.loads(result.plan.to_json())
    recording = model.path.with_suffix(".npz")
    if recording.is_file() and all(group["exact"] for group in plan["groups"]):
        arrays = np.load(recording)
        feeds = {key[3:]: arrays[key] for key in arrays.files if key.startswith("in:")}
        reference = outside.run(outside.zeroed(onnx.load(model.path), plan), feeds)
        assert outside.difference(reference, outside.run(onnx.load(output), feeds)) <= tolerance


@pytest.mark.parametrize("model", _parameters([m for m in trained() if m.name in QUICK]))
def test_trained(model: Recorded, tmp_path: Path) -> None:
    analysis = spa.analyze(model.path)
    share = analysis.prunable_parameters / analysis.parameters
    assert (share < 0.95) == (model.name in EXPLAINED_TRAINED)
    for scope, target in (("exact", "macs=0.7"), ("all", "macs=0.5")):
        output = tmp_path / f"{scope}.onnx"
        _check(model, as_far_as_possible(model.path, target, scope, output), output)


def test_criteria_beat_chance(tmp_path: Path) -> None:
    """On a trained network the criteria must keep more accuracy than random choices do on average."""
    images = ROOT / "data" / "data" / "cifar10_lossless.npz"
    source = ROOT / "data" / "models" / "resnet20_cifar10_bn.onnx"
    if not images.is_file():
        pytest.skip(MISSING)
    arrays = np.load(images)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels, labels = arrays["test_x"][:250], arrays["test_y"][:250]
    x = ((pixels / 255 - mean[:, None, None]) / std[:, None, None]).astype(np.float32)

    def accuracy(path: Path) -> float:
        (logits,) = outside.run(onnx.load(path), {"input": x}).values()
        return float((logits.argmax(1) == labels).mean())

    def pruned(criterion: str, seed: int = 0) -> float:
        output = tmp_path / f"{criterion}{seed}.onnx"
        spa.prune(source, target="macs=0.85", criterion=criterion, scope="all", seed=seed, output=output, check=False)
        return accuracy(output)

    assert accuracy(source) > 0.9
    chance = np.mean([pruned("random", seed) for seed in range(3)])
    assert pruned("l2") > chance + 0.05
    assert pruned("bn-scale") > chance
