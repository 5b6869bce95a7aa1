"""Calibration data: images and how they are preprocessed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from spa.calibration import Preprocessing, load_calibration
from spa.calibration.images import LIMIT
from spa.errors import UsageError
from tests.test_calibration import model

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
FLOAT = TensorProto.FLOAT
CIFAR_LIKE = model(x=(["n", 3, 32, 32], FLOAT))
OPEN = model(x=(["n", 3, "h", "w"], FLOAT))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def photo(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth, so that JPEG and interpolation change little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y * rng.uniform(0.02, 0.1) + x * rng.uniform(0.02, 0.1) + rng.uniform(0, 6)) for _ in range(3)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def folder_of(path: Path, *arrays: np.ndarray[Any, Any]) -> Path:
    path.mkdir(exist_ok=True)
    for k, array in enumerate(arrays):
        Image.fromarray(array).save(path / f"{k}.png")
    return path


def test_pixels_of_the_graphs_size_are_only_normalised(tmp_path: Path) -> None:
    arrays = [photo(32, 32, k) for k in range(3)]
    folder = folder_of(tmp_path / "set", *arrays)
    calibration = load_calibration(folder, CIFAR_LIKE, preprocess="mean=0.485/0.456/0.406,std=0.229/0.224/0.225")
    assert (calibration.name, calibration.samples, calibration.labels) == ("images set/", 3, None)
    expected = ((np.stack(arrays) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(calibration.feeds[0]["x"], expected, atol=1e-5)
    cifar = load_calibration(folder, CIFAR_LIKE, preprocess="cifar10").feeds[0]["x"]
    own = (np.stack(arrays) / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    np.testing.assert_allclose(cifar, own.transpose(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 260), (256, 256), (100, 90)])
def test_imagenet_resizes_the_shorter_side_and_takes_the_centre(height: int, width: int, tmp_path: Path) -> None:
    array = photo(height, width)
    folder = folder_of(tmp_path / "set", array)
    got = load_calibration(folder, model(x=(["n", 3, 224, 224], FLOAT)), preprocess="imagenet").feeds[0]["x"][0]
    shorter = min(height, width)
    size = (256 * width // shorter, 256 * height // shorter)
    resized = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BILINEAR))
    top, left = round((resized.shape[0] - 224) / 2), round((resized.shape[1] - 224) / 2)
    cut = resized[top : top + 224, left : left + 224]
    np.testing.assert_allclose(got, ((cut / 255 - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)


def test_sizes_follow_the_graph(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", photo(300, 400), photo(400, 300, 1))
    for preset in ("imagenet", "caffe", "tf", "unit"):
        assert load_calibration(folder, CIFAR_LIKE, preprocess=preset).feeds[0]["x"].shape == (2, 3, 32, 32)
        assert load_calibration(folder, OPEN, preprocess=preset).feeds[0]["x"].shape == (2, 3, 224, 224)
    wide = model(x=([1, 3, 96, 128], FLOAT))
    calibration = load_calibration(folder, wide, preprocess="imagenet")
    assert calibration.feeds[0]["x"].shape == (2, 3, 96, 128)
    assert [len(batch["x"]) for batch in calibration.batches(8)] == [1, 1]
    sizes = load_calibration(folder, OPEN, preprocess="unit", dims={"h": 48, "w": 64})
    assert sizes.feeds[0]["x"].shape == (2, 3, 48, 64)
    nhwc = load_calibration(folder, model(x=(["n", 64, 64, 3], FLOAT)), preprocess="unit").feeds[0]["x"]
    nchw = load_calibration(folder, model(x=(["n", 3, 64, 64], FLOAT)), preprocess="unit").feeds[0]["x"]
    np.testing.assert_array_equal(nhwc.transpose(0, 3, 1, 2), nchw)


def test_values_of_the_presets(tmp_path: Path) -> None:
    flat = np.empty((224, 224, 3), np.uint8)
    flat[:] = (255, 0, 51)  # red, green, blue
    folder = folder_of(tmp_path / "set", flat, photo(224, 224))
    graph = model(x=(["n", 3, 224, 224], FLOAT))
    expected = {
        "tf": (1, -1, -0.6),
        "unit": (1, 0, 0.2),
        "caffe": (51 - 104, 0 - 117, 255 - 123),
        "imagenet": tuple((np.array([1, 0, 0.2]) - MEAN) / STD),
        "unit,scale=1": (255, 0, 51),
        "unit,channels=BGR": (0.2, 0, 1),
        "scale=1/255,mean=0.5,std=0.25": (2, -2, -1.2),
    }
    for text, values in expected.items():
        got = load_calibration(folder, graph, preprocess=text).feeds[0]["x"][0, :, 100, 100]
        np.testing.assert_allclose(got, values, atol=1e-4, err_msg=text)
    grey = load_calibration(folder, model(x=(["n", 1, 224, 224], FLOAT)), preprocess="unit").feeds[0]["x"]
    assert grey.shape == (2, 1, 224, 224)
    assert grey[0, 0, 9, 9] == pytest.approx((0.299 * 255 + 0.114 * 51) / 255, abs=0.01)


def test_all_descriptions_mean_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", photo(80, 100), photo(120, 90, 1))
    body = {"size": 48, "crop": [40, 36], "mean": [0.5, 0.4, 0.3], "std": 0.2, "interpolation": "bicubic"}
    (tmp_path / "p.json").write_text(json.dumps(body))
    made = Preprocessing(size=48, crop=(40, 36), mean=(0.5, 0.4, 0.3), std=(0.2,), interpolation="bicubic")
    text = "size=48,crop=40x36,mean=0.5/0.4/0.3,std=0.2,interpolation=bicubic,layout=nchw"
    forms = [json.dumps(body), str(tmp_path / "p.json"), tmp_path / "p.json", made, text, "tf," + text]
    digests = {load_calibration(folder, OPEN, preprocess=form).digest for form in forms}
    assert len(digests) == 1
    assert load_calibration(folder, OPEN, preprocess="size=48,crop=40x36").digest not in digests


def test_files_are_found_below_and_sorted(tmp_path: Path) -> None:
    for k, name in enumerate(("b/x.PNG", "a/z.jpeg", "a/y.webp", "c.bmp", ".hidden.png", "notes.md")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as stream:
            suffix = name.split(".")[-1].upper()
            Image.new("RGB", (8, 8), (40 * k, 0, 0)).save(stream, suffix if suffix != "MD" else "PNG")
    got = load_calibration(tmp_path, model(x=(["n", 3, 8, 8], FLOAT)), preprocess="scale=1").feeds[0]["x"]
    np.testing.assert_allclose(got[:, 0].mean(axis=(1, 2)), [80, 40, 0, 120], atol=4)


def test_samples_are_chosen_before_anything_is_decoded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", *(photo(32, 32, k) for k in range(12)))
    few = load_calibration(folder, CIFAR_LIKE, preprocess="unit", samples=4, seed=5)
    assert few.samples == 4
    everything = load_calibration(folder, CIFAR_LIKE, preprocess="unit").feeds[0]["x"]
    chosen = [k for k in range(12) if (few.feeds[0]["x"] == everything[k]).all(axis=(1, 2, 3)).any()]
    assert len(chosen) == 4
    for k in set(range(12)) - set(chosen):
        (folder / f"{k}.png").write_bytes(b"broken")
    # the files sort as 0, 1, 10, 11, 2, ...: chosen by position, named by number
    names = sorted(p.name for p in folder.iterdir())
    for k, name in enumerate(names):
        if k in chosen:
            Image.fromarray(photo(32, 32, k)).save(folder / name)
        else:
            (folder / name).write_bytes(b"broken")
    assert load_calibration(folder, CIFAR_LIKE, preprocess="unit", samples=4, seed=5).samples == 4
    with pytest.raises(UsageError, match=r"\.png cannot be read as an image"):
        load_calibration(folder, CIFAR_LIKE, preprocess="unit")


def test_images_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "set", photo(40, 32), photo(32, 48, 1))
    for graph, options, message in (
        (CIFAR_LIKE, {}, "say with `preprocess`"),
        (CIFAR_LIKE, {"preprocess": "cifar10"}, r"0\.png is 40 x 32 .* takes 32 x 32: set size and crop"),
        (OPEN, {"preprocess": "cifar10"}, r"1\.png gives 32 x 48 where .*0\.png gives 40 x 32"),
        (OPEN, {"preprocess": "crop=36"}, "smaller than the crop 36 x 36"),
        (model(x=(["n", 7], FLOAT)), {"preprocess": "unit"}, "'x' takes no images"),
        (model(x=(["n", 7, 9, 9], FLOAT)), {"preprocess": "unit"}, "7 channels"),
        (model(x=(["n", 3, 9, 9], FLOAT), y=(["n"], FLOAT)), {"preprocess": "unit"}, "has 'x', 'y'"),
    ):
        with pytest.raises(UsageError, match=message):
            load_calibration(folder, graph, **options)
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(folder / "2.png")
    with pytest.raises(UsageError, match=r"2\.png has more than 8 bits"):
        load_calibration(folder, CIFAR_LIKE, preprocess="unit")
    data = io.BytesIO()
    Image.fromarray(photo(300, 300)).save(data, "PNG")
    (folder / "2.png").write_bytes(data.getvalue()[:2000])
    with pytest.raises(UsageError, match=r"2\.png cannot be read as an image"):
        load_calibration(folder, CIFAR_LIKE, preprocess="unit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no images"):
        load_calibration(tmp_path / "empty", CIFAR_LIKE, preprocess="unit")
    with pytest.raises(UsageError, match="is one image: give the folder"):
        load_calibration(folder / "0.png", CIFAR_LIKE, preprocess="unit")
    monkeypatch.setattr("spa.calibration.images.LIMIT", LIMIT >> 23)
    with pytest.raises(UsageError, match="choose some with `samples`"):
        load_calibration(folder_of(tmp_path / "set2", photo(32, 32)), CIFAR_LIKE, preprocess="unit")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match="pip install 'pillow>=10'"):
        load_calibration(folder, CIFAR_LIKE, preprocess="unit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "unknown preprocess 'imagnet': choose one of imagenet, cifar10"),
        ("sise=3", "unknown key 'sise'"),
        ("size=big", "size cannot be 'big'"),
        ("size=0", "must be 1 or more"),
        ("size=2.5", "size cannot be '2.5'"),
        ("crop=1x2x3", "crop cannot be"),
        ("mean=0.5/0.5", "mean has 2 values for 3"),
        ("std=0", "std and scale not 0"),
        ("mean=nan", "must be finite"),
        ("scale=1/0", "scale cannot be '1/0'"),
        ("layout=HWC", "layout cannot be 'HWC'; write it such as NCHW or NHWC"),
        ("layout=NHWC", "layout NHWC does not fit input 'x', which is NCHW"),
        ("channels=GRAY", "GRAY does not fit"),
        ("size=3,size=4", "size is given twice"),
        ("size=3,crop", "'crop' is no key=value"),
        ("", "unknown preprocess ''"),
        ('{"size": ', "not valid JSON"),
        ("gone.json", r"gone\.json cannot be read"),
    ],
)
def test_descriptions_that_mean_nothing(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_calibration(folder_of(tmp_path / "set", photo(32, 32)), CIFAR_LIKE, preprocess=text)


def test_arrays_of_pixels_are_preprocessed_like_files(tmp_path: Path) -> None:
    arrays = np.stack([photo(40, 48, k) for k in range(5)])
    np.savez(tmp_path / "hwc.npz", x=arrays, labels=np.arange(5))
    np.savez(tmp_path / "chw.npz", x=arrays.transpose(0, 3, 1, 2))
    for text in ("imagenet", "tf", "size=36,crop=32,channels=BGR"):
        files = load_calibration(folder_of(tmp_path / "set", *arrays), CIFAR_LIKE, preprocess=text).feeds[0]["x"]
        for name in ("hwc", "chw"):
            calibration = load_calibration(tmp_path / f"{name}.npz", CIFAR_LIKE, preprocess=text)
            np.testing.assert_array_equal(calibration.feeds[0]["x"], files)
    some = load_calibration(tmp_path / "hwc.npz", CIFAR_LIKE, preprocess="tf", samples=2)
    assert some.labels is not None
    whole = load_calibration(tmp_path / "hwc.npz", CIFAR_LIKE, preprocess="tf")
    np.testing.assert_array_equal(some.feeds[0]["x"], whole.feeds[0]["x"][some.labels])
    np.savez(tmp_path / "float.npz", x=np.ones((2, 3, 32, 32), np.float32))
    with pytest.raises(UsageError, match="no uint8 images"):
        load_calibration(tmp_path / "float.npz", CIFAR_LIKE, preprocess="tf")
    np.savez(tmp_path / "odd.npz", x=np.ones((2, 5, 32, 32), np.uint8))
    with pytest.raises(UsageError, match=r"uint8 of shape \[2, 5, 32, 32\]: images are"):
        load_calibration(tmp_path / "odd.npz", CIFAR_LIKE, preprocess="tf")


def test_a_quantised_input_gets_whole_numbers(tmp_path: Path) -> None:
    arrays = [photo(32, 32, k) for k in range(2)]
    graph = model(x=(["n", 32, 32, 3], TensorProto.UINT8))
    got = load_calibration(folder_of(tmp_path / "set", *arrays), graph, preprocess="scale=1").feeds[0]["x"]
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.stack(arrays))
    with pytest.raises(UsageError, match="takes uint8: `preprocess` must give that"):
        load_calibration(tmp_path / "set", graph, preprocess="tf")


def test_recorded_images_score_as_published(data_root: Path, tmp_path: Path) -> None:
    """The real test images through a real network: preprocessing that is off by anything would show."""
    from spa.runtime import open_session, run
    from spa.signature import as_ir

    path = data_root / "data" / "models" / "resnet20_cifar10_bn.onnx"
    source = data_root / "data" / "data" / "cifar10_lossless.npz"
    if not path.is_file() or not source.is_file():
        pytest.skip(f"no trained models in {data_root}")
    with np.load(source, allow_pickle=False) as data:
        arrays = {"input": data["test_x"], "labels": data["test_y"]}
    np.savez(tmp_path / "test.npz", **arrays)
    description = "mean=0.485/0.456/0.406,std=0.229/0.224/0.225"
    calibration = load_calibration(tmp_path / "test.npz", as_ir(path), preprocess=description)
    session = open_session(path, provider="cpu", threads=2)
    scores = np.concatenate([next(iter(run(session, batch).values())) for batch in calibration.batches(64)])
    assert calibration.labels is not None
    assert (scores.argmax(axis=1) == calibration.labels).mean() == pytest.approx(0.9172, abs=0.003)
