"""From the result of a run to what its page shows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spa.errors import UsageError
from spa.explain import is_window
from spa.groups import Analysis, Frozen, Group
from spa.options import Scope, choose
from spa.pipeline import Result
from spa.report.data import Cause, Frontier, Page, Sensitivity, Speed, Width
from spa.sensitivity import SHARES, lowest
from spa.version import __version__

EXAMPLES = 4
"""Weights named for each reason."""
_PACKAGES = ("onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "numpy", "scipy")
Curves = Mapping[str, NDArray[np.float64]]


def gather(
    result: Result,
    analysis: Analysis | None = None,
    *,
    model: str,
    command: str = "",
    frontier: Frontier | None = None,
    speed: Speed | None = None,
    unmeasured: str = "",
) -> Page:
    """What a page about `result` shows.

    Args:
        result: of `spa.prune`.
        analysis: of the model before pruning, if `result` does not have it.
        model: what the model before is called.
        command: that made the result, quoted.
        frontier: other models that were found.
        speed: measured latency.
        unmeasured: why there is none.

    Raises:
        UsageError: there is no analysis.
    """
    analysis = analysis or result.analysis
    if analysis is None:
        raise UsageError("a report needs the analysis of the model before pruning: give that of spa.analyze")
    report, plan = result.report, result.plan
    removed = {g.name: len(g.removed) for g in plan.groups}
    settings = dict(plan.settings)
    return Page(
        model=model,
        output=str(result.output) if result.output is not None else "",
        macs=report.macs,
        parameters=report.parameters,
        bytes=report.bytes,
        groups=report.groups,
        removed_units=report.removed_units,
        method=report.method,
        align=report.align,
        widths=_widths(analysis, removed, settings),
        causes=causes(analysis.frozen),
        prunable_parameters=analysis.prunable_parameters,
        verify=report.verify,
        fit=report.fit,
        optimality=report.optimality,
        sensitivity=_sensitivity(analysis.groups, result.curves or {}, removed),
        frontier=frontier,
        speed=speed,
        target=report.latency,
        unmeasured=unmeasured,
        command=command,
        settings=settings,
        versions=_versions(),
        sha256_before=plan.sha256,
        sha256_after=_digest(result.output),
        seconds=report.seconds,
    )


def _widths(analysis: Analysis, removed: Mapping[str, int], settings: Mapping[str, object]) -> tuple[Width, ...]:
    scope: Scope = "all" if settings.get("scope") == "all" else "exact"
    chosen = {g.name for g in choose(analysis, scope, _texts(settings, "kinds"), _texts(settings, "ignore"))}
    return tuple(
        Width(g.name, g.kind, g.units, g.units - removed.get(g.name, 0), g.exact, g.parameters, _note(g, chosen, scope))
        for g in analysis.groups
    )


def _texts(settings: Mapping[str, object], key: str) -> list[str]:
    found = settings.get(key)
    return [str(text) for text in found] if isinstance(found, Sequence) else []


def _note(group: Group, chosen: set[str], scope: str) -> str:
    if group.name in chosen:
        return ""
    if scope == "exact" and not group.exact:
        return f"left alone: {group.inexact}; --scope all prunes it"
    return "left alone by --kinds or --ignore"


def causes(frozen: Sequence[Frozen]) -> tuple[Cause, ...]:
    """Reasons with what they freeze; kernel windows and the like count as one, last."""
    found: dict[tuple[bool, str, str], list[Frozen]] = {}
    for axis in frozen:
        key = (is_window(axis), axis.reason.text, axis.reason.operator)
        found.setdefault(key, []).append(axis)
    out = [
        (window, Cause(text, operator, len(axes), sum(a.parameters for a in axes), _examples(axes)))
        for (window, text, operator), axes in found.items()
    ]
    return tuple(cause for _, cause in sorted(out, key=lambda item: (item[0], -item[1].parameters)))


def _examples(axes: Sequence[Frozen]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{a.tensor} axis {a.axis}" for a in axes))[:EXAMPLES]


def _sensitivity(groups: Sequence[Group], curves: Curves, removed: Mapping[str, int]) -> tuple[Sensitivity, ...]:
    out = []
    for group in groups:
        curve = curves.get(group.name)
        last = group.units
        if curve is None or len(curve) != last + 1 or last < 2:
            continue  # not tried, or (in steps) what is left of it
        counts = sorted({len(lowest(curve[1:], share, group.least)) for share in SHARES} - {0})
        errors = tuple(float(curve[k]) for k in counts)
        out.append(Sensitivity(group.name, group.kind, last, tuple(counts), errors, removed.get(group.name, 0)))
    return tuple(out)


def _versions() -> dict[str, str]:
    found = {"spa": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "system": platform.platform()}


def _digest(path: Path | None) -> str:
    """sha256 of a file as it is now; empty without one."""
    if path is None:
        return ""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
