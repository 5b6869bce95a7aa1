"""spa export with real frameworks, in the environments that `make frameworks` makes; skipped where there are none."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest

from spa.errors import ModelError, UnsupportedModelError, UsageError
from spa.export.run import Exported, export

ENVIRONMENTS = Path(__file__).parents[1] / "examples/out/frameworks/environments"

pytestmark = pytest.mark.slow

KERAS = """
import keras
from keras import layers


def network(activation="relu", groups=1, code=False):
    image = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(8, 3, padding="same", groups=groups)(image)
    x = layers.Activation(activation)(layers.BatchNormalization()(x))
    x = layers.Lambda(lambda t: t * 2)(x) if code else x
    return keras.Model(image, layers.Dense(10)(layers.Dropout(0.5)(layers.Flatten()(x))))


def made():
    return network()


if __name__ == "__main__":
    network("gelu", 2).save("odd.keras")
    network(code=True).save("code.keras")
    network().export("saved", verbose=False)
"""
JAX = """
import jax.numpy as jnp
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(1, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, image):
        return self.head(self.drop(nnx.relu(self.norm(self.conv(image))).mean((1, 2))))


def made():
    return Net(nnx.Rngs(0)), (jnp.zeros((1, 8, 8, 1)),)


def pooled(ids):
    return {"pooled": jnp.arange(400.0).reshape(50, 8)[ids].mean(1)}
"""
PADDLE = """
import paddle


class Net(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = paddle.nn.Conv2D(1, 8, 3, padding=1), paddle.nn.BatchNorm2D(8)
        self.drop, self.head = paddle.nn.Dropout(0.5), paddle.nn.Linear(8, 10)

    def forward(self, image):
        return self.head(self.drop(paddle.nn.functional.relu(self.norm(self.conv(image))).mean([2, 3])))


network = Net()
network.eval()
spec = paddle.static.InputSpec([None, 1, 8, 8], "float32", "image")
paddle.jit.save(network, "inference/model", input_spec=[spec])
"""
TORCH = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.drop = torch.nn.Embedding(50, 8), torch.nn.Dropout(0.5)

    def forward(self, ids, mask):
        x = self.table(ids) * mask[..., None]
        return {"hidden": self.drop(x), "embedding": x.mean(1)}


class Looks(torch.nn.Module):
    def forward(self, x):
        return x * float(x.shape[0])


def made():
    return Net()


def looks():
    return Looks(), torch.ones(2, 4)


if __name__ == "__main__":
    rows = torch.export.Dim("rows")
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3)).eval()
    program = torch.export.export(network, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: rows},))
    torch.export.save(program, "model.pt2")
"""
HUGGING_FACE = """
import json

import transformers as t

small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
small |= dict(max_position_embeddings=64)
t.BertModel(t.BertConfig(**small), add_pooling_layer=False).save_pretrained("bert")
t.MixtralForCausalLM(t.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4)).save_pretrained("experts")
config = json.load(open("bert/config.json"))
t.BertModel(t.BertConfig(**small)).save_pretrained("code")
json.dump({**config, "auto_map": {"AutoModel": "own.Net"}}, open("code/config.json", "w"))
json.dump({**config, "num_hidden_layers": 3}, open("code/3.json", "w"))
"""


class Place:
    """A folder with a script, and the Python of an environment."""

    def __init__(self, folder: Path, name: str, script: str, run: bool) -> None:
        self.python = ENVIRONMENTS / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not self.python.is_file():
            pytest.skip(f"no environment {self.python}; `python examples/frameworks/run.py` makes it")
        (folder / "made_here.py").write_text(script, encoding="utf-8")
        if run:
            env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run([self.python, "made_here.py"], env=env, capture_output=True, text=True, check=False)
            if "ModuleNotFoundError" in done.stderr:
                pytest.skip(f"{self.python} lacks a package: {done.stderr.splitlines()[-1]}")
            assert done.returncode == 0, done.stderr

    def export(self, source: str, **options: Any) -> Exported:
        made = export(source, "out.onnx", python=self.python, **options)
        onnx.checker.check_model(onnx.load("out.onnx"), full_check=True)
        assert made.verify is not None
        return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_keras(folder: Path) -> None:
    place = Place(folder, "keras", KERAS, run=True)
    made = place.export("odd.keras")  # exact GELU and groups
    assert made.verify is not None
    assert made.verify.batches == (2, 1, 3)
    assert made.outputs == ("output",)
    assert {"Erf", "Conv"} <= {n.op_type for n in onnx.load("out.onnx").graph.node}
    assert place.export("saved").inputs[0].shape == ("batch", 8, 8, 4)
    assert place.export("keras:made_here:made", static_batch=True).inputs[0].shape == (2, 8, 8, 4)
    with pytest.raises(UnsupportedModelError, match="Lambda layer"):
        place.export("code.keras")


def test_jax(folder: Path) -> None:
    place = Place(folder, "jax", JAX, run=False)
    assert place.export("jax:made_here:made").inputs[0].shape == ("batch", 8, 8, 1)
    made = place.export("jax:made_here:pooled", inputs=["ids=batch,length:int32"])
    assert made.outputs == ("pooled",)
    assert made.inputs[0].shape == ("batch", "length")
    with pytest.raises(UsageError, match=r"cannot be called without arguments .*give --input"):
        place.export("jax:made_here:pooled")


def test_paddle(folder: Path) -> None:
    place = Place(folder, "paddle", PADDLE, run=True)
    assert place.export("inference").inputs[0].shape == ("batch", 1, 8, 8)
    (folder / "inference/model.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded by Paddle"):
        place.export("inference")


def test_torch(folder: Path) -> None:
    place = Place(folder, "torch", TORCH, run=True)
    inputs = ["ids=batch,length:int64", "mask=batch,length"]
    made = place.export("torch:made_here:made", inputs=inputs, exporter="dynamo")
    assert made.outputs[0] == "hidden"
    assert made.outputs[1] == "embedding_"  # a value inside is called embedding
    nodes = onnx.load("out.onnx").graph.node
    assert not any(str(folder) in p.value for n in nodes for p in n.metadata_props)
    assert place.export("model.pt2").inputs[0].shape == ("batch", 1, 8, 8)
    assert place.export("torch:made_here:looks", static_batch=True).inputs[0].shape == (2, 4)


def test_hugging_face(folder: Path) -> None:
    place = Place(folder, "torch", HUGGING_FACE, run=True)
    made = place.export("bert")
    assert [i.name for i in made.inputs] == ["input_ids", "attention_mask"]
    assert made.outputs == ("last_hidden_state",)  # it was saved without a pooler
    assert place.export("experts").outputs == ("logits",)
    with pytest.raises(UnsupportedModelError, match="Python code of its own"):
        place.export("code")
    (folder / "code/config.json").write_text((folder / "code/3.json").read_text(), encoding="utf-8")
    with pytest.raises(ModelError, match=r"has no weights for .*layer\.2"):
        place.export("code")
    assert json.loads((folder / "bert/config.json").read_text())["model_type"] == "bert"
