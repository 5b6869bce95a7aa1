"""How images become what a model takes: resize, crop, normalise."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from spa.errors import UsageError
from spa.signature import InputSpec

__all__ = ["PRESETS", "Channels", "Interpolation", "Layout", "Preprocessing", "Target", "resolve"]

Layout = Literal["NCHW", "NHWC"]
Channels = Literal["RGB", "BGR", "GRAY"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]
_COLOURS = (1, 3)
_OPEN = 224
"""Height and width of images where the graph leaves them open, as most image classifiers have it."""
_MARGIN = 256 / 224
"""Shorter side over crop, as torchvision evaluates classifiers."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image: `(pixel * scale - mean) / std` after resizing and cropping its centre."""

    size: int | None = None
    """The shorter side is resized to this many pixels (more, where the crop would not fit); None: no resizing."""
    crop: int | tuple[int, int] | None = None
    """Height and width cut from the centre; None with a `size` means the graph's, otherwise no crop."""
    mean: tuple[float, ...] = (0.0,)
    """Per channel in the order of `channels`, or one for all, in units of scaled pixels."""
    std: tuple[float, ...] = (1.0,)
    """As `mean`."""
    scale: float = 1 / 255
    """What the pixels 0..255 are multiplied by; 1 leaves them."""
    layout: Layout | None = None
    """None: as the graph's input."""
    channels: Channels = "RGB"
    """Order of the channels."""
    interpolation: Interpolation = "bilinear"
    """How pixels are interpolated, with anti-aliasing as Pillow does it."""

    def __post_init__(self) -> None:
        """Raises: UsageError for a value out of range."""
        sides = self.crop if isinstance(self.crop, tuple) else (self.crop,)
        if any(side is not None and side < 1 for side in (self.size, *sides)):
            raise UsageError(f"preprocess: size and crop must be 1 or more, not {self.size} and {self.crop}.")
        count = 1 if self.channels == "GRAY" else 3
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, count):
                raise UsageError(
                    f"preprocess: {what} has {len(values)} values for {count} channel(s): give 1 or {count}."
                )
        numbers = (*self.mean, *self.std, self.scale)
        if not all(map(math.isfinite, numbers)) or 0 in self.std or self.scale == 0:
            raise UsageError("preprocess: mean, std and scale must be finite, and std and scale not 0.")


@dataclass(frozen=True)
class Target:
    """An image input of a graph."""

    name: str
    layout: Layout
    channels: int
    """1 or 3."""
    height: int | None
    """None where the graph leaves it open."""
    width: int | None

    @staticmethod
    def of(spec: InputSpec, sizes: Mapping[str, int]) -> Target:
        """What `spec` takes; `sizes` gives open axes a size, by symbol or as `input:axis`.

        Raises: UsageError if it takes no images.
        """
        shape = spec.shape
        if shape is None or len(shape) != 4:
            raise UsageError(f"input {spec.name!r} takes no images: these need 4 axes, with 1 or 3 channels.")
        dims = [
            d if isinstance(d, int) else sizes.get(f"{spec.name}:{k}", sizes.get(d or "")) for k, d in enumerate(shape)
        ]
        first, last = dims[1], dims[3]
        layout: Layout = "NHWC" if last in _COLOURS and first not in _COLOURS else "NCHW"
        channels = last if layout == "NHWC" else first
        if channels is not None and channels not in _COLOURS:
            raise UsageError(f"input {spec.name!r} has {channels} channels, but images have 1 or 3: use an .npz file.")
        height, width = (dims[1], dims[2]) if layout == "NHWC" else (dims[2], dims[3])
        return Target(spec.name, layout, channels or 3, height, width)


# ---- descriptions -----------------------------------------------------------------------------------------------

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
PRESETS: Mapping[str, tuple[float | None, Mapping[str, Any]]] = {
    "imagenet": (_MARGIN, _IMAGENET),
    "cifar10": (None, _CIFAR10),
    "tf": (1.0, {"mean": (0.5,), "std": (0.5,)}),
    "caffe": (_MARGIN, {"mean": (104.0, 117.0, 123.0), "scale": 1.0, "channels": "BGR"}),
    "unit": (1.0, {}),
}
"""By name: shorter side over crop (None: no resizing), and what is not as in `Preprocessing`."""


