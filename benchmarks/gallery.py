"""One page per architecture family: the command, the groups that are found, a picture of them, and the numbers.

    python benchmarks/gallery.py FOLDER ROWS.json [--write docs/gallery]

FOLDER holds the models of `architectures.py`, ROWS.json is what `coverage.py --json` kept about them. Models of one
exporter (TorchScript where there is one) are shown; the other finds the same network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import measure  # noqa: F401  # makes `spa` importable
from architectures import FAMILIES

import spa.pipeline as spa
from spa.explain import because, is_window
from spa.groups import KINDS, Analysis, Group

_PALETTE = ("#b5651d", "#7b3294", "#3b6fb6", "#5aa0d6", "#7fc1b5", "#999999", "#4d9221", "#d6a520", "#bbbbbb")
COLOURS = dict(zip(KINDS, _PALETTE, strict=True))
WIDTH, BAR, GAP = 720, 18, 6
SHOWN = 40
"""Groups on a page."""


def picture(groups: Sequence[Group]) -> str:
    """One bar per group: its weights, relative to the largest."""
    most = max((group.parameters for group in groups), default=1)
    height = len(groups) * (BAR + GAP) + GAP
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">']
    for k, group in enumerate(groups):
        y, wide = GAP + k * (BAR + GAP), max(2, round(300 * group.parameters / most))
        label = escape(f"{group.name}: {group.units} units")
        lines.append(f'<rect x="0" y="{y}" width="{wide}" height="{BAR}" rx="3" fill="{COLOURS[group.kind]}"/>')
        lines.append(f'<text x="{wide + 8}" y="{y + BAR - 5}" font-size="12" fill="#555">{label}</text>')
    return "\n".join([*lines, "</svg>", ""])


def page(name: str, stem: str, analysis: Analysis, row: dict[str, Any]) -> str:
    """One family."""
    groups = sorted(analysis.groups, key=lambda g: -g.parameters)[:SHOWN]
    frozen = [f for f in analysis.frozen if not is_window(f)][:5]
    lines = [
        f"# {FAMILIES[name].title}",
        "",
        "<!-- Written by `python benchmarks/gallery.py`. -->",
        "",
        "```",
        f"python benchmarks/architectures.py models {name}",
        f"spa inspect models/{stem}.onnx",
        f"spa prune models/{stem}.onnx -o small.onnx --target macs=0.7 --scope all --align 1",
        "```",
        "",
        f"{analysis.parameters:,} parameters, {row['prunable']:.1%} of them prunable; {analysis.macs:,.0f} "
        f"multiply-accumulates, of which {row.get('reachable') or 1:.3f} can be left at least; "
        f"{len(analysis.groups)} groups, {row['exact']} of them exact.",
        "",
        f"![Groups by their weights]({name}.svg)",
        "",
        "| group | kind | units | parameters | leaves |",
        "|---|---|--:|--:|---|",
        *(f"| `{g.name}` | {g.kind} | {g.units} | {g.parameters:,} | {g.inexact or 'exactly'} |" for g in groups),
    ]
    if len(groups) < len(analysis.groups):
        lines.append(f"| and {len(analysis.groups) - len(groups)} more | | | | |")
    lines += [
        "",
        "Each kind alone, half as far as it goes, then all kinds to macs=0.7, verified in ONNX Runtime:",
        "",
        "| pruned | largest relative error |",
        "|---|--:|",
        *(f"| {kind} | {e if isinstance(e, str) else format(e, '.1e')} |" for kind, e in row["kinds"].items()),
        f"| all, {row['macs']:.3f} of the MACs left | {row['error']:.1e} |",
    ]
    if frozen:
        lines += ["", "What stays:", ""]
        lines += [f"- `{f.tensor}` axis {f.axis} ({f.parameters:,} parameters): {because(f)}" for f in frozen]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--write", type=Path, default=Path("docs/gallery"))
    options = parser.parse_args()
    rows = {row["name"]: row for row in json.loads(options.rows.read_text())["rows"]}
    options.write.mkdir(parents=True, exist_ok=True)
    index = ["# Gallery", "", "<!-- Written by `python benchmarks/gallery.py`. -->", ""]
    index += ["One page per architecture family; all figures in one table: [coverage.md](../coverage.md).", ""]
    for name, family in FAMILIES.items():
        stem = next((s for s in (f"{name}_ts", f"{name}_dy") if rows.get(s, {}).get("state") == "ok"), None)
        if stem is None:
            continue
        analysis = spa.analyze(options.folder / f"{stem}.onnx")
        shown = sorted(analysis.groups, key=lambda g: -g.parameters)[:SHOWN]
        (options.write / f"{name}.svg").write_text(picture(shown))
        (options.write / f"{name}.md").write_text(page(name, stem, analysis, rows[stem]))
        index.append(
            f"- [{family.title}]({name}.md): {rows[stem]['prunable']:.1%} of {analysis.parameters:,} parameters"
        )
    (options.write / "README.md").write_text("\n".join(index) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
