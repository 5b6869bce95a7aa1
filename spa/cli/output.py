"""What the commands print: results on stdout, as tables or as one JSON object; progress and complaints on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from spa.plain import plain
from spa.progress import Progress, silent
from spa.readable import count as count  # they are this module's to those who print
from spa.readable import share as share
from spa.readable import size as size

_PIPE_WIDTH = 160
"""Columns when nobody looks: names should not be broken for a program that reads them."""
_DOING = {
    "load": "loading the model",
    "analyze": "finding what can be pruned",
    "calibrate": "reading calibration samples",
    "compare": "comparing methods",
    "score": "scoring",
    "collect": "collecting statistics of samples",
    "weigh": "weighing layers by trials",
    "plan": "choosing what leaves",
    "search": "looking for the smallest model",
    "frontier": "making models",
    "evaluate": "measuring the metric on held-out samples",
    "rewrite": "cutting",
    "verify": "verifying against the masked original",
    "compensate": "compensating",
    "refit": "refitting layers",
    "norms": "estimating norms anew",
    "save": "writing",
    "outputs": "comparing outputs",
    "sensitivity": "finding nodes to leave in floating point",
    "latency": "measuring latency",
    "table": "getting the latency table",
    "kit": "writing models to measure",
    "profile": "measuring operators",
    "measure": "measuring the result",
}


def console(*, stderr: bool = False) -> Console:
    """A console on the streams of this moment; names of tensors are never read as markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def emit(body: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; numbers that JSON does not have (infinities, NaN) become null."""
    sys.stdout.write(as_json(body))


def as_json(body: Mapping[str, Any]) -> str:
    """The text of one JSON object."""
    return json.dumps(plain(body), indent=2, allow_nan=False) + "\n"


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"spa: error: {' '.join(message.split())}", file=sys.stderr)


def warn(message: str | None) -> None:
    """One line on stderr, if there is anything to say."""
    if message:
        print(f"spa: warning: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def stages(*, quiet: bool) -> Iterator[Progress]:
    """A callback that shows on stderr what is being done, and how far; nothing is shown if `quiet` or to a pipe."""
    if quiet:
        yield silent
        return
    with console(stderr=True).status("starting") as status:
        yield lambda stage, done, total: status.update(doing(stage, done, total))


def doing(stage: str, done: int, total: int) -> str:
    """What is being done, in words, and how far it is."""
    text = _DOING.get(stage, stage)
    return f"{text}, {done} of {total} ..." if total > 1 else f"{text} ..."


@contextmanager
def rounds(text: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that shows a bar on stderr, unless `quiet` or to a pipe."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    shown = console(stderr=True)
    with Bar(*columns, console=shown, transient=True, disable=quiet or not shown.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), title: str = "") -> Table:
    """A table; columns named in `right` hold numbers."""
    out = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        out.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right)
    for row in rows:
        out.add_row(*row)
    return out
