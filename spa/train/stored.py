"""Tensors in files, by name: .npz, .safetensors, and .pt as torch reads it without running code."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy
import numpy as np
import torch

from spa.errors import UsageError
from spa.feeds import read_npz

_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
}  # fmt: skip
_HEADER = 100 << 20
"""The format's own limit of its header."""


def read(path: Path) -> Mapping[str, Any]:
    """Tensors or arrays by name. Raises: UsageError if the file cannot be read, or is of another kind."""
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _torch(path)
    raise UsageError(f"{path}: weights are read from .npz, .safetensors, .pt, .pth or .bin files; save them as one.")


def _safetensors(path: Path) -> dict[str, Any]:
    """https://huggingface.co/docs/safetensors: the length of a JSON header, the header, the bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    try:
        length = int.from_bytes(data[:8], "little")
        if not 0 < length <= min(_HEADER, len(data) - 8):
            raise ValueError("length of the header")
        header = json.loads(data[8 : 8 + length])
        body = memoryview(data)[8 + length :]
        out = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            kind, shape = np.dtype(_TYPES[entry["dtype"]]), [int(n) for n in entry["shape"]]
            if not 0 <= first <= last <= len(body) or last - first != math.prod(shape) * kind.itemsize:
                raise ValueError(f"bytes of {name}")
            out[name] = np.frombuffer(body[first:last], dtype=kind).reshape(shape)
        return out
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: is no .safetensors file, or damaged ({error}); save the weights again.") from error


def _torch(path: Path) -> Mapping[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path}: holds more than tensors, which is never loaded; save model.state_dict(), not the model."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: is no file of torch.save, or damaged; save the weights again.") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UsageError(f"{path}: is no state dict; save model.state_dict().")
    return found
