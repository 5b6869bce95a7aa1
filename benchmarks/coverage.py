"""The coverage table: every architecture, by every exporter, pruned in every kind of group it has, and verified.

    python benchmarks/coverage.py FOLDER [--python PYTHON] [--zoo FOLDER] [--only NAME] [--write docs/coverage.md]

FOLDER holds the models of `architectures.py`; those that are missing are exported first, by PYTHON (default: this one),
which needs `torch`, `onnxscript` and `transformers`. `--zoo` adds models that other frameworks and exporters wrote (a
folder with `manifest.json`, see `zoo.py`). Each model runs in a process of its own:

- analysis: groups by kind, the share of the parameters that is in them, and what is frozen;
- the fewest multiply-accumulates that can be reached;
- for each kind alone: prune only that kind, half as far as it goes, and verify (`scope=all`);
- all kinds together to macs=0.7, verified; where everything that left is exact also by the check that knows nothing
  but the plan (`zoo.outside_error`).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure  # also makes `spa` importable
import zoo
from architectures import EXPORTERS, FAMILIES

import spa.pipeline as spa
from spa.errors import SpaError, TargetError
from spa.explain import because, is_window

Row = dict[str, Any]
GOAL = 0.95
"""Share of the parameters that must be prunable."""
_LEAST = 1e-6


def check(path: Path, options: argparse.Namespace) -> Row:
    """Everything about one model; problems become its `state` and `note`."""
    row: Row = {"name": path.stem, "state": "ok", "note": "", "kinds": {}}
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with tempfile.TemporaryDirectory(prefix="spa-coverage-") as folder:
            _check(path, Path(folder) / "out.onnx", options, row)
    except BaseException as error:  # the row says so, the others go on
        row["state"] = "error" if isinstance(error, SpaError) else "crash"
        row["note"] = measure.brief(error)
        if isinstance(error, TargetError) and str(error).startswith("nothing in this model"):
            row["state"] = "nothing"
        if (reason := zoo.unloadable(path)) is not None:
            row["state"], row["note"] = "no-ort", reason.replace(str(path), path.name)
    row["seconds"], row["cpu"] = time.perf_counter() - start, time.process_time() - cpu
    return row


def _check(path: Path, output: Path, options: argparse.Namespace, row: Row) -> None:
    analysis = spa.analyze(path)
    row["parameters"] = analysis.parameters
    row["prunable"] = analysis.prunable_parameters / analysis.parameters if analysis.parameters else 1.0
    row["groups"] = dict(Counter(group.kind for group in analysis.groups))
    row["exact"] = sum(group.exact for group in analysis.groups)
    frozen = [f for f in analysis.frozen if not is_window(f)]
    row["frozen"] = [[f.tensor, f.axis, because(f), f.parameters] for f in frozen[:3]]
    npz = path.with_suffix(".npz")
    given: dict[str, Any] = {"scope": "all", "inputs": npz if npz.exists() else None, "output": output}
    row["reachable"] = _least(path, "macs", {"scope": "all"})
    for kind in row["groups"]:
        least = _least(path, "params", {"scope": "all", "kinds": [kind]})
        if least is None:
            row["kinds"][kind] = "nothing leaves alone"
            continue
        target = f"params={min(0.5 + least / 2, 0.999):.4f}"
        done = spa.prune(path, target=target, kinds=[kind], **given)
        assert done.report.verify is not None  # it raises unless it passed
        row["kinds"][kind] = done.report.verify.max_rel_error
    result = zoo.pruned(path, "macs=0.7", {**given, "align": 1}, row)
    report = result.report
    row["macs"] = report.macs.after / max(report.macs.before, 1)
    assert report.verify is not None
    row["error"] = report.verify.max_rel_error
    if report.verify.exact:
        row["outside"], row["effect"] = zoo.outside_error(path, output, result.plan, given["inputs"])
        if not row["outside"] <= report.verify.tolerance:
            row["state"], row["note"] = "wrong", f"outside check differs by {row['outside']:.3g}"


def _least(path: Path, metric: str, options: dict[str, Any]) -> float | None:
    """The smallest share of a cost that is left when everything leaves that may; None if nothing may."""
    try:
        result = spa.prune(path, target=f"{metric}={_LEAST}", check=False, align=1, **options)
    except TargetError as error:
        shares = [float(share) for _, share in zoo.BEST.findall(str(error))]
        return min(shares) if shares and min(shares) < 0.9995 else None
    cost = result.report.macs if metric == "macs" else result.report.parameters
    return cost.after / max(cost.before, 1)


# -- the page --------------------------------------------------------------------------------------------------------


def page(rows: Sequence[Row], failures: dict[str, str], recorded: Sequence[Row], operators: str) -> str:
    """docs/coverage.md."""
    by_name = {row["name"]: row for row in rows}
    lines = [
        _HEAD.format(
            models=len(rows), families=len({row["name"].rpartition("_")[0] for row in rows}), goal=f"{GOAL:.0%}",
            ok=sum(row["state"] == "ok" for row in rows), met=sum(row.get("prunable", 0) >= GOAL for row in rows),
            operators=operators,
        ),
        "## Architectures",
        "",
        *_TABLE_HEAD,
    ]  # fmt: skip
    notes: list[str] = []
    for name, family in FAMILIES.items():
        for exporter, end in EXPORTERS.items():
            stem = f"{name}_{end}"
            if stem in by_name:
                lines.append(_line(by_name[stem], family.title, exporter))
            elif stem in failures:
                notes.append(f"- {family.title}, {exporter}: not exported ({failures[stem]})")
    if notes:
        lines += ["", "Not there, because the exporter refuses the module:", "", *notes]
    if recorded:
        lines += ["", "## Recorded models", "", _RECORDED, "", *_TABLE_HEAD]
        lines += [_line(row, row["name"], row["exporter"]) for row in recorded]
    short = [row for row in (*rows, *recorded) if row.get("prunable", 1) < GOAL]
    if short:
        lines += ["", f"## Below {GOAL:.0%}", ""]
        lines += [
            f"- `{row['name']}` ({row['prunable']:.1%}): " + "; ".join(_frozen(f) for f in row["frozen"])
            for row in short
        ]
    return "\n".join(lines) + "\n"


_HEAD = """# Coverage

