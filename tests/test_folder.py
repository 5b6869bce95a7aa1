"""Folders with a config: what it can say about a pruned model it says, and what it cannot is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import spa
from spa.folder import changed_config
from spa.plan import GroupRecord
from tests.command_line import Ran
from tests.small_models import attention

BERT: dict[str, Any] = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
}
LLAMA = BERT | {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}


def record(name: str, kind: str, units: int, left: int) -> GroupRecord:
    return GroupRecord(name, kind, units, tuple(range(units - left)), True)


def encoder(
    neurons: tuple[int, int] = (64, 64), heads: tuple[int, int] = (4, 4), hidden: int = 32
) -> list[GroupRecord]:
    """Groups of two layers, and a pooler that has as many neurons as the model is wide."""
    out = [record("embedding:hidden", "hidden", 32, hidden), record("pooler:neuron", "neuron", 32, 32)]
    for k in range(2):
        out += [record(f"{k}.mlp:neuron", "neuron", 64, neurons[k]), record(f"{k}.q:head", "head", 4, heads[k])]
    return out


def test_equal_widths_are_written() -> None:
    found = changed_config(BERT, encoder((48, 48)))
    assert found.config == BERT | {"intermediate_size": 48}
    assert (found.changed, found.unsaid) == ({"intermediate_size": (64, 48)}, ())


@pytest.mark.parametrize("neurons", [(48, 40), (48, 64)])
def test_one_number_cannot_say_several_widths(neurons: tuple[int, int]) -> None:
    found = changed_config(BERT, encoder(neurons))
    assert (found.config, found.changed) == (BERT, {})
    assert found.unsaid[0].startswith(f"intermediate_size: 2 layers keep {min(neurons)} to {max(neurons)} of 64")


def test_layers_without_experts_are_not_counted() -> None:
    config = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2}
    routers = [record(f"{k}.router:expert", "expert", 8, 6) for k in (1, 2)]
    assert changed_config(config, routers).config == config | {"n_routed_experts": 6}
    found = changed_config(config, [*routers[:1], record("2.router:expert", "expert", 8, 5)])
    assert (found.config, found.unsaid[0][:41]) == (config, "n_routed_experts: 2 layers keep 5 to 6 of")
    assert changed_config(config, routers[:1]).changed == {}  # of the other layer nothing is known


def test_heads_need_a_size_of_their_own() -> None:
    found = changed_config(BERT, encoder(heads=(2, 2)))
    assert found.config == BERT
    assert "computes a head's size from it" in found.unsaid[0]
    found = changed_config(BERT | {"head_dim": 8}, encoder(heads=(2, 2), hidden=24))
    assert found.changed == {"num_attention_heads": (4, 2), "hidden_size": (32, 24)}


def test_key_value_heads_take_their_queries_along() -> None:
    groups = [record(f"{k}:kv-head", "kv-head", 2, 1) for k in range(2)]
    found = changed_config(LLAMA, groups)
    assert found.changed == {"num_key_value_heads": (2, 1), "num_attention_heads": (4, 2)}
    assert found.config["head_dim"] == 8


@pytest.mark.parametrize(
    "groups",
    [
        [*encoder((48, 48)), record("other:neuron", "neuron", 64, 48)],  # as large, and no layer's
        [record("0.mlp:neuron", "neuron", 64, 48)],  # the other layer's group was not found
        [record("0.q:qk-dim", "qk-dim", 8, 6)],
        [record("pooler:neuron", "neuron", 32, 24)],
    ],
)
def test_what_is_not_known_is_not_guessed(groups: list[GroupRecord]) -> None:
    found = changed_config(BERT, groups)
    assert (found.config, found.changed) == (BERT, {})
    pruned = [g.name for g in groups if g.removed]
    assert [text.partition(": ")[0] for text in found.unsaid] == pruned


# -- whole folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "model"
    (out / "extra").mkdir(parents=True)
    onnx.save(attention(), out / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=256)
    neurons = {g.name: g for g in spa.analyze(out / "model.onnx").groups}["up:neuron"].units
    config = {"num_hidden_layers": 1, "intermediate_size": neurons, "id2label": {"0": "ä"}}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "tokenizer.json").write_text("{}", encoding="utf-8")
    (out / "extra" / "notes.txt").write_text("notes", encoding="utf-8")
    (out / "model_quantized.onnx").write_bytes(b"another")
    return out


def test_a_folder_is_pruned_as_a_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model_quantized.onnx").unlink()
    out = tmp_path / "pruned"
    options = ["--target", "params=0.9", "--kinds", "neuron", "--plan", tmp_path / "plan.json", "--json"]
    body = Ran(capsys, "prune", folder, "-o", out, *options).json()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    change = body["config"]["changed"]["intermediate_size"]
    assert body["output"] == str(out / "model.onnx")
    assert config["intermediate_size"] == change["after"] < change["before"]
    assert config["id2label"] == {"0": "ä"}
    left = {g.name: g for g in spa.analyze(out / "model.onnx").groups}["up:neuron"].units
    assert left == change["after"]
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert found == {"config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "extra/notes.txt"}
    assert (
        Ran(capsys, "verify", folder / "model.onnx", out / "model.onnx", "--plan", tmp_path / "plan.json").status == 0
    )
    again = Ran(capsys, "convert", folder, "-o", tmp_path / "again", "--target", "params=0.9", "--kinds", "neuron")
    assert "config.json: intermediate_size" in again.out
    assert (tmp_path / "again/model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


def test_models_that_were_not_pruned_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, "prune", folder, "-o", tmp_path / "pruned", "--target", "params=0.9")
    assert ran.status == 0, ran.err
    assert "model_quantized.onnx was left out" in ran.out
    assert not (tmp_path / "pruned/model_quantized.onnx").exists()


def test_the_layout_of_model_hubs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model_quantized.onnx").unlink()
    (folder / "onnx").mkdir()
    for name in ("model.onnx", "weights.bin"):
        (folder / name).rename(folder / "onnx" / name)
    (folder / "model.safetensors").write_bytes(b"before pruning")
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").touch()
    body = Ran(capsys, "prune", folder, "-o", tmp_path / "pruned", "--target", "params=0.9", "--json").json()
    assert body["output"] == str(tmp_path / "pruned/onnx/model.onnx")
    assert body["left_out"] == ["model.safetensors"]
    found = {p.relative_to(tmp_path / "pruned").as_posix() for p in (tmp_path / "pruned").rglob("*") if p.is_file()}
    kept = {"config.json", "tokenizer.json", "extra/notes.txt"}
    assert found == kept | {"onnx/model.onnx", "onnx/model.onnx.data"}


def test_a_failing_run_leaves_no_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    assert Ran(capsys, "prune", folder, "-o", tmp_path / "pruned", "--target", "params=1e-6").status == 7
    assert {p.name for p in tmp_path.iterdir()} == before


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(source: Path, out: Path) -> str:
        ran = Ran(capsys, "prune", source, "-o", out, "--target", "params=0.9")
        assert ran.status != 0
        assert ran.err.count("\n") == 1
        return ran.err

    assert "is a folder without config.json" in complaint(tmp_path, tmp_path / "o")
    assert "exists" in complaint(folder, tmp_path)
    assert "inside of the input" in complaint(folder, folder / "o")
    assert "does not exist" in complaint(folder, tmp_path / "a/b")
    (folder / "model.onnx").rename(folder / "decoder.onnx")
    assert "several models (decoder.onnx, model_quantized.onnx)" in complaint(folder, tmp_path / "o")
    (folder / "config.json").write_text("[", encoding="utf-8")
    (folder / "decoder.onnx").unlink()
    assert "config.json: cannot be read" in complaint(folder, tmp_path / "o")


# -- with transformers ------------------------------------------------------------------------------------------------


def built(config: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that transformers makes from a config."""
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoConfig.from_pretrained(str(folder))
    model = getattr(transformers, config["architectures"][0])(loaded)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_transformers_builds_the_pruned_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=99,
        max_position_embeddings=64,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "hf")
    (tmp_path / "exported").mkdir()
    model = tmp_path / "exported/model.onnx"
    assert Ran(capsys, "export", tmp_path / "hf", "-o", model).status == 0
    (tmp_path / "exported/config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    options = ["--target", "units=0.75", "--kinds", "neuron", "--allocation", "uniform", "--json"]
    body = Ran(capsys, "prune", tmp_path / "exported", "-o", tmp_path / "pruned", *options).json()
    assert not body["config"]["unsaid"]
    parameters = built(json.loads((tmp_path / "pruned/config.json").read_text()), tmp_path / "pruned")
    weights = {t.name: tuple(t.dims) for t in onnx.load(tmp_path / "pruned/model.onnx").graph.initializer}
    biases = [name for name in weights if name in parameters]
    assert any("intermediate" in name for name in biases)
    assert {name: weights[name] for name in biases} == {name: parameters[name] for name in biases}
    count = sum(int(np.prod(shape)) for name, shape in parameters.items() if "pooler" not in name)
    assert abs(count - body["parameters"]["after"]) < 0.05 * count  # the graph holds the scale of attention, too
