"""Samples from text: a file of lines, a tokenizer, one bucket per length."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spa.calibration.data import Array, Calibration, assemble, fixed_batch, is_float, spread
from spa.errors import UsageError
from spa.signature import InputSpec

__all__ = ["LENGTH", "load_text"]

LENGTH = 128
"""Tokens of a text at most, where neither the user nor the graph says."""
Role = Literal["ids", "mask", "types", "positions"]
Text = str | tuple[str, str]


def load_text(
    path: Path,
    specs: Sequence[InputSpec],
    bounds: Mapping[str, int],
    *,
    samples: int | None,
    seed: int,
    tokenizer: str | os.PathLike[str] | None,
    max_length: int | None,
) -> Calibration:
    """Texts as token ids, with attention mask, token types and positions where the graph asks for them.

    Texts are cut at `max_length` tokens, special ones included. Where the graph leaves the sequence length open
    there is one bucket per length and nothing is padded. Where the graph fixes it, texts are padded if there is an
    attention mask to say so; without one they are laid end to end and cut into pieces of that length, as language
    models are trained.

    Args:
        path: `.txt` with one text per line, or `.jsonl` with strings or objects with `text` and maybe `text_pair`.
        specs: the model's inputs.
        bounds: by input, one more than the largest index.
        samples: at most so many texts, evenly spread.
        seed: of that choice.
        tokenizer: a `tokenizer.json` of the library `tokenizers`.
        max_length: 128 by default, or what the graph's sequence or table of positions allows.

    Raises: UsageError for a file without texts, a missing or damaged tokenizer, one of another vocabulary, inputs that
        text cannot fill, and if the library is missing.
    """
    roles = _roles(specs, path)
    ids = next(spec for spec in specs if roles[spec.name] == "ids")
    if tokenizer is None:
        raise UsageError(f"{path}: text needs `tokenizer`, the path of the model's tokenizer.json.")
    fixed = _fixed_length(specs)
    length = _max_length(
        max_length,
        fixed,
        min((bounds[s.name] for s in specs if roles[s.name] == "positions" and s.name in bounds), default=LENGTH),
    )
    texts = _texts(path)
    texts = [texts[k] for k in spread(len(texts), samples, seed)]
    encoder = _tokenizer(tokenizer)
    encoder.no_padding()
    encoder.enable_truncation(length)
    rows = [(e.ids, e.type_ids) for e in encoder.encode_batch(texts) if e.ids]
    if not rows:
        raise UsageError(f"{tokenizer} gives no tokens for any text of {path}: check that both belong to the model.")
    _check_vocabulary(rows, bounds.get(ids.name), ids.name, Path(tokenizer))
    masked = "mask" in roles.values()
    if fixed is None:
        groups: dict[int, list[tuple[list[int], list[int]]]] = {}
        for row in rows:
            groups.setdefault(len(row[0]), []).append(row)
        buckets = [_bucket(groups[n], [n] * len(groups[n]), roles, specs) for n in sorted(groups)]
    elif masked:
        pad = _pad_id(encoder, bounds.get(ids.name))
        lengths = [len(row[0]) for row in rows]
        full = [(i + [pad] * (fixed - len(i)), t + [0] * (fixed - len(t))) for i, t in rows]
        buckets = [_bucket(full, lengths, roles, specs)]
    else:
        pieces = _pieces(rows, fixed, path)
        buckets = [_bucket(pieces, [fixed] * len(pieces), roles, specs)]
    return assemble(f"text {path.name}", str(path), buckets, None, fixed_batch(specs))


# ---- which input is what ----------------------------------------------------------------------------------------


def _role(name: str) -> Role | None:
    """By the names that exporters use: `input_ids`, `serving_default_attention_mask:0`, `segment_ids` ..."""
    plain = re.sub(r":\d+$", "", name.lower())
    if re.search("decoder|past|cache|label|pixel|value", plain):
        return None
    if re.search("type|segment", plain):
        return "types"
    if "mask" in plain:
        return "mask"
    if re.search(r"pos(ition)?s?(_?ids?)?$", plain):
        return "positions"
    return "ids" if re.search(r"(ids?|tokens?|input)(_?\d+)?$", plain) else None


def _roles(specs: Sequence[InputSpec], path: Path) -> dict[str, Role]:
    integers = [spec for spec in specs if not is_float(spec.dtype) and spec.dtype.kind in "iu"]
    roles: dict[str, Role] = {}
    for spec in specs:
        role = "ids" if len(integers) == 1 and spec is integers[0] else _role(spec.name)
        if role is None or (role != "mask" and spec not in integers) or (role == "ids" and "ids" in roles.values()):
            raise UsageError(f"{path}: text does not tell what to give input {spec.name!r}: use an .npz file.")
        if spec.shape is not None and len(spec.shape) != 2:
            raise UsageError(
                f"{path}: input {spec.name!r} has {len(spec.shape)} axes, but text has 2: use an .npz file."
            )
        roles[spec.name] = role
    if "ids" not in roles.values():
        names = ", ".join(repr(spec.name) for spec in specs)
        raise UsageError(f"{path}: no input takes token ids (inputs: {names}): use an .npz file.")
    return roles


def _fixed_length(specs: Sequence[InputSpec]) -> int | None:
    lengths = {size for spec in specs if spec.shape is not None and isinstance(size := spec.shape[1], int)}
    if len(lengths) > 1:
        text = ", ".join(map(str, sorted(lengths)))
        raise UsageError(f"the model's inputs have different lengths ({text}): use an .npz file.")
    return next(iter(lengths), None)


def _max_length(wanted: int | None, fixed: int | None, positions: int) -> int:
    if wanted is None:
        return fixed if fixed is not None else min(LENGTH, positions)
    if wanted < 1:
        raise UsageError(f"max_length must be 1 or more, not {wanted}.")
    if fixed is not None and wanted > fixed:
        raise UsageError(f"max_length {wanted} is more than the {fixed} tokens that the model takes: lower it.")
    return wanted


# ---- reading ----------------------------------------------------------------------------------------------------


def _texts(path: Path) -> list[Text]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: convert it.") from error
    parse = _entry if path.suffix.lower() == ".jsonl" else lambda line, _: line.strip()
    texts = [parse(line, f"{path} line {k}") for k, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise UsageError(f"{path} has no text: give one text per line.")
    return texts


def _entry(line: str, where: str) -> Text:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f'{where} is not valid JSON: give one string or one object with "text" per line.') from error
    if isinstance(entry, str):
        return entry
    text = entry.get("text") if isinstance(entry, dict) else None
    pair = entry.get("text_pair") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise UsageError(f'{where} has no text: give a string, or an object with "text" and maybe "text_pair".')
    return text if pair is None else (text, pair)


def _tokenizer(path: str | os.PathLike[str]) -> Any:
    try:
        module = importlib.import_module("tokenizers")
    except ImportError as error:
        raise UsageError(
            "text needs the library tokenizers: pip install 'tokenizers>=0.20' (or 'spa-prune[data]')."
        ) from error
    if not Path(path).is_file():
        raise UsageError(f"tokenizer {os.fspath(path)} is no file: give the path of the model's tokenizer.json.")
    try:
        return module.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"tokenizer {os.fspath(path)} is not a tokenizer.json of the library tokenizers.") from error


def _pad_id(encoder: Any, bound: int | None) -> int:
    """The padding token by its usual names, if the model knows it; 0 otherwise (it is masked anyway)."""
    found = (encoder.token_to_id(token) for token in ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>"))
    return next((int(k) for k in found if k is not None and (bound is None or k < bound)), 0)


def _check_vocabulary(rows: Sequence[tuple[list[int], list[int]]], bound: int | None, name: str, path: Path) -> None:
    largest = max(max(ids) for ids, _ in rows)
    if bound is not None and largest >= bound:
        raise UsageError(
            f"tokenizer {path} gives token {largest}, but the model looks {name!r} up in a table of {bound}: "
            "it belongs to another model."
        )


# ---- arrays -----------------------------------------------------------------------------------------------------


def _pieces(rows: Sequence[tuple[list[int], list[int]]], length: int, path: Path) -> list[tuple[list[int], list[int]]]:
    """All tokens end to end, cut into pieces; the rest is left out."""
    ids = [token for row, _ in rows for token in row]
    types = [kind for _, row in rows for kind in row]
    starts = range(0, len(ids) - length + 1, length)
    if not starts:
        raise UsageError(f"{path} has {len(ids)} tokens, but the model takes {length} at a time: give more text.")
    return [(ids[k : k + length], types[k : k + length]) for k in starts]


def _bucket(
    rows: Sequence[tuple[list[int], list[int]]],
    lengths: Sequence[int],
    roles: Mapping[str, Role],
    specs: Sequence[InputSpec],
) -> dict[str, Array]:
    """One array `[texts, tokens]` per input."""
    ids: NDArray[np.int64] = np.array([ids for ids, _ in rows], dtype=np.int64)
    steps = np.arange(ids.shape[1], dtype=np.int64)
    make: dict[Role, Callable[[], NDArray[Any]]] = {
        "ids": lambda: ids,
        "types": lambda: np.array([types for _, types in rows], dtype=np.int64),
        "mask": lambda: steps[None, :] < np.array(lengths)[:, None],
        "positions": lambda: np.broadcast_to(steps, ids.shape),
    }
    return {spec.name: make[roles[spec.name]]().astype(spec.dtype) for spec in specs}
