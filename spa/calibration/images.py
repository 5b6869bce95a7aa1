"""Samples from pictures: a folder of image files, or uint8 arrays."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spa.calibration.data import Array, Calibration, assemble, fixed_batch, is_float, spread
from spa.calibration.preprocess import Preprocessing, Target, resolve
from spa.errors import UsageError
from spa.signature import InputSpec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SUFFIXES", "from_arrays", "load_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LIMIT = 8 << 30
"""Bytes of decoded images held at most."""


def load_images(
    folder: Path,
    specs: Sequence[InputSpec],
    *,
    samples: int | None,
    seed: int,
    description: str | os.PathLike[str] | Preprocessing | None,
    sizes: Mapping[str, int],
) -> Calibration:
    """All images below `folder`, sorted by path, or `samples` of them; sub-folders are not taken for classes.

    Raises: UsageError without images or a description, for a file that is no image, for images that end up with
        different sizes or another size than the graph takes, and if Pillow is missing.
    """
    if len(specs) != 1:
        names = ", ".join(repr(spec.name) for spec in specs)
        raise UsageError(f"a folder of images fits models with one input, but this one has {names}: use an .npz file.")
    spec = specs[0]
    target = Target.of(spec, sizes)
    if description is None:
        raise UsageError(
            f"{folder}: say with `preprocess` how images become inputs: imagenet, cifar10, tf, caffe, unit, "
            "a .json file, or such as size=256,crop=224,mean=0.5,std=0.5."
        )
    preprocessing = resolve(description, target)
    paths = _paths(folder)
    chosen = [paths[k] for k in spread(len(paths), samples, seed)]
    module = _pillow()
    out: Array | None = None
    for k, path in enumerate(chosen):
        array = _pixels(_decoded(module, path, preprocessing), preprocessing, target, str(path), module)
        if out is None:
            out = _room(len(chosen), array, str(folder))
        elif array.shape != out.shape[1:]:
            raise UsageError(
                f"{path} gives {_size(array, target)} where {chosen[0]} gives {_size(out[0], target)}: "
                "add a size and a crop to `preprocess`."
            )
        out[k] = array
    assert out is not None  # _paths finds at least one
    return assemble(f"images {folder.name}/", str(folder), [{spec.name: _typed(out, spec)}], None, fixed_batch(specs))


def from_arrays(
    array: Array,
    description: str | os.PathLike[str] | Preprocessing,
    spec: InputSpec,
    sizes: Mapping[str, int],
    where: str,
) -> Array:
    """uint8 images `[n, h, w, c]` or `[n, c, h, w]` in RGB (or grey) as an input takes them.

    Raises: UsageError if these are no such images, and as `load_images`.
    """
    target = Target.of(spec, sizes)
    preprocessing = resolve(description, target)
    if array.ndim == 3 and target.channels == 1:
        array = array[..., None]
    ends = {"NCHW": array.shape[1], "NHWC": array.shape[3]} if array.ndim == 4 else {}
    fitting = [layout for layout, channels in ends.items() if channels == target.channels]
    if not fitting or not array.size:
        raise UsageError(
            f"{where} has {spec.name!r} as uint8 of shape {list(array.shape)}: images are [n, height, width, "
            f"{target.channels}] or [n, {target.channels}, height, width]."
        )
    if (target.layout if target.layout in fitting else fitting[0]) == "NCHW":
        array = array.transpose(0, 2, 3, 1)
    same = preprocessing.size is None and preprocessing.crop is None
    module = None if same else _pillow()
    out: Array | None = None
    for k, image in enumerate(array):
        picture = image if module is None else module.fromarray(image[..., 0] if target.channels == 1 else image)
        pixels = _pixels(picture, preprocessing, target, f"image {k} of {where}", module)
        out = _room(len(array), pixels, where) if out is None else out
        out[k] = pixels
    assert out is not None
    return _typed(out, spec)


def _typed(array: Array, spec: InputSpec) -> Array:
    if is_float(spec.dtype):
        return array.astype(spec.dtype, copy=False)
    low, high = (0, 255) if spec.dtype == np.uint8 else (-128, 127) if spec.dtype == np.int8 else (0, -1)
    rounded = np.rint(array)
    if high < 0 or rounded.min() < low or rounded.max() > high:
        raise UsageError(
            f"input {spec.name!r} takes {spec.dtype}: `preprocess` must give that, such as scale=1 for uint8."
        )
    return rounded.astype(spec.dtype)


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise UsageError("images need Pillow: pip install 'pillow>=10' (or 'spa-prune[data]').") from error


def _paths(folder: Path) -> list[Path]:
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise UsageError(f"{folder} has no images ({', '.join(s[1:] for s in SUFFIXES)}): check the folder.")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _room(count: int, first: Array, where: str) -> Array:
    """Space for all images, if it is reasonable."""
    if count * first.nbytes > LIMIT:
        raise UsageError(
            f"{count} images of {where} would take {count * first.nbytes / (1 << 30):.0f} GiB: "
            "choose some with `samples`."
        )
    return np.empty((count, *first.shape), dtype=first.dtype)


def _decoded(module: Any, path: Path, preprocessing: Preprocessing) -> Image:
    try:
        with module.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise UsageError(
                    f"{path} has more than 8 bits per channel: convert it, or store arrays in an .npz file."
                )
            picture: Image = file.convert("L" if preprocessing.channels == "GRAY" else "RGB")
            return picture
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as an image: repair or remove it.") from error


def _pixels(picture: Any, preprocessing: Preprocessing, target: Target, where: str, module: Any) -> Array:
    """One picture, a Pillow image or `[h, w, c]`, as the model takes it, float32."""
    if not isinstance(picture, np.ndarray):
        picture = np.asarray(_placed(picture, preprocessing, where, module))
    pixels = picture.astype(np.float32).reshape(*picture.shape[:2], target.channels)
    if preprocessing.channels == "BGR":
        pixels = pixels[..., ::-1]
    mean, std = (np.asarray(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))
    pixels = (pixels * np.float32(preprocessing.scale) - mean) / std
    want = (target.height or pixels.shape[0], target.width or pixels.shape[1])
    if pixels.shape[:2] != want:
        raise UsageError(
            f"{where} is {pixels.shape[0]} x {pixels.shape[1]} (height x width), but input {target.name!r} takes "
            f"{want[0]} x {want[1]}: set size and crop in `preprocess`."
        )
    return np.ascontiguousarray(pixels if target.layout == "NHWC" else pixels.transpose(2, 0, 1))


def _placed(picture: Image, preprocessing: Preprocessing, where: str, module: Any) -> Image:
    """Resized and cropped; sizes and offsets are rounded as torchvision does."""
    width, height = picture.size
    crop = preprocessing.crop
    tall, wide = (crop, crop) if isinstance(crop, int) else crop or (1, 1)
    if preprocessing.size is not None:
        shorter = min(width, height)
        side = max(preprocessing.size, -(-tall * shorter // height), -(-wide * shorter // width))
        width, height = (max(int(side * length / shorter), least) for length, least in ((width, wide), (height, tall)))
        if (width, height) != picture.size:
            picture = picture.resize((width, height), module.Resampling[preprocessing.interpolation.upper()])
    if crop is None:
        return picture
    if height < tall or width < wide:
        raise UsageError(
            f"{where} is {height} x {width}, smaller than the crop {tall} x {wide}: set size in `preprocess`."
        )
    top, left = round((height - tall) / 2), round((width - wide) / 2)
    return picture.crop((left, top, left + wide, top + tall))


def _size(array: Array, target: Target) -> str:
    height, width = array.shape[:2] if target.layout == "NHWC" else array.shape[1:]
    return f"{height} x {width}"
