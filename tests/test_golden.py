"""The groups of many models, as text under version control: a change of a rule shows what it does to real graphs.

`pytest tests/test_golden.py --update-golden` rewrites the files; read the difference before you commit it.
"""

from __future__ import annotations

import difflib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import spa
from spa.groups import Analysis, Group, Member
from tests.models import BUILT
from tests.zoo import MISSING, recorded

FOLDER = Path(__file__).parent / "golden"
ZOO = (
    "attn_timm_qkv5d_ts", "channel_gather_slice_pad_dy", "convnext_hand_dy", "crnn_ts", "decoder_kvcache_dy",
    "edsr_unshuffle_ts", "film_adain_dy", "hand_attention23", "hand_bilinear_outer", "hf_bart_dy", "hf_deberta_dy",
    "hf_llama_eager_ts", "hf_segformer_dy", "hf_t5_enc_dy", "jax_convt_gn", "jax_mobilenet_group", "loop_script_ts",
    "mlp3d_dynq", "mobilenetv2_qdq_pc", "mobilenetv3_ts", "paddle_transformer", "paddle_unet", "repvgg_branch_dy",
    "rnn_tanh_ts", "shufflenet_v2_slim", "siamese_dy", "tf_gqa_keras", "tf_tcn1d_t2o", "tf_vit_keras",
    "unet_nearest_gn_f16conv", "vit_op23_attention_dy",
)  # fmt: skip


def listing(analysis: Analysis) -> str:
    """The groups of a model, for people."""
    share = analysis.prunable_parameters / max(analysis.parameters, 1)
    lines = [f"parameters {analysis.parameters}, prunable {share:.1%}"]
    for group in sorted(analysis.groups, key=lambda g: g.name):
        lines += ["", *_group(analysis, group)]
    reasons = Counter(f.reason.text for f in analysis.frozen)
    lines += ["", "frozen axes of weights"]
    lines += [f"    {count:4} {text}" for text, count in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def _group(analysis: Analysis, group: Group) -> list[str]:
    sizes = analysis.coupling.solution.leaf_size
    leaves = sorted(f"{count} of {sizes[leaf]}" for leaf, count in group.leaves.items())
    state = "exact" if group.exact else f"statistic ({group.inexact})"
    head = f"{group.name}  {group.kind}  {group.units} units  {state}  [{', '.join(leaves)}]"
    return [head, *(f"    {text}" for text in sorted(_member(analysis, m) for m in group.members))]


def _member(analysis: Analysis, member: Member) -> str:
    shape = "x".join(str(k) for k in analysis.coupling.weights[member.value].shape)
    use = f" in {member.use[0].outputs[0].name}" if member.use is not None else ""
    return f"{member.tensor} [{shape}] axis {member.axis} {member.role}{use}"


def _check(name: str, analysis: Analysis, update: bool) -> None:
    path, text = FOLDER / f"{name}.txt", listing(analysis)
    if update:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    expected = path.read_text(encoding="utf-8") if path.is_file() else ""
    changed = difflib.unified_diff(expected.splitlines(), text.splitlines(), f"golden/{name}.txt", "now", lineterm="")
    if text != expected:
        pytest.fail("\n".join(["the groups changed (--update-golden accepts this):", *changed]), pytrace=False)


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.mark.parametrize("name", list(BUILT))
def test_built(name: str, update: bool) -> None:
    _check(f"built_{name}", spa.analyze(BUILT[name].build()), update)


@pytest.mark.parametrize("name", ZOO)
def test_recorded(name: str, update: bool) -> None:
    found: dict[str, Any] = {m.name: m.path for m in recorded()}
    if not found:
        pytest.skip(MISSING)
    _check(f"zoo_{name}", spa.analyze(found[name]), update)


def test_no_file_without_a_model() -> None:
    expected = {f"built_{name}.txt" for name in BUILT} | {f"zoo_{name}.txt" for name in ZOO}
    assert {path.name for path in FOLDER.iterdir()} == expected
