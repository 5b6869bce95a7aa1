"""Inputs for any model: made up from its signature, or read from the user's .npz file.

A model's signature rarely says which inputs it accepts (how large an index may be, which symbols must agree), so
`runnable_feeds` tries a short list of guesses until ONNX Runtime accepts one.
"""

from __future__ import annotations

import ast
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spa.errors import RuntimeFailure, UsageError
from spa.runtime import Session, run
from spa.signature import Dim, InputSpec, Model, as_ir, index_bounds, inputs_of

__all__ = [
    "ATTEMPTS",
    "InputSpec",
    "check_feeds",
    "index_bounds",
    "inputs_of",
    "load_feeds",
    "make_feeds",
    "read_npz",
    "runnable_feeds",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Guess:
    """One attempt at everything that the signature leaves open."""

    batch: int = 2
    """Size of axis 0."""
    sequence: int = 8
    """Size of an unknown axis that is neither batch nor image."""
    image: int = 64
    """Height and width; half of it in volumes."""
    integers: Literal["random", "ones", "zeros"] = "random"
    """Values of integer inputs; masks become 0 with `zeros` and 1 otherwise."""
    equal: bool = False
    """Every symbol has size `sequence`."""
    total: bool = False
    """Masks cover the past as well as the present."""


_GUESSES = (
    _Guess(),
    _Guess(total=True),
    _Guess(batch=1),
    _Guess(integers="ones"),
    _Guess(batch=1, total=True, integers="ones"),
    _Guess(integers="zeros"),
    _Guess(image=224, sequence=64),
    _Guess(image=256, sequence=128),
    _Guess(sequence=4, equal=True, integers="ones"),
    _Guess(sequence=1, equal=True, integers="ones"),
    _Guess(batch=1, sequence=1, image=32, integers="ones"),
    _Guess(sequence=64, equal=True),
    _Guess(batch=1, image=512, sequence=512),
    _Guess(batch=1, sequence=16000),
)
ATTEMPTS = len(_GUESSES)
"""How many different guesses `make_feeds` knows."""


# ---- sizes ------------------------------------------------------------------------------------------------------


def _said(name: str, *words: str) -> bool:
    return any(word in name.lower() for word in words)


def _is_past(spec: InputSpec) -> bool:
    return _said(spec.name, "past", "cache") and spec.shape is not None and len(spec.shape) >= 3


def _is_image(spec: InputSpec, shape: Sequence[Dim]) -> bool:
    """Rank 4 or 5 with a colour-like channel axis, or with both last axes open: `[n, c, h, w]`, `[n, h, w, 3]`."""
    if len(shape) not in (4, 5) or _is_past(spec) or spec.dtype == np.bool_:
        return False
    known = (shape[1], shape[-1])
    return any(size in (1, 3, 4) for size in known) or not any(isinstance(size, int) for size in shape[-2:])


def _size(spec: InputSpec, shape: Sequence[Dim], axis: int, guess: _Guess) -> int:
    """A likely size of one open axis, from its place, the input's rank and type, and names."""
    symbol = str(shape[axis] or "")
    if guess.equal:
        return guess.sequence
    if axis == 0 or _said(symbol, "batch"):
        return guess.batch
    if _said(symbol, "channel"):
        return 3
    if _is_image(spec, shape):
        channel = len(shape) - 1 if shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4) else 1
        if axis == channel:
            return 3
        return guess.image if len(shape) == 4 else max(guess.image // 2, 1)
    if _said(symbol, "height", "width"):
        return guess.image
    if _said(symbol + spec.name, "audio", "wave", "samples") and axis == len(shape) - 1:
        return 16000
    return guess.sequence


def _leaves(symbol: str) -> tuple[ast.expr, set[str]] | None:
    """`symbol` as an arithmetic expression and its names, or None if it is a plain name."""
    try:
        tree = ast.parse(symbol, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return None if isinstance(tree, ast.Name) else (tree, names)


def _evaluate(tree: ast.expr, sizes: Mapping[str, int]) -> int | None:
    """The value of `+ - * //` over known symbols, else None."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return sizes.get(tree.id)
    if not isinstance(tree, ast.BinOp):
        return None
    left, right = _evaluate(tree.left, sizes), _evaluate(tree.right, sizes)
    if left is None or right is None:
        return None
    match tree.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.FloorDiv() | ast.Div() if right:
            return left // right
    return None


def _symbol_sizes(specs: Sequence[InputSpec], dims: Mapping[str, int], guess: _Guess) -> dict[str, int]:
    """One size for each symbol: the user's, the value of an expression, or the largest guess over its uses."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, symbol in enumerate(spec.shape or ()):
            if isinstance(symbol, str):
                sizes[symbol] = max(sizes.get(symbol, 1), _size(spec, spec.shape or (), axis, guess))
    sizes |= {name: size for name, size in dims.items() if name in sizes}
    past = [size for name, size in sizes.items() if _said(name, "past")]
    for symbol in [name for name in sizes if name not in dims]:
        parsed = _leaves(symbol)
        if parsed is not None:
            value = _evaluate(parsed[0], {**sizes, **dims})
            sizes[symbol] = sizes[symbol] if value is None else max(value, 1)
        elif past and _said(symbol, "total") and not guess.equal:
            sizes[symbol] = max(past) + guess.sequence
    return sizes


def _axis_key(spec: InputSpec, axis: int) -> str:
    return f"{spec.name}:{axis}"


def _check_dims(specs: Iterable[InputSpec], dims: Mapping[str, int]) -> None:
    known: dict[str, None] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape or ()):
            if isinstance(dim, str):
                known[dim] = None
                known |= dict.fromkeys((_leaves(dim) or (None, set[str]()))[1])
            if not isinstance(dim, int):
                known[_axis_key(spec, axis)] = None
    for name, size in dims.items():
        if name not in known:
            raise UsageError(f"dims names {name!r}, which is no open axis here: it may name {_listed(known)}.")
        if size < 1:
            raise UsageError(f"dims gives {name!r} the size {size}: a size must be 1 or more.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing, as every size is fixed"


def _shape(spec: InputSpec, sizes: Mapping[str, int], dims: Mapping[str, int], guess: _Guess, past: bool) -> list[int]:
    if spec.shape is None:
        raise RuntimeFailure(
            f"the model does not tell the rank of input {spec.name!r}: pass an example with `--inputs FILE.npz`."
        )
    shape = []
    for axis, dim in enumerate(spec.shape):
        key = _axis_key(spec, axis)
        free = key not in dims and dim not in dims and not isinstance(dim, int)
        if key in dims and not isinstance(dim, int):
            size = dims[key]
        else:
            size = dim if isinstance(dim, int) else sizes[dim] if dim else _size(spec, spec.shape, axis, guess)
        last = axis > 0 and axis == len(spec.shape) - 1
        if guess.total and past and free and last and _is_mask(spec):
            size += guess.sequence
        shape.append(size)
    return shape


# ---- values -----------------------------------------------------------------------------------------------------


def _is_mask(spec: InputSpec) -> bool:
    return _said(spec.name, "mask")


def _family(dtype: np.dtype[Any]) -> Literal["float", "int", "bool", "complex", "text"]:
    """`dtype.kind`, but with the types of `ml_dtypes` among floats and integers."""
    if dtype.kind in "OSU":
        return "text"
    if dtype.kind == "c":
        return "complex"
    if dtype.kind == "b":
        return "bool"
    return "int" if re.match(r"u?int", dtype.name) else "float"


def _integers(
    spec: InputSpec, shape: list[int], rng: np.random.Generator, bound: int | None, guess: _Guess
) -> npt.NDArray[np.int64]:
    """Whole numbers in `[0, bound)`."""
    limit = max(bound, 1) if bound is not None else 2
    if guess.integers != "random":
        return np.full(shape, min(int(guess.integers == "ones"), limit - 1), dtype=np.int64)
    if shape and _said(spec.name, "position", "pos_id"):
        steps = np.arange(shape[-1], dtype=np.int64)
        return np.broadcast_to(steps if bound is None else np.minimum(steps, limit - 1), shape).copy()
    if bound is None and _said(spec.name, "length", "lens"):
        return np.full(shape, guess.sequence, dtype=np.int64)
    if int(np.prod(shape)) == 1:  # a count, a level, a step: 0 would often mean "nothing to do"
        return np.full(shape, min(int(rng.integers(1, 4)), limit - 1 if bound is not None else 3), dtype=np.int64)
    if bound is None and len(shape) >= 3 and spec.dtype.itemsize == 1:  # pixels
        limit = 256 if spec.dtype.name.startswith("u") else 128
    return rng.integers(0, limit, size=shape, dtype=np.int64)


def _value(spec: InputSpec, shape: list[int], rng: np.random.Generator, bound: int | None, guess: _Guess) -> Array:
    family = _family(spec.dtype)
    if family == "text":
        return np.full(shape, "a", dtype=object)
    if _is_mask(spec):
        # ones keep everything, in a mask of 0 and 1 and in one that is added; a padding mask says the opposite
        keep = guess.integers != "zeros"
        return np.full(shape, keep != _said(spec.name, "pad")).astype(spec.dtype)
    if family == "int":
        return _integers(spec, shape, rng, bound, guess).astype(spec.dtype)
    if family == "bool":
        fixed = {"ones": True, "zeros": False}.get(guess.integers)
        return rng.integers(0, 2, size=shape).astype(np.bool_) if fixed is None else np.full(shape, fixed)
    normal = np.asarray(rng.standard_normal(shape))
    if family == "complex":
        normal = normal + 1j * rng.standard_normal(shape)
    return normal.astype(spec.dtype)


def make_feeds(
    specs: Sequence[InputSpec],
    *,
    seed: int,
    dims: Mapping[str, int] | None = None,
    bounds: Mapping[str, int] | None = None,
    attempt: int = 0,
) -> dict[str, Array]:
    """Made-up inputs: standard normal floats, random indices, masks that keep everything; no file is read.

    The same arguments give the same values; an input's values do not depend on the other inputs.

    Args:
        specs: the model's inputs (`inputs_of`).
        seed: of the random values.
        dims: sizes of symbols, or of one axis as `input:axis`; they overrule the guesses.
        bounds: by input, one more than the largest integer allowed (`index_bounds`).
        attempt: which guess about all the rest, 0 to `ATTEMPTS` - 1.

    Raises:
        UsageError: `dims` names an unknown axis or a size below 1, or `attempt` is out of range.
        RuntimeFailure: the rank of an input is unknown.
    """
    if not 0 <= attempt < ATTEMPTS:
        raise UsageError(f"attempt must be 0 to {ATTEMPTS - 1}, not {attempt}.")
    dims, bounds, guess = dims or {}, bounds or {}, _GUESSES[attempt]
    _check_dims(specs, dims)
    sizes = _symbol_sizes(specs, dims, guess)
    past = any(_is_past(spec) for spec in specs)
    feeds = {}
    for spec in specs:
        rng = np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(spec.name.encode())])
        feeds[spec.name] = _value(spec, _shape(spec, sizes, dims, guess, past), rng, bounds.get(spec.name), guess)
    return feeds