def resolve(description: str | os.PathLike[str] | Preprocessing, target: Target) -> Preprocessing:
    """The preprocessing that a description means for an input; layout and crop are those of the graph if not given.

    Args:
        description: a preset's name, `key=value` pairs (`size=256,crop=224,mean=0.485/0.456/0.406`), a preset's name
            and pairs that overrule it, a JSON object with the same keys and optionally `preset`, or a JSON file.
        target: the input.

    Raises: UsageError for an unknown preset or key, a bad value, or what does not fit the input.
    """
    made = description if isinstance(description, Preprocessing) else _described(description, target)
    if made.layout is None:
        made = dataclasses.replace(made, layout=target.layout)
    if made.layout != target.layout:
        raise UsageError(
            f"preprocess: layout {made.layout} does not fit input {target.name!r}, which is {target.layout}."
        )
    if (made.channels == "GRAY") != (target.channels == 1):
        use = "GRAY" if target.channels == 1 else "RGB or BGR"
        raise UsageError(
            f"preprocess: channels {made.channels} does not fit input {target.name!r} with "
            f"{target.channels} channel(s): use {use}."
        )
    if made.size is not None and made.crop is None and target.height and target.width:
        made = dataclasses.replace(made, crop=(target.height, target.width))
    return made


def _described(description: str | os.PathLike[str], target: Target) -> Preprocessing:
    text = os.fspath(description).strip()
    if text.startswith("{"):
        fields = _json(text, "preprocess")
    elif text.lower().endswith(".json") or not isinstance(description, str):
        try:
            fields = _json(Path(text).read_text(encoding="utf-8"), text)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{text} cannot be read as a preprocessing description: check the path.") from error
    else:
        fields = _pairs(text)
    given = {key: _parsed(key, value) for key, value in fields.items()}
    preset = given.pop("preset", None)
    base = {} if preset is None else _preset(str(preset), target, given)
    if target.channels == 1:
        base.setdefault("channels", "GRAY")
    return Preprocessing(**{**base, **given})


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f'{where} is not valid JSON (line {error.lineno}): give an object such as {{"size": 256}}.'
        ) from error
    if not isinstance(fields, dict):
        raise UsageError(f'{where} must be a JSON object such as {{"size": 256, "crop": 224}}.')
    return fields


def _pairs(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for k, part in enumerate(text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and k == 0:
            key, value = "preset", key
        elif not equals or not key:
            raise UsageError(f"preprocess: {part.strip()!r} is no key=value; write such as size=256,crop=224.")
        if key in fields:
            raise UsageError(f"preprocess: {key} is given twice.")
        fields[key] = value
    return fields


def _preset(name: str, target: Target, given: Mapping[str, Any]) -> dict[str, Any]:
    if name not in PRESETS:
        raise UsageError(
            f"unknown preprocess {name!r}: choose one of {', '.join(PRESETS)}, a .json file, or key=value pairs "
            "such as size=256,crop=224."
        )
    margin, fields = PRESETS[name]
    made = dict(fields)
    if margin is not None:
        crop = given.get("crop") or (target.height or _OPEN, target.width or _OPEN)
        longest = max(crop) if isinstance(crop, tuple) else crop
        made |= {"size": round(longest * margin), "crop": crop}
    if target.channels == 1:  # a grey picture is as bright as the mean of the colours
        made |= {key: (sum(made[key]) / len(made[key]),) for key in ("mean", "std") if key in made}
        made["channels"] = "GRAY"
    return made


def _parsed(key: str, value: Any) -> Any:
    reader = _READERS.get(key)
    if reader is None:
        raise UsageError(f"preprocess: unknown key {key!r}; choose from {', '.join(_READERS)}.")
    try:
        return reader(value)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"preprocess: {key} cannot be {value!r}; write it such as {_EXAMPLES[key]}.") from error


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _maybe(value: Any) -> int | None:
    return None if value in (None, "", "none") else _whole(value)


def _crop(value: Any) -> int | tuple[int, int] | None:
    parts = value.lower().split("x") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if len(parts) == 1:
        return _maybe(parts[0])
    height, width = parts
    return _whole(height), _whole(width)


def _numbers(value: Any) -> tuple[float, ...]:
    parts = value.split("/") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return tuple(float(part) for part in parts)


def _number(value: Any) -> float:
    if isinstance(value, str) and "/" in value:
        top, bottom = value.split("/")
        return float(top) / float(bottom)
    return float(value)


def _choice(options: tuple[str, ...]) -> Callable[[Any], str]:
    known = {option.lower(): option for option in options}

    def read(value: Any) -> str:
        if str(value).lower() not in known:
            raise ValueError
        return known[str(value).lower()]

    return read


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "preset": str,
    "size": _maybe,
    "crop": _crop,
    "mean": _numbers,
    "std": _numbers,
    "scale": _number,
    "layout": _choice(get_args(Layout)),
    "channels": _choice(get_args(Channels)),
    "interpolation": _choice(get_args(Interpolation)),
}
_EXAMPLES: Mapping[str, str] = {
    "preset": "imagenet",
    "size": "256",
    "crop": "224 or 240x320 (height x width)",
    "mean": "0.485/0.456/0.406",
    "std": "0.229/0.224/0.225",
    "scale": "1/255",
    "layout": " or ".join(get_args(Layout)),
    "channels": " or ".join(get_args(Channels)),
    "interpolation": ", ".join(get_args(Interpolation)),
}
