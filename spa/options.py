"""What the options of a run mean, and whether they can be met, before any work is done."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from spa.budget.select import Align, MinKeep
from spa.errors import OutputError, TargetError, UsageError
from spa.groups import KINDS, Analysis, Group

Scope = Literal["exact", "all"]


def choose(analysis: Analysis, scope: Scope, kinds: Sequence[str], ignore: Sequence[str]) -> list[Group]:
    """The groups that options leave for pruning.

    Raises:
        TargetError: there is none.
    """
    out = []
    for group in analysis.groups:
        if scope == "exact" and not group.exact:
            continue
        if kinds and group.kind not in kinds:
            continue
        if any(_matches(group, pattern) for pattern in ignore):
            continue
        out.append(group)
    if not out:
        inexact = sum(not g.exact for g in analysis.groups)
        hint = _frozen_hint(analysis)
        if scope == "exact" and inexact:
            hint = f"{inexact} groups need --scope all"
        elif analysis.groups:
            hint = f"--kinds and --ignore leave none of its {len(analysis.groups)} groups; see `spa inspect`"
        raise TargetError(f"nothing in this model can be pruned with these options: {hint}")
    return out


def check_border(model: ir.Model, patterns: Sequence[str]) -> None:
    """Raise UsageError if a pattern of `--allow-io` matches no input and no output."""
    names = [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--allow-io {pattern!r} matches no input and no output; there are {', '.join(names)}")


def _frozen_hint(analysis: Analysis) -> str:
    if not analysis.frozen:
        return "it has no prunable weights; see `spa inspect`"
    worst = analysis.frozen[0]
    return f"{worst.tensor} axis {worst.axis} is frozen ({worst.reason.text}); see `spa inspect`"


def _matches(group: Group, pattern: str) -> bool:
    names = {group.name, *(m.tensor for m in group.members)}
    for member in group.members:
        names.update(node.name or "" for node, _ in ([member.use] if member.use is not None else member.value.uses()))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def parse_min_keep(text: str | int) -> MinKeep | None:
    """A number, a share ("10%" or "0.1"), or those per kind ("head=2,channel=10%"); None for "auto".

    Raises:
        UsageError: the text is none of these.
    """
    if text == "auto":
        return None
    default, by_kind = "1", dict[str, str]()
    for part in str(text).split(","):
        kind, equals, value = part.partition("=")
        if equals:
            if kind.strip() not in KINDS:
                raise UsageError(f"--min-keep: unknown kind {kind.strip()!r}; kinds are {', '.join(KINDS)}")
            by_kind[kind.strip()] = value.strip()
        else:
            default = part.strip()
    for value in (default, *by_kind.values()):
        if not re.fullmatch(r"\d+|\d+(\.\d+)?%|0?\.\d+", value):
            raise UsageError(f"--min-keep: cannot read {value!r}; write auto, 4, 10%, or head=2,channel=10%")

    def least(group: Group) -> int:
        value = by_kind.get(group.kind, default)
        if value.endswith("%"):
            return max(1, int(np.ceil(float(value[:-1]) / 100 * group.units)))
        return max(1, int(np.ceil(float(value) * group.units)) if "." in value else int(value))

    return least


def check_choices(scope: str, kinds: Sequence[str], align: Align) -> None:
    """Raise UsageError for an unknown scope or kind, or an impossible alignment."""
    if scope not in ("exact", "all"):
        raise UsageError(f"unknown scope {scope!r}; choose exact or all")
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown kind {kind!r}; kinds are {', '.join(KINDS)}")
    if align != "auto" and align < 1:
        raise UsageError(f"align must be auto or a positive number, not {align!r}")


def check_output(output: str | os.PathLike[str] | None) -> None:
    """Raise OutputError if the result could not be written: before the work, not after it."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name the output file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {str(path.parent)!r} is not writable; choose another output")


def parse_memory(text: str | int) -> int:
    """Bytes of "4GB", "512MiB" or a number.

    Raises:
        UsageError: the text is none of these, or below 64 MB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory: cannot read {text!r}; write for example 4GB or 512MiB")
    unit = match[2].lower()
    base = 1024 if "i" in unit else 1000
    size = int(float(match[1]) * base ** " kmgt".index(unit[0] if unit and unit[0] in "kmgt" else " "))
    if size < 64_000_000:
        raise UsageError(f"--memory: {text} is too little; give 64MB or more")
    return size
