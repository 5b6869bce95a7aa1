"""Prune every model of a folder and check each result twice: the table says what failed and why.

    python benchmarks/zoo.py [--only PATTERN] [--scope exact|all] [--target macs=0.7] [FOLDER]

FOLDER (default: $SPA_DATA) holds `.onnx` files; beside each may lie an `.npz` with one array `in:NAME` per input,
and a `manifest.json` with a list `models` of objects with `name` and `file`. Each model runs in a process of its
own, so that a crash or an endless loop costs one row. Where the target lies below what a model allows, the best
point that the error names is taken instead.

The second check ("outside") knows nothing of `spa` but the plan: it zeroes the named slices in the original file
with plain `onnx` and runs both files in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import measure  # also makes `spa` importable
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

import spa.pipeline as spa
from spa.errors import SpaError, TargetError
from spa.feeds import load_feeds
from spa.plan import Plan
from spa.signature import inputs_of

Row = dict[str, Any]
Check = Callable[[Path, argparse.Namespace], Row]
BEST = re.compile(r"(\w+)=[\d.e+-]+ \(([\d.]+) of the original\)")
_GOAL_ERROR, _GOAL_PRUNABLE = 1e-4, 0.95
"""States of a row: ok; nothing (the scope leaves nothing to prune); no-ort (ONNX Runtime refuses the original);
wrong (the outside check differs); error (`spa` refused); crash, timeout (a bug)."""


# -- one model -------------------------------------------------------------------------------------------------------


def check_model(path: Path, options: argparse.Namespace) -> Row:
    """Prune and check one model; problems become the row's `state` and `note`."""
    row: Row = {"name": path.stem, "state": "ok", "note": ""}
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with tempfile.TemporaryDirectory(prefix="spa-zoo-") as folder:
            _check(path, Path(folder) / path.name, options, row)
    except BaseException as error:
        row["state"] = "error" if isinstance(error, SpaError) else "crash"
        row["note"] = f"{type(error).__name__}: {error}".replace("\n", " ")
        if not isinstance(error, SpaError):
            place = traceback.extract_tb(error.__traceback__)[-1]
            row["note"] += f"  [{Path(place.filename).name}:{place.lineno} {place.name}]"
        row["traceback"] = traceback.format_exc()
        if isinstance(error, TargetError) and str(error).startswith("nothing in this model"):
            row["state"] = "nothing"
        if (reason := unloadable(path)) is not None:
            row["state"], row["note"] = "no-ort", f"{reason} | spa: {row['note']}"
    row["seconds"], row["cpu"] = time.perf_counter() - start, time.process_time() - cpu
    return row


def _check(path: Path, output: Path, options: argparse.Namespace, row: Row) -> None:
    begin = time.perf_counter()
    graph = spa.load(path)
    row["load"] = time.perf_counter() - begin
    begin = time.perf_counter()
    analysis = spa.analyze(graph)
    row["analyze"] = time.perf_counter() - begin
    row["parameters"] = analysis.parameters
    row["prunable"] = analysis.prunable_parameters / analysis.parameters if analysis.parameters else None
    row["frozen"] = [[f.tensor, f.axis, f.reason.text, f.parameters] for f in analysis.frozen[:5]]
    npz = path.with_suffix(".npz")
    kwargs: dict[str, Any] = {
        "output": output,
        "criterion": options.criterion,
        "align": options.align,
        "seed": options.seed,
        "inputs": npz if npz.exists() and not options.synthetic else None,
        "scope": options.scope,
    }
    result = pruned(path, options.target, kwargs, row)
    report = result.report
    before = {"macs": report.macs.before, "parameters": report.parameters.before}
    after = {"macs": report.macs.after, "parameters": report.parameters.after}
    row |= {f"{k}_left": after[k] / before[k] if before[k] else None for k in before}
    row |= {"groups": report.groups, "removed": report.removed_units, "stages": dict(report.seconds)}
    exact = True
    if report.verify is not None:
        exact = report.verify.exact
        row |= {"exact": exact, "error": report.verify.max_rel_error}
    if exact and not options.no_outside:
        row["outside"], row["effect"] = outside_error(path, output, result.plan, kwargs["inputs"])
        accepted = report.verify.tolerance if report.verify is not None else _GOAL_ERROR
        if not row["outside"] <= accepted:
            row["state"], row["note"] = "wrong", f"outside check differs by {row['outside']:.3g}"
    if row["state"] == "ok" and row["prunable"] is not None and row["prunable"] < _GOAL_PRUNABLE:
        row["note"] = "; ".join(f"{t}[{a}] {why} ({n:,})" for t, a, why, n in row["frozen"][:2])


