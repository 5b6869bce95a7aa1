"""A recipe: the whole way from a trained model to a deployed file, in one YAML file, checked before anything runs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spa.edge.convert import CONVERSIONS, check_suffix
from spa.edge.gates import Gate, nearest, parse_gates
from spa.edge.schema import Option, fill, options_of
from spa.errors import UsageError
from spa.runtime import Provider

__all__ = ["KINDS", "Recipe", "Stage", "read_recipe"]

_OWN = ("model", "source", "pruned", "output", "progress", "told", "job", "models", "names")
"""Parameters that the runner fills in."""
_SHARED = ("calibration", "samples", "preprocess", "tokenizer", "max_length", "dims", "seed", "batch", "provider")
"""Keys of the recipe that are the default of every stage that has them."""


def settings(
    *,
    model: Path,
    output: Path,
    stages: Any,
    calibration: Any = None,
    evaluation: Any = None,
    samples: int | None = None,
    preprocess: Any = None,
    tokenizer: Path | None = None,
    max_length: int | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    batch: int = 32,
    provider: Provider = "cpu",
    metric: Path | None = None,
    work: Path | None = None,
    result: Path | None = None,
) -> None:
    """The keys of a recipe.

    Args:
        model: ONNX file to start from.
        output: the last stage's file.
        stages: list of stages, each a name, or a name with its options.
        calibration: samples for pruning and quantisation.
        evaluation: samples, mostly labelled, on which every stage is compared with its input; else `calibration`.
        samples: use only so many of the calibration samples.
        preprocess: how images become inputs.
        tokenizer: `tokenizer.json` for texts.
        max_length: tokens per text.
        dims: sizes of symbolic axes.
        seed: of everything random.
        batch: samples per run.
        provider: where samples are run.
        metric: Python file with a function `metric(outputs, labels)`, larger is better.
        work: folder in which intermediate files are kept.
        result: JSON file for what was measured.
    """


def bench(
    *,
    against: str = "model",
    provider: Provider = "auto",
    threads: int = 0,
    batch: int | None = None,
    dims: Mapping[str, int] | None = None,
    repeats: int = 50,
    seconds: float | None = None,
    seed: int = 0,
    memory: bool = False,
) -> None:
    """Options of stage `bench`, see `spa.bench.bench`; `against` is a stage or `model`."""


def verify(*, against: str = "model") -> None:
    """Options of stage `verify`: compares the file so far with the recipe's model, or with that of a stage."""


def _prune() -> Callable[..., Any]:
    from spa.pipeline import prune

    return prune


def _finetune() -> Callable[..., Any]:
    from spa.train import finetune

    return finetune


KINDS: Mapping[str, Callable[[], Callable[..., Any]]] = {
    "prune": _prune,
    "finetune": _finetune,
    **{name: (lambda found=found: found) for name, found in CONVERSIONS.items()},  # type: ignore[misc]  # a default binds
    "bench": lambda: bench,
    "verify": lambda: verify,
}
"""Kinds of stages, and the functions whose keyword parameters are their options."""
LOOKING = ("bench", "verify")
"""Kinds that make no file."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, checked."""

    kind: str
    name: str
    """Its kind, numbered from the second on."""
    options: Mapping[str, Any] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()

    @property
    def makes(self) -> bool:
        """Whether it writes a file."""
        return self.kind not in LOOKING


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked."""

    path: Path
    sha256: str
    settings: Mapping[str, Any]
    """The recipe's own keys, paths resolved."""
    stages: tuple[Stage, ...]

    @property
    def model(self) -> Path:
        """What it starts from."""
        return Path(self.settings["model"])

    @property
    def output(self) -> Path:
        """What it ends with."""
        return Path(self.settings["output"])


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe; nothing is run.

    Raises:
        UsageError: the file cannot be read, is no YAML, or a key, a value or the order of stages is wrong; PyYAML is
            missing.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UsageError(f"{file}: cannot be read ({why}); give a recipe in YAML") from error
    body = _parse(text, file)
    if not isinstance(body, dict):
        raise UsageError(f"{file}: a recipe is a mapping with the keys model, output and stages")
    where = str(file)
    found = fill(body, options_of(settings, ()), where, file.parent)
    listed = _stages(found.pop("stages"), where, file.parent, found)
    _check_order(listed, Path(found["output"]), where)
    _check_files(found, listed, where)
    return Recipe(file, hashlib.sha256(text.encode()).hexdigest(), found, listed)


