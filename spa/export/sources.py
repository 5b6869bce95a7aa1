"""Which driver a source is for, from what it looks like; nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from spa.errors import UsageError

__all__ = ["find"]

_SCHEMES = {"torch": "from_torch", "jax": "from_jax", "keras": "from_keras"}
_FILES = {".pt2": "from_pt2", ".keras": "from_keras", ".pdmodel": "from_paddle", ".pdiparams": "from_paddle"}
_OWN = "write a function that makes it and loads that, and export torch:package.module:function"
_REFUSED = {
    ".onnx": "is an ONNX file already: it needs no export",
    ".pt": f"holds Python objects, maybe weights without their module: {_OWN}",
    ".pth": f"holds Python objects, maybe weights without their module: {_OWN}",
    ".ckpt": f"is a checkpoint without its model: {_OWN}",
    ".h5": "is of Keras' old format, which may hold Python code: load it and save it as .keras",
    ".pkl": "holds Python objects, which are never loaded: write the model with its own framework's exporter",
    ".tflite": "is a compiled model: export the model that it was made of",
}
_FOLDERS: tuple[tuple[str, Callable[[Path], bool]], ...] = (
    ("from_saved_model", lambda p: (p / "saved_model.pb").is_file()),
    ("from_hugging_face", lambda p: (p / "config.json").is_file() and any(p.glob("*.safetensors"))),
    ("from_paddle", lambda p: any(p.glob("*.pdiparams"))),
)
_KINDS = (
    "torch:package.module:factory, keras:..., jax:package.module:function, a .pt2 or .keras file, or a folder: "
    "SavedModel, Hugging Face (config.json and safetensors), Paddle inference"
)


def find(source: str | os.PathLike[str]) -> tuple[str, str]:
    """The driver for a source, and what it opens.

    Raises:
        UsageError: there is no driver for it, or no such file.
    """
    text = os.fspath(source)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _SCHEMES:
        return _SCHEMES[scheme], rest
    path = Path(text)
    if not path.exists():
        raise UsageError(f"{text}: there is no such file or folder; sources are {_KINDS}")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in _REFUSED:
        raise UsageError(f"{text}: {_REFUSED[suffix]}")
    if path.is_file() and suffix in _FILES:
        return _FILES[suffix], str(path)
    if path.is_file() and suffix == ".json" and path.with_suffix(".pdiparams").is_file():
        return "from_paddle", str(path)
    if path.is_dir():
        for driver, fits in _FOLDERS:
            if fits(path):
                return driver, str(path)
        if any(path.glob("pytorch_model*.bin")):
            raise UsageError(
                f"{text}: its weights are Python objects (.bin), never loaded; save it again as safetensors"
            )
    raise UsageError(f"{text}: is no model that is known here; sources are {_KINDS}")