def pruned(path: Path, target: str, kwargs: Mapping[str, Any], row: Row) -> spa.Result:
    try:
        result = spa.prune(path, target=target, **kwargs)
        row["reached"] = "target"
        return result
    except TargetError as error:
        points = BEST.findall(str(error))
        if not points or not any(float(share) < 0.999 for _, share in points):
            row["unreachable"] = str(error)
            raise
        row["unreachable"] = str(error)
    names = {"parameters": "params", "bytes": "size"}
    nearest = [f"{names.get(metric, metric)}={min(float(share) + 0.001, 1):.4f}" for metric, share in points]
    result = spa.prune(path, target=nearest, **kwargs)
    row["reached"] = "best"
    return result


def unloadable(path: Path) -> str | None:
    """Why ONNX Runtime itself refuses the original, if it does."""
    try:
        _session(str(path))
    except Exception as error:  # its exception classes are private and share no base
        return f"ONNX Runtime does not load the original ({str(error).splitlines()[0][:120]})"
    return None


# -- the outside check: plain onnx, numpy and ONNX Runtime -------------------------------------------------------------


def outside_error(original: Path, pruned: Path, plan: Plan, inputs: Path | None) -> tuple[float, float]:
    """Largest relative differences of the pruned model: from the original with the plan's slices zeroed, and as it was.

    The second tells whether the first means something: a model whose output ignores its weights passes always.
    """
    body = json.loads(plan.to_json())
    model = onnx.load(str(original))
    feeds = _feeds(original, inputs)
    untouched = _session(model.SerializeToString()).run(None, feeds)
    zero_slices(model, body["removed"])
    dense = _session(model.SerializeToString()).run(None, feeds)
    slim = _session(str(pruned)).run(None, feeds)
    return _difference(dense, slim), _difference(untouched, slim)


def _difference(wide: list[Any], slim: list[Any]) -> float:
    worst = 0.0
    for a, b in zip(wide, slim, strict=True):
        if not isinstance(a, np.ndarray) or a.dtype.kind in "OUS":
            continue
        if a.shape != b.shape:
            return float("inf")
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not x.size:
            continue
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        gap = np.nan_to_num(np.where(same, 0.0, np.abs(x - y)), nan=np.inf)
        scale = np.abs(x[np.isfinite(x)]).max(initial=0.0)
        worst = max(worst, float(gap.max() / (scale or 1.0)))
    return worst


def zero_slices(model: onnx.ModelProto, removed: list[dict[str, Any]]) -> None:
    """Zero the slices in place; uses that are named get a copy of their own."""
    for graph in _graphs(model.graph):
        tensors = _tensors(graph)
        for entry in removed:
            if entry["consumers"] is None and entry["initializer"] in tensors:
                _blank(tensors[entry["initializer"]], entry)
    named = [entry for entry in removed if entry["consumers"] is not None]
    everywhere = {name: tensor for graph in _graphs(model.graph) for name, tensor in _tensors(graph).items()}
    for graph in list(_graphs(model.graph)):
        for node in graph.node:
            for slot, name in enumerate(node.input):
                mine = [
                    entry
                    for entry in named
                    if entry["initializer"] == name
                    and {"output": next(iter(node.output), ""), "input": slot} in entry["consumers"]
                ]
                if mine:
                    copy = model.graph.initializer.add()
                    copy.CopyFrom(everywhere[name])
                    copy.name = f"{name}__{node.output[0]}__{slot}"
                    for entry in mine:
                        _blank(copy, entry)
                    node.input[slot] = copy.name


