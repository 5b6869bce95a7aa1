"""spa explain: one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from spa.cli import output
from spa.cli.options import Json, Model, Verbose

if TYPE_CHECKING:
    from spa.explain import AxisExplanation, Explanation, FrozenPart

_SHOWN = 12
"""Coupled axes per axis without --verbose."""


def explain(
    model: Model,
    tensor: Annotated[str, typer.Argument(metavar="TENSOR", help="Name of a weight, activation, input or output.")],
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say why a tensor can or cannot be pruned, and what it is coupled with."""
    from spa.explain import explain as explain_tensor

    with output.stages(quiet=json) as progress:
        progress("analyze", 0, 1)
        explanation = explain_tensor(model, tensor)
    if json:
        output.emit(explanation.to_json())
        return
    screen = output.console()
    for line in _lines(explanation, verbose):
        screen.print(line, soft_wrap=True)


def _lines(explanation: Explanation, verbose: bool) -> Iterator[str]:
    shape = ", ".join(str(size) for size in explanation.shape)
    yield f"{explanation.tensor}: {explanation.role} [{shape}]"
    if not explanation.axes:
        yield "  a scalar, or a tensor of unknown rank: nothing to prune"
    for axis in explanation.axes:
        yield from _axis(explanation.tensor, axis, verbose)


def _axis(tensor: str, axis: AxisExplanation, verbose: bool) -> Iterator[str]:
    state = "frozen" if not axis.groups else "partly prunable" if axis.frozen else "prunable"
    use = f" as read for {axis.consumer}" if axis.consumer else ""
    yield f"axis {axis.axis} ({axis.size}){use}: {axis.note or state}"
    for group in axis.groups:
        how = "exact" if group.exact else f"statistic: {group.why}"
        yield f"  in group {group.name}: {group.units} units of kind {group.kind}, {how}"
    for part in axis.frozen:
        yield f"  frozen: {part.reason}" + (f" ({part.operator} {part.node})" if part.node else "")
        if part.path:
            yield f"    path: {_path(tensor, axis.axis, part)}"
    shown = axis.coupled if verbose else [c for c in axis.coupled if c.role != "activation"][:_SHOWN]
    for other in shown:
        yield f"  coupled with {other.tensor} axis {other.axis} ({other.role})"
    if len(shown) < len(axis.coupled):
        rest = [c for c in axis.coupled if c not in shown]
        inner = all(c.role == "activation" for c in rest)
        yield f"  coupled with {len(rest)} {'axes of activations' if inner else 'more axes'}; --verbose lists them"


def _path(tensor: str, axis: int, part: FrozenPart) -> str:
    out = f"{tensor}[{axis}]"
    for step in part.path:
        out += f" -- {' '.join(filter(None, (step.operator, step.node)))} -- {step.tensor}[{step.axis}]"
    return out