def _key(feeds: Mapping[str, Array]) -> tuple[Any, ...]:
    """Equal for attempts that feed the same: fixed shapes leave little to guess."""
    return tuple(
        (name, array.shape, 0 if array.dtype == object else zlib.crc32(array.tobytes()))
        for name, array in feeds.items()
    )


def _finite(outputs: Mapping[str, Array]) -> bool:
    values: Iterable[object] = outputs.values()  # a sequence output is a list, whatever its type says
    floats = (array for array in values if isinstance(array, np.ndarray) and _family(array.dtype) == "float")
    return all(array.size > 0 and bool(np.isfinite(array.astype(np.float64)).all()) for array in floats)


def runnable_feeds(
    model: Model, session: Session, seed: int, dims: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """Made-up inputs on which `session` runs, if possible with finite and non-empty outputs.

    Args:
        model: what `session` was opened from; read for its inputs and the sizes of its tables.
        session: only used to try.
        seed: of the random values.
        dims: see `make_feeds`.

    Raises: RuntimeFailure if no guess runs; UsageError, ModelError as `make_feeds` and `inputs_of`.
    """
    loaded = as_ir(model)
    specs, bounds = inputs_of(loaded), index_bounds(loaded)
    first: dict[str, Array] | None = None
    error: RuntimeFailure | None = None
    tried = set()
    for attempt in range(ATTEMPTS):
        feeds = make_feeds(specs, seed=seed, dims=dims, bounds=bounds, attempt=attempt)
        if _key(feeds) in tried:
            continue
        tried.add(_key(feeds))
        try:
            outputs = run(session, feeds)
        except RuntimeFailure as failure:
            error = error or failure
            continue
        if _finite(outputs):
            return feeds
        first = feeds if first is None else first
    if first is not None:
        return first
    raise RuntimeFailure(
        f"no made-up input runs this model ({str(error).rstrip('.')}): pass real ones with `--inputs FILE.npz`."
    ) from error


# ---- the user's own ---------------------------------------------------------------------------------------------


def load_feeds(path: Path, specs: Sequence[InputSpec]) -> dict[str, Array]:
    """Inputs from an .npz file with one array for each input, named as the input or `in:` and its name.

    Arrays named `out:...` are ignored, so that a file may hold expected outputs too.

    Raises: UsageError if the file is no .npz, or an array is missing, unknown, or of wrong type or shape.
    """
    arrays = read_npz(path)
    named = {name.removeprefix("in:"): array for name, array in arrays.items() if not name.startswith("out:")}
    expected = {spec.name for spec in specs}
    extra = [name for name in named if name not in expected]
    if extra:
        raise UsageError(f"{path} has {extra[0]!r}, which is no input: the inputs are {', '.join(sorted(expected))}.")
    feeds = {spec.name: _as_declared(named[spec.name], spec) for spec in specs if spec.name in named}
    check_feeds(feeds, specs, str(path))
    return feeds


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an `.npz` file by name; Python objects are never loaded.

    Raises: UsageError if it cannot be read, or is no `.npz` of plain arrays.
    """
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageError(f"{path} holds a single array: save it by name with numpy.savez.")
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
            raise UsageError(f"{path} holds Python objects, which are never loaded: save plain arrays.") from error
        raise UsageError(f"{path} is not an .npz file of plain arrays: write it with numpy.savez.") from error


def _as_declared(array: Array, spec: InputSpec) -> Array:
    """numpy stores the types of `ml_dtypes` as raw bytes, and text not as objects."""
    if array.dtype.kind == "V" and array.dtype.itemsize == spec.dtype.itemsize:
        return array.view(spec.dtype)
    return array.astype(object) if array.dtype.kind == "U" and spec.dtype == object else array


def check_feeds(feeds: Mapping[str, Array], specs: Sequence[InputSpec], source: str) -> None:
    """Compare arrays with the inputs they are for; `source` says in messages where they come from.

    Raises: UsageError for a missing input, a wrong type or rank, or another size where the model fixes one.
    """
    for spec in specs:
        if spec.name not in feeds:
            raise UsageError(f"{source} lacks input {spec.name!r}: add an array of that name.")
        array = feeds[spec.name]
        if array.dtype != spec.dtype:
            raise UsageError(f"{source} has {spec.name!r} as {array.dtype}, but the model takes {spec.dtype}.")
        shape = array.shape if spec.shape is None else spec.shape
        bad = len(shape) != array.ndim or any(
            isinstance(dim, int) and dim != size for dim, size in zip(shape, array.shape, strict=True)
        )
        if bad:
            raise UsageError(
                f"{source} has {spec.name!r} of shape {_text(array.shape)}, but the model takes {_text(shape)}."
            )


def _text(shape: Sequence[Dim]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"