def _blank(tensor: onnx.TensorProto, entry: Mapping[str, Any]) -> None:
    array = np.array(numpy_helper.to_array(tensor))
    array[(slice(None),) * entry["axis"] + (entry["indices"],)] = 0
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def _tensors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and constants under the names of their outputs."""
    constants = [node for node in graph.node if node.op_type == "Constant"]
    found = {tensor.name: tensor for tensor in graph.initializer}
    return found | {n.output[0]: a.t for n in constants for a in n.attribute if a.name == "value"}


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _feeds(original: Path, inputs: Path | None) -> dict[str, Any]:
    if inputs is not None:
        return dict(load_feeds(inputs, inputs_of(original)))
    from spa.feeds import runnable_feeds
    from spa.runtime import open_session

    return dict(runnable_feeds(original, open_session(original), 1))


def _session(model: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# -- all models ------------------------------------------------------------------------------------------------------


def models_of(folder: Path, only: list[str]) -> list[Path]:
    """The models of the manifest, or all `.onnx` files, whose name matches one of the patterns."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        listed = json.loads(manifest.read_text())["models"]
        paths = [folder / entry["file"] for entry in listed]
    else:
        paths = sorted(folder.glob("*.onnx"))
    wanted = [p if any(c in p for c in "*?[") else f"*{p}*" for p in only] or ["*"]
    exact = [path for path in paths if path.stem in only]
    return exact or [path for path in paths if any(fnmatch.fnmatchcase(path.stem, p) for p in wanted)]


def _child(path: Path, options: argparse.Namespace, send: Any, check: Check) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    if not options.verbose:
        os.dup2(sink, 2)
    send.send(check(path, options))
    send.close()


def run_all(
    paths: list[Path], options: argparse.Namespace, done: Callable[[Row], None], check: Check = check_model
) -> list[Row]:
    """`check` in one process per model, `options.jobs` at a time; rows in the order of `paths`."""
    context = multiprocessing.get_context("fork")
    waiting, running, rows = list(enumerate(paths)), {}, dict[int, Row]()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            k, path = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(path, options, send, check))
            process.start()
            send.close()
            running[k] = (process, receive, time.perf_counter(), path)
        for k, (process, receive, begin, path) in list(running.items()):
            row: Row | None = None
            seconds = time.perf_counter() - begin
            if receive.poll(0.02):
                try:
                    row = receive.recv()
                except EOFError:
                    process.join()
                    row = {"name": path.stem, "state": "crash", "note": f"process died, exit code {process.exitcode}"}
            elif seconds > options.timeout:
                process.kill()
                row = {"name": path.stem, "state": "timeout", "note": f"no result after {options.timeout:.0f} s"}
            if row is not None:
                process.join()
                row.setdefault("seconds", seconds)
                rows[k] = row
                del running[k]
                done(row)
    return [rows[k] for k in sorted(rows)]


# -- output ----------------------------------------------------------------------------------------------------------

_COLUMNS = "{:32} {:8} {:>11} {:>6} {:>6} {:>6} {:>4} {:>5} {:>7} {:>7} {:>7} {:>5} {:>5}  {}"
_HEADINGS = (
    "model", "state", "parameters", "prun.", "macs", "params", "grp", "units", "error", "outside", "effect", "anal.",
    "total", "note",
)  # fmt: skip


