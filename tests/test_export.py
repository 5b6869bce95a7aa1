"""spa export: what comes out of torch computes what the module does, or nothing is written; what cannot be opened."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import spa
from spa.errors import ModelError, RuntimeFailure, UnsupportedModelError, UsageError, VerifyError
from spa.export.check import compare
from spa.export.process import Worker, Written
from spa.export.request import Input, Request, parse_input
from spa.export.run import _read, export
from spa.export.sources import find
from spa.runtime import open_session, run
from tests.command_line import Ran

torch = pytest.importorskip("torch")

FACTORIES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 10)

    def forward(self, image):
        return self.head(self.drop(self.stem(image).mean((2, 3))))


def net():
    print("the factory talks")
    return Net()


def noisy():
    class Noisy(Net):
        def forward(self, image):
            return super().forward(image) + torch.rand(1)

    return Noisy(), torch.zeros(1, 1, 8, 8)


def gone():
    import os

    print("good bye", flush=True)
    os._exit(3)


def number():
    return 3


def failing():
    raise KeyError("no weights")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_a_module_becomes_a_file_that_computes_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--input", "image=1x1x8x8", "--exporter", "torchscript", "--json"]
    ran = Ran(capsys, "export", "torch:factories:net", "-o", folder / "net.onnx", *options)
    assert ran.status == 0, ran.err
    body = ran.json()
    assert body["inputs"] == [{"name": "image", "shape": ["batch", 1, 8, 8], "dtype": "float32"}]
    assert body["outputs"] == ["output"]
    assert body["parameters"] == 8 * 9 + 8 + 8 * 10 + 10  # the norm is folded into the convolution
    assert body["bytes"] == (folder / "net.onnx").stat().st_size
    assert body["verify"]["batches"] == [2, 1, 3]
    assert body["verify"]["max_rel_error"] <= 1e-4
    model = onnx.load(folder / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert not {"Dropout", "RandomUniform"} & {n.op_type for n in model.graph.node}
    assert spa.analyze(folder / "net.onnx").groups

    namespace: dict[str, Any] = {}
    exec(FACTORIES, namespace)
    torch.manual_seed(0)  # the command's default
    module = namespace["net"]().eval()
    x = np.random.default_rng(5).standard_normal((7, 1, 8, 8)).astype(np.float32)
    got = run(open_session(folder / "net.onnx", provider="cpu"), {"image": x})["output"]
    np.testing.assert_allclose(got, module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_what_computes_something_else_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name for p in folder.iterdir()}
    ran = Ran(
        capsys, "export", "torch:factories:noisy", "-o", folder / "net.onnx", "--exporter", "torchscript", "--json"
    )
    assert ran.status == VerifyError.exit_status
    assert "torch:factories:noisy: output 0 of the exported file differs" in ran.json()["error"]["message"]
    assert ran.err.count("\n") == 1
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == before


def test_a_process_that_ends_is_one_sentence(folder: Path) -> None:
    said: list[str] = []
    with pytest.raises(RuntimeFailure, match=r"^torch:factories:gone: .*exit status 3: good bye"):
        export("torch:factories:gone", "net.onnx", inputs=["x=1x1x8x8"], printed=said.append)
    assert said == ["good bye\n"]
    assert not Path("net.onnx").exists()


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("torch:factories:number", UsageError, "gave int; return a torch.nn.Module"),
        ("torch:factories:failing", RuntimeFailure, "failed .KeyError: 'no weights'."),
        ("torch:factories:net", UsageError, "has no example inputs: give --input"),
        ("torch:factories:missing", UsageError, "the module 'factories' has no 'missing'"),
        ("torch:nowhere:net", UsageError, "there is no module 'nowhere'"),
        ("torch:factories", UsageError, "write package.module:name"),
    ],
)
def test_factories_that_do_not_work(
    folder: Path, source: str, error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spa.export.drivers.from_torch import open_source

    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    with pytest.raises(error, match=text):
        open_source(Request("from_torch", find(source)[1]))


def test_a_framework_that_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spa.export.drivers.base import need

    with pytest.raises(UsageError, match=r"needs nosuchframework, .* pip install nosuch-framework, .*--python"):
        need("nosuchframework", "nosuch-framework")
    ran = Ran(capsys, "export", "torch:factories:net", "-o", "net.onnx", "--python", folder / "python")
    assert ran.status == 2
    assert "cannot be started" in ran.err


# -- torch in this process --------------------------------------------------------------------------------------------


class Tables(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch may be missing
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 8)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, ids: Any, mask: Any) -> dict[str, Any]:
        x = self.table(ids) * mask[..., None]
        return {"hidden": self.dropout(x), "table": x.mean(1), "nothing": None}


def source_of(module: Any, request: Request) -> Any:
    from spa.export.drivers.base import made_up
    from spa.export.drivers.from_torch import TorchSource

    return TorchSource(module.eval(), made_up(request.inputs, request.seed), request)


TEXT = (Input("ids", ("batch", "sequence"), "int64"), Input("mask", ("batch", "sequence")))


def test_names_of_outputs_and_of_open_axes(tmp_path: Path) -> None:
    request = Request("from_torch", "", TEXT, "torchscript")
    source = source_of(Tables(), request)
    source.export(tmp_path / "raw.onnx")
    assert source.axes == {"ids": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}}
    wrote = Written(source.exporter, source.examples, source.axes, tuple(source.outputs))
    model = _read(tmp_path / "raw.onnx", "tables", wrote)
    assert [[str(getattr(d, "value", d)) for d in v.shape] for v in model.graph.inputs] == [["batch", "sequence"]] * 2
    assert len(source.run(source.examples)) == 2


def test_outputs_are_named_by_where_they_are() -> None:
    from spa.export.drivers.base import output_names

    def names(outputs: Any) -> list[str]:
        return output_names([path for path, _ in torch.utils._pytree.tree_flatten_with_path(outputs)[0]])

    assert names(1) == names((1,)) == ["output"]
    assert names((1, 2)) == ["output_0", "output_1"]
    assert names({"logits": 1}) == ["logits"]
    assert names({"b": 1, "a": {"c": (2, 3)}}) == ["b", "a.c.0", "a.c.1"]


def test_the_outermost_module_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's older exporter puts the mode of the module it is given back into all modules inside."""
    from spa.export.drivers.from_torch import open_source

    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.9)).eval()
    outer = torch.nn.Sequential(inner).train(False)
    outer.training = True
    (tmp_path / "wrapped.py").write_text("module = None\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import wrapped  # type: ignore[import-not-found]  # written above

    wrapped.module = outer
    source = open_source(Request("from_torch", "wrapped:module", (Input("x", (1, 4)),), "torchscript"))
    first = source.run(source.examples)[0]
    source.export(tmp_path / "raw.onnx")
    assert not any(m.training for m in outer.modules())
    np.testing.assert_array_equal(source.run(source.examples)[0], first)


def test_examples_with_one_row_are_widened() -> None:
    source = source_of(torch.nn.Linear(4, 4), Request("from_torch", "", (Input("x", (1, 4)),)))
    assert source.examples["x"].shape == (2, 4)
    source = source_of(torch.nn.Linear(4, 4), Request("from_torch", "", (Input("x", (1, 4)),), static_batch=True))
    assert source.examples["x"].shape == (1, 4)
    assert source.axes == {"x": {}}


# -- the comparison ---------------------------------------------------------------------------------------------------


class Fake(Worker):
    """A source that computes `function`."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.seen: list[tuple[int, ...]] = []

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        x = feeds["x"]
        self.seen.append(x.shape)
        return [np.asarray(y) for y in self.function(x)]


def doubling(path: Path, shape: Sequence[int | str]) -> Any:
    """2 x."""
    sizes = list(shape)
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
        [two],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return spa.load(path).model


def test_more_than_one_batch_and_length_is_compared(tmp_path: Path) -> None:
    model = doubling(tmp_path / "m.onnx", ["batch", "length"])
    same = Fake(lambda x: [2 * x])
    found = compare(same, tmp_path / "m.onnx", model, {"x": np.ones((2, 5), np.float32)}, 0, {}, "m")
    assert (found.batches, found.runs, found.outputs, found.max_rel_error) == ((2, 1, 3), 3, 1, 0.0)
    assert {shape[0] for shape in same.seen} == {2, 1, 3}
    assert len({shape[1] for shape in same.seen}) > 1
    fixed = doubling(tmp_path / "f.onnx", [2, 4])
    assert compare(Fake(lambda x: [2 * x]), tmp_path / "f.onnx", fixed, {}, 0, {}, "f").runs == 1


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: [2 * x * (1 + 2e-4)], "differs from the source's by 0.0002"),
        (lambda x: [2 * x if len(x) == 2 else 3 * x], "differs .* on a batch of 1"),  # what examples do not show
        (lambda x: [2 * x[:, :1]], r"is \[2, 4\] in the exported file and \[2, 1\] in the source"),
        (lambda x: [2 * x, x], "has 2 outputs, but its export 1"),
    ],
)
def test_differences_are_found(tmp_path: Path, function: Any, text: str) -> None:
    model = doubling(tmp_path / "m.onnx", ["batch", 4])
    with pytest.raises(VerifyError, match=text):
        compare(Fake(function), tmp_path / "m.onnx", model, {"x": np.ones((2, 4), np.float32)}, 0, {}, "m")


# -- what exporters write ---------------------------------------------------------------------------------------------


def written(path: Path, operator: str, **attributes: Any) -> None:
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["unk__1", 4])  # noqa: E731
    node = helper.make_node(operator, ["x"], ["y"], name="node", **attributes)
    graph = helper.make_graph([node, helper.make_node("Relu", ["y"], ["z"])], "g", [value("x")], [value("z")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)


WROTE = Written("an exporter", {}, {"x": {0: "batch"}}, ("logits",))


def test_erfc_becomes_what_onnx_has(tmp_path: Path) -> None:
    import math

    written(tmp_path / "m.onnx", "Erfc")
    model = _read(tmp_path / "m.onnx", "m", WROTE)
    spa.graph.save(model, tmp_path / "out.onnx", external=False)  # type: ignore[attr-defined]  # a module
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    got = run(open_session(tmp_path / "out.onnx", provider="cpu"), {"x": x})["logits"]
    np.testing.assert_allclose(got, np.vectorize(math.erfc)(x), atol=1e-6)


def test_operators_that_no_onnx_has_are_named(tmp_path: Path) -> None:
    written(tmp_path / "m.onnx", "StatefulPartitionedCall")
    with pytest.raises(UnsupportedModelError, match="m: an exporter wrote the operator StatefulPartitionedCall"):
        _read(tmp_path / "m.onnx", "m", WROTE)


def test_an_invalid_file_is_the_exporters(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="m: an exporter wrote a file that is not valid"):
        _read(tmp_path / "m.onnx", "m", WROTE)


def test_a_fixed_axis_is_not_taken_silently(tmp_path: Path) -> None:
    doubling(tmp_path / "m.onnx", [2, 4])
    with pytest.raises(RuntimeFailure, match=r"fixed axis 0 of the input x to 2, .*--static-batch"):
        _read(tmp_path / "m.onnx", "m", WROTE)
    wrote = dataclasses.replace(WROTE, axes={"x": {1: "length"}})
    with pytest.raises(RuntimeFailure, match=r"fixed axis 1 .* a number for length"):
        _read(tmp_path / "m.onnx", "m", wrote)


# -- sources and inputs as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x=1x3x224x224", Input("x", (1, 3, 224, 224))),
        ("x=1x3x224x224:float16", Input("x", (1, 3, 224, 224), "float16")),
        ("ids=batch,sequence:int64", Input("ids", ("batch", "sequence"), "int64")),
        ("v=batch,3", Input("v", ("batch", 3))),
        ("v=7", Input("v", (7,))),
        ("scale=:float32", Input("scale", ())),
    ],
)
def test_inputs_are_read(text: str, found: Input) -> None:
    assert parse_input(text) == found


@pytest.mark.parametrize("text", ["x", "=3", "x=0x3", "x=3x", "x=3:complex64", "x=-1x3", "x=a b"])
def test_bad_inputs_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--input"):
        parse_input(text)


def test_sources_are_told_apart(tmp_path: Path) -> None:
    for name in ("m.pt2", "m.keras", "m.json", "m.pdiparams", "saved/saved_model.pb", "hf/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "hf/model.safetensors").touch()
    (tmp_path / "pd").mkdir()
    (tmp_path / "pd/net.pdiparams").touch()
    found = {name: find(tmp_path / name)[0] for name in ("m.pt2", "m.keras", "m.json", "saved", "hf", "pd")}
    assert found == {
        "m.pt2": "from_pt2",
        "m.keras": "from_keras",
        "m.json": "from_paddle",
        "saved": "from_saved_model",
        "hf": "from_hugging_face",
        "pd": "from_paddle",
    }
    assert find("torch:a.b:c") == ("from_torch", "a.b:c")
    assert find("jax:a.b:c.d") == ("from_jax", "a.b:c.d")
    assert find("keras:a:b") == ("from_keras", "a:b")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.onnx", "is an ONNX file already"),
        ("m.pth", "Python objects"),
        ("m.h5", "save it as .keras"),
        ("m.txt", "is no model that is known here"),
        ("bin", "save it again as safetensors"),
        ("empty", "is no model that is known here"),
        ("missing.keras", "there is no such file"),
    ],
)
def test_what_is_no_source_says_what_to_do(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pytorch_model.bin").touch()
    (tmp_path / "empty").mkdir()
    if not name.startswith("missing") and "." in name:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=text):
        find(tmp_path / name)


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    for name in ("m.keras", "hf/config.json", "hf/model.safetensors", "m.pdmodel", "m.pdiparams"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "link.keras").symlink_to(tmp_path / "m.keras")
    for source, out in (
        ("m.keras", "m.keras"),
        ("m.keras", "link.keras"),
        ("hf", "hf/model.safetensors"),
        ("m.pdmodel", "m.pdiparams"),
    ):
        with pytest.raises(UsageError, match="never overwritten"):
            export(tmp_path / source, tmp_path / out)
    assert (tmp_path / "m.keras").read_text(encoding="utf-8") == "m.keras"


def test_an_input_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--input x: was given twice"):
        export("torch:a:b", tmp_path / "o.onnx", inputs=["x=1x2", "x=1x3"])