<!-- Written by `python benchmarks/coverage.py`; see the top of that file. -->

What `spa` finds in {families} architecture families, as the two exporters of PyTorch write them ({models} files):
{ok} are pruned in every kind of group that they have and verified in ONNX Runtime; in {met} at least {goal} of the
parameters are prunable.

{operators}

How to read a row: *groups* are counted by kind; *prunable* is the share of the parameters that is in some group; *MACs*
is the least that can be left of the multiply-accumulates; *verified* is the largest relative error of all verified
prunings of that file (each kind alone, then all together; float32); *outside* is that of the check that knows only the
plan, where all that left was exact; *largest frozen part* is an axis that nothing can leave, with the parameters on it
(an axis of a tensor whose other axes may well be pruned). Models are small, with random weights.

What Torch-Pruning makes of the same layers stands in [cross-check.md](cross-check.md); a page per family in the
[gallery](gallery/README.md).

Whole experts of a mixture leave where the router's choice is followed to stacked weights
([concepts](concepts.md#experts)); not there: experts in groups of which the best are chosen first (DeepSeek V3 with
`n_group` above 1), loops over experts, and lists of experts whose outputs are stacked. Neurons inside experts leave in
all of these. Caches of keys and values keep their shapes here, with them the heads' sizes; `--allow-io` lets both
shrink.
"""
_RECORDED = """Files that PyTorch, TensorFlow, Keras, JAX, PaddlePaddle, scikit-learn, converters and quantisers wrote
over the years. They are not part of the project; `--zoo` names their folder."""
_TABLE_HEAD = [
    "| architecture | exporter | groups | prunable | MACs | verified | outside | largest frozen part |",
    "|---|---|---|--:|--:|--:|--:|---|",
]


def _line(row: Row, title: str, exporter: str) -> str:
    if "prunable" not in row:
        return f"| {title} | {exporter} | - | - | - | {row['state']} | - | {row['note']} |"
    groups = ", ".join(f"{count} {kind}" for kind, count in row["groups"].items()) or "none"
    errors = [e for e in (*row["kinds"].values(), row.get("error")) if isinstance(e, float)]
    verified = _error(max(errors)) if errors and row["state"] == "ok" else row["state"]
    missing = [kind for kind, found in row["kinds"].items() if not isinstance(found, float)]
    if missing:
        verified += f" (not {', '.join(missing)} alone)"
    if row["state"] == "nothing":
        verified = "nothing to prune"
    elif row["state"] != "ok" and row["note"]:
        verified += f": {row['note']}"
    prunable = f"{row['prunable']:.1%}" if row["prunable"] >= GOAL else f"**{row['prunable']:.1%}**"
    return (
        f"| {title} | {exporter} | {groups} | {prunable} | {_number(row.get('reachable'), '.3f')} | {verified} | "
        f"{_error(row.get('outside'))} | {_frozen(row['frozen'][0]) if row['frozen'] else 'nothing'} |"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value else "0"


def _frozen(entry: Sequence[Any]) -> str:
    tensor, axis, why, count = entry
    return f"`{tensor}` axis {axis} ({count:,}): {why}".replace("|", "\\|")


def operators() -> str:
    """How many operators of the default domain have a rule, and which have none."""
    from onnx import defs

    from spa.rules import lookup

    known = {s.name for s in defs.get_all_schemas() if s.domain == "" and not s.deprecated}
    missing = sorted(name for name in known if lookup("", name, 10**6) is None)
    return (
        f"Of the {len(known)} operators of ONNX's default domain {len(known) - len(missing)} have a rule; the other "
        f"{len(missing)} stand with the reason why not in [operators.md](operators.md#without-a-rule)."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable, help="exports what is missing; 'none' exports nothing")
    parser.add_argument("--zoo", type=Path, help="a folder with manifest.json")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN")
    parser.add_argument(
        "--known",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="rows of --json that are not measured again",
    )
    parser.add_argument("--write", type=Path, metavar="coverage.md")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds per model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.verbose = False
    if options.python != "none":
        script = Path(__file__).with_name("architectures.py")
        subprocess.run([options.python, str(script), str(options.folder)], check=True)
    ledger = options.folder / "failures.json"
    failures = json.loads(ledger.read_text()) if ledger.exists() else {}
    listed = json.loads((options.zoo / "manifest.json").read_text())["models"] if options.zoo else []
    own = [p for p in sorted(options.folder.glob("*.onnx")) if p.stem.rpartition("_")[0] in FAMILIES]
    others = [options.zoo / entry["file"] for entry in listed]
    paths = [p for p in (*own, *others) if not options.only or any(fnmatch.fnmatch(p.stem, o) for o in options.only)]
    known = {row["name"]: row for file in options.known for row in json.loads(file.read_text())["rows"]}
    paths = [path for path in paths if path.stem not in known]
    rows = [*known.values()]
    rows += zoo.run_all(paths, options, lambda row: print(_line(row, row["name"], ""), flush=True), check)
    taken = {path.stem for path in own}  # a recorded model of the same name is left out
    exporters = {s: e["exporter"] for e in listed if (s := Path(e["file"]).stem) not in taken}
    recorded = [{**row, "exporter": exporters[row["name"]]} for row in rows if row["name"] in exporters]
    text = page([row for row in rows if row["name"] not in exporters], failures, recorded, operators())
    if options.write is not None:
        options.write.write_text(text)
    measure.write(options.json, {"rows": rows, "failures": failures})
    return 1 if any(row["state"] in ("error", "crash", "wrong", "timeout") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