def _parse(text: str, file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UsageError('recipes need PyYAML: install it with `pip install "spa-prune[edge]"`') from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # no types are shipped
        """Refuses a key that comes twice, which YAML would let win silently."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise UsageError(f"{file}: line {key_node.start_mark.line + 1}: keys must be names")
            if key in out:
                raise UsageError(f"{file}: line {key_node.start_mark.line + 1}: key {key!r} comes twice")
            out[key] = loader.construct_object(value_node, deep=True)
        return out

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{file}: {line}is not YAML ({problem})") from error


def _stages(listed: Any, where: str, folder: Path, shared: Mapping[str, Any]) -> tuple[Stage, ...]:
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{where}: stages must be a list with at least one stage, such as `- prune: ...`")
    out: list[Stage] = []
    for number, item in enumerate(listed, 1):
        kind, body = _named(item, f"{where}: stage {number}")
        count = sum(stage.kind == kind for stage in out)
        name = kind if not count else f"{kind}-{count + 1}"
        out.append(_stage(kind, name, body, f"{where}: stage {number} ({name})", folder, shared))
    return tuple(out)


def _named(item: Any, where: str) -> tuple[str, dict[Any, Any]]:
    """`float16`, `opset: 13` for `opset: {version: 13}`, or a name with a mapping of options."""
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        raise UsageError(f"{where}: must be the name of a stage with its options, such as `- opset: {{version: 13}}`")
    (kind, body), names = next(iter(item.items())), list(KINDS)
    if kind not in KINDS:
        hint = nearest(str(kind), names) or f"; stages are {', '.join(names)}"
        raise UsageError(f"{where}: unknown stage {str(kind)!r}{hint}")
    if kind == "opset" and isinstance(body, int):
        body = {"version": body}
    if body is not None and not isinstance(body, dict):
        raise UsageError(f"{where} ({kind}): options must be a mapping, such as {{gate: {{size: 2MB}}}}, not {body!r}")
    return str(kind), body or {}


def _stage(kind: str, name: str, body: Mapping[Any, Any], where: str, folder: Path, shared: Mapping[str, Any]) -> Stage:
    given = dict(body)
    gates = parse_gates(_gate(given.pop("gate", None), where), f"{where}: gate")
    try:
        options = options_of(KINDS[kind](), _OWN)
    except UsageError as error:  # finetune without torch
        raise UsageError(f"{where}: {error}") from error
    if kind == "quantize":
        options |= {n: o for n, o in options_of(settings, ()).items() if n in (*_SHARED[:6], "seed")}
    filled = {key: value for key, value in shared.items() if key in options and key in _SHARED}
    if "calibration" in given:  # other samples: the recipe's description of its own does not fit them
        filled = {key: value for key, value in filled.items() if key not in _SHARED[:5]}
    if kind == "finetune":
        filled.pop("samples", None)  # of calibration
    if kind in ("finetune", "bench"):
        filled.pop("batch", None)  # what is meant there is a step of training, and the batch that is timed
    words = {key: given.pop(key) for key in ("teacher", "plan", "against") if _reference(given.get(key))}
    for key in words:
        if key not in options:
            raise UsageError(f"{where}: unknown key {key!r}")
    mine = {key: option for key, option in options.items() if key not in words}
    filled |= fill(given, {k: _optional(o) if k in filled else o for k, o in mine.items()}, where, folder)
    return Stage(kind, name, {**filled, **words}, gates)


def _optional(option: Option) -> Option:
    return Option(option.name, option.kind, False, option.path)


def _reference(value: Any) -> bool:
    """Whether an option names a stage, or `model`, and no file."""
    return isinstance(value, str) and re.fullmatch(rf"model|({'|'.join(KINDS)})(-\d+)?", value) is not None


def _gate(given: Any, where: str) -> Any:
    if given is None or isinstance(given, dict | str):
        return given
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        return given
    raise UsageError(f"{where}: gate must be a mapping such as {{agreement: 0.98, size: 2MB}}, not {given!r}")


def _check_order(listed: Sequence[Stage], output: Path, where: str) -> None:
    """What can follow what, and that names of earlier stages are those of earlier stages."""
    seen: dict[str, Stage] = {}
    last = next((stage for stage in reversed(listed) if stage.makes), None)
    if last is None:
        raise UsageError(f"{where}: no stage makes a file; add prune, quantize or another one")
    for stage in listed:
        before = next((s for s in reversed(list(seen.values())) if s.makes), None)
        if before is not None and before.kind == "ort" and stage.kind != "verify":
            raise UsageError(
                f"{where}: stage {stage.name} comes after ort, whose file only verify can read: move it up"
            )
        if stage.kind in ("quantize", "prune", "finetune"):
            coarse = next((s for s in seen.values() if s.kind in ("quantize", "float16")), None)
            if coarse is not None:
                raise UsageError(f"{where}: stage {stage.name} needs float32 and comes after {coarse.name}: move it up")
        for key in ("teacher", "plan", "against"):
            named = stage.options.get(key)
            if isinstance(named, str) and named != "model" and not (named in seen and seen[named].makes):
                raise UsageError(
                    f"{where}: stage {stage.name}: {key}: {named!r} is no stage before it that makes a file"
                )
        seen[stage.name] = stage
    try:
        check_suffix(output, last.kind)
    except UsageError as error:
        raise UsageError(f"{where}: output: {error}") from error


def _check_files(found: Mapping[str, Any], listed: Sequence[Stage], where: str) -> None:
    """Nothing that is read may be written."""
    reads = {"model": found["model"]}
    reads |= {key: found[key] for key in ("calibration", "evaluation", "tokenizer", "metric") if key in found}
    for stage in listed:
        reads |= {f"{stage.name}: {k}": v for k, v in stage.options.items() if isinstance(v, Path) and v.is_file()}
    for key in ("output", "result"):
        path = found.get(key)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise UsageError(f"{where}: {key}: the folder {str(path.parent)!r} does not exist; create it first")
        for other, file in reads.items():
            if isinstance(file, Path) and file.is_file() and os.path.realpath(file) == os.path.realpath(path):
                raise UsageError(f"{where}: {key}: {path} is read as {other}; write to another file")