def _line(row: Row, width: int) -> str:
    def show(key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else format(value, form)

    macs = show("macs_left", ".3f") + ("*" if row.get("reached") == "best" else "")
    return _COLUMNS.format(
        row["name"][:32],
        row["state"],
        show("parameters", ",d"),
        show("prunable", ".1%"),
        macs,
        show("parameters_left", ".3f"),
        show("groups", "d"),
        show("removed", "d"),
        show("error", ".1e"),
        show("outside", ".1e"),
        show("effect", ".1e"),
        show("analyze", ".2f"),
        show("seconds", ".1f"),
        row["note"][:width],
    )


def summary(rows: list[Row], seconds: float) -> dict[str, Any]:
    """Counts and totals of a run."""
    states = Counter(row["state"] for row in rows)
    loaded = [row for row in rows if row["state"] != "no-ort"]
    with_share = [row for row in loaded if row.get("prunable") is not None]
    low = [row for row in with_share if row["prunable"] < _GOAL_PRUNABLE]
    inexact = [row["name"] for row in rows if max(row.get("error") or 0, row.get("outside") or 0) > _GOAL_ERROR]
    return {
        "models": len(rows),
        "states": dict(states),
        "reached_target": sum(row.get("reached") == "target" for row in rows),
        "reached_best": sum(row.get("reached") == "best" for row in rows),
        "exact_scope": sum(bool(row.get("exact")) for row in rows),
        "worst_error": max((row["error"] for row in rows if row.get("error") is not None), default=None),
        "worst_outside": max((row["outside"] for row in rows if row.get("outside") is not None), default=None),
        "above_1e-4": inexact,
        "no_effect": [row["name"] for row in rows if row.get("effect") is not None and row["effect"] < _GOAL_ERROR],
        "prunable_at_least_95%": len(with_share) - len(low),
        "prunable_below_95%": {row["name"]: round(row["prunable"], 4) for row in low},
        "analyze_seconds": sum(row.get("analyze", 0.0) for row in rows),
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=os.environ.get("SPA_DATA"), help="default: $SPA_DATA")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="name, part of one, or a pattern"
    )
    parser.add_argument("--target", default="macs=0.7")
    parser.add_argument("--scope", choices=("exact", "all"), default="exact")
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--align", type=lambda t: t if t == "auto" else int(t), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--synthetic", action="store_true", help="verify on made-up inputs even where an .npz exists")
    parser.add_argument("--no-outside", action="store_true", help="skip the check that knows only the plan")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per model")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="models at a time")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of every failure")
    parser.add_argument("--verbose", action="store_true", help="let the models' processes write to stderr")
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    options = parser.parse_args()
    if options.folder is None or not Path(options.folder).is_dir():
        parser.error("name a folder of models, or set SPA_DATA")
    paths = models_of(Path(options.folder), options.only)
    if not paths:
        parser.error(f"no model in {options.folder} matches {options.only}")
    width = 10**6 if not sys.stdout.isatty() else max(40, os.get_terminal_size().columns - 130)
    print(_COLUMNS.format(*_HEADINGS), flush=True)
    start = time.perf_counter()

    def done(row: Row) -> None:
        print(_line(row, width), flush=True)
        if options.traceback and "traceback" in row:
            print(row["traceback"], flush=True)

    rows = run_all(paths, options, done)
    total = summary(rows, time.perf_counter() - start)
    bad = [row for row in rows if row["state"] not in ("ok", "nothing", "no-ort")]
    if bad:
        print("\nfailures, by reason:")
        for reason, count in Counter(re.sub(r"'[^']*'|[\d.]+", "_", row["note"])[:160] for row in bad).most_common():
            names = [row["name"] for row in bad if re.sub(r"'[^']*'|[\d.]+", "_", row["note"])[:160] == reason]
            print(f"{count:4}  {reason}\n      {', '.join(names)}")
    print("\n" + json.dumps(total, indent=1))
    print("* = the best reachable point; error = spa's verification, outside = the check that knows only the plan,")
    print("effect = how far the pruned model is from the original: without an effect the checks prove nothing")
    if options.json:
        measure.write(options.json, {"options": vars(options), "rows": rows, "summary": total})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
