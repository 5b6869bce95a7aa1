"""From ten million to seventy billion parameters: time and memory of decoders of LLaMA's shape.

    python benchmarks/scale.py [--only STEP] [--layers N] [--json FILE]

Every step runs in a process of its own; times are of the whole process, imports included. "Anonymous" is the most
memory that no file backs (RssAnon, sampled every 5 ms), everything included: the interpreter and its libraries alone
have some 65 MB.

    inspect  1.1 B parameters in float16 with external data (TinyLlama's shape)
    absent   analysis of 70 B parameters whose weights are not there
    l2       pruning of the 1.1 B by l2 norms, without and with verification
    shards   the same model in four files, to files no larger
    flat     l2 norms on 10 M, 100 M and 1.1 B: time per parameter
    obspa    with a refit on streamed calibration, on `--layers` (repeatable) of the 22 layers, at full width

Weights and tokens are random: the figures are about time and memory, not about quality.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from decoders import DECODERS
from measure import brief, seconds, table, write
from memory import Sampler
from models import build
from paths import data_of, size_of

STEPS = ("inspect", "absent", "l2", "shards", "flat", "obspa")
SEQUENCES, LENGTH = 24, 64
"""Calibration: 1,536 tokens, for the 5,632 inputs of the widest layer (at least one for eight is asked for)."""
GOALS = {"inspect": (10.0, None), "absent": (20.0, None), "l2": (None, 2e9), "obspa": (None, 6e9)}
"""Step -> most seconds (of one core: wall time depends on who else uses the machine), most anonymous bytes."""


def child(question: dict[str, Any]) -> dict[str, Any]:
    """What one process does."""
    sampler = Sampler()
    sampler.start()
    answer: dict[str, Any] = {}
    try:
        answer = _do(question)
    except Exception as error:  # the parent reports it beside what was measured
        answer["failed"] = brief(error)
    sampler.running = False
    sampler.join()
    sampler.sample()
    return {**answer, "anonymous": sampler.own}


def _do(question: dict[str, Any]) -> dict[str, Any]:
    import spa.pipeline as spa
    from spa.graph import load

    path, do = Path(question["model"]), question["do"]
    if do == "inspect":
        analysis = spa.analyze(load(path, weights=question["weights"]))
        return {"groups": len(analysis.groups), "parameters": analysis.parameters}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".scale-") as folder:
        output = Path(folder) / "out.onnx"
        options: dict[str, Any] = {"dims": {"batch": 1, "length": 16}, "check": question["check"]}
        if do == "obspa":
            ids = np.random.default_rng(0).integers(0, question["vocabulary"], (SEQUENCES, LENGTH))
            np.savez(Path(folder) / "ids.npz", input_ids=ids)
            options |= {
                "method": "obspa", "calibration": Path(folder) / "ids.npz", "batch": 8, "memory": question["memory"],
            }  # fmt: skip
        result = spa.prune(path, target=question["target"], output=output, **options)
        report = result.report
        return {
            "parameters": report.parameters.before,
            "left": report.parameters.after / report.parameters.before,
            "files": [part.stat().st_size for part in data_of(output)],
            "error": report.verify.max_rel_error if report.verify else None,
            "fit": [report.fit.error_before, report.fit.error_after] if report.fit else None,
            "stages": {name: round(spent, 2) for name, spent in report.seconds.items() if spent >= 0.05},
        }


def questions(steps: list[str], layers: list[int], memory: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Step, model and what to do with it."""
    prune = {"do": "l2", "target": "params=0.7", "check": False}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("inspect", "tinyllama", {"do": "inspect", "weights": True}),
        ("absent", "llama-70b", {"do": "inspect", "weights": False}),
        ("l2", "tinyllama", prune),
        ("l2", "tinyllama", {**prune, "check": True}),
        ("shards", "tinyllama-sharded", prune),
        *(("flat", name, prune) for name in ("tinyllama-10m", "tinyllama-100m", "tinyllama")),
    ]
    for count in layers:
        name = "tinyllama" if count == DECODERS["tinyllama"].layers else f"tinyllama-{count}-layers"
        refit = {"do": "obspa", "target": "params=0.9", "check": False}
        asked.append(("obspa", name, {**refit, "memory": memory, "vocabulary": DECODERS[name].vocabulary}))
    yield from (each for each in asked if each[0] in steps)


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        print("\n" + json.dumps(child(json.loads(sys.argv[2]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], choices=STEPS)
    parser.add_argument("--layers", action="append", type=int, default=[], metavar="N", help="for obspa; default: 2, 4")
    parser.add_argument("--memory", default="2GB", help="of obspa, for measurements and activations")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, results = [], []
    for step, name, question in questions(options.only or list(STEPS), options.layers or [2, 4], options.memory):
        path = build(name)
        command = [sys.executable, __file__, "--child", json.dumps({**question, "model": str(path)})]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            found = {"failed": f"the process died (exit code {done.returncode}): {done.stderr[-200:]}"}
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found |= {
            "step": step,
            "model": name,
            "wall": time.perf_counter() - start,
            "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "bytes": size_of(path),
            **question,
        }
        results.append(found)
        rows.append(_row(found))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    headings = (
        "step", "model", "parameters", "files MB", "wall s", "CPU s", "CPU us/parameter", "anonymous MB", "left",
        "what it wrote", "goal",
    )  # fmt: skip
    print(table(headings, rows))
    write(options.json, {"results": results})
    return 1 if any("failed" in found for found in results) else 0


def _row(found: dict[str, Any]) -> list[str]:
    step = found["step"] + (" + verify" if found.get("check") else "")
    head = [step, found["model"], f"{DECODERS[found['model']].parameters:,}", f"{found['bytes'] / 1e6:,.0f}"]
    if "failed" in found:
        return [*head, *["-"] * 6, found["failed"]]
    notes = []
    if found.get("files"):
        notes.append(" + ".join(f"{size / 1e6:,.0f}" for size in found["files"]) + " MB")
    if found.get("error") is not None:
        notes.append(f"verified, {found['error']:.1e}")
    if found.get("fit"):
        notes.append("output error {:.3f} -> {:.3f}".format(*found["fit"]))
    most_seconds, most_bytes = GOALS.get(found["step"], (None, None))
    verdict = "-"
    if most_seconds is not None:
        verdict = f"{most_seconds:.0f} s: " + ("met" if found["cpu"] <= most_seconds else "MISSED")
    if most_bytes is not None:
        verdict = f"{most_bytes / 1e9:.0f} GB: " + ("met" if found["anonymous"] <= most_bytes else "MISSED")
    return [
        *head,
        seconds(found["wall"]),
        seconds(found["cpu"]),
        f"{found['cpu'] / DECODERS[found['model']].parameters * 1e6:.4f}",
        f"{found['anonymous'] / 1e6:,.0f}",
        f"{found['left']:.3f}" if "left" in found else "-",
        "; ".join(notes) or f"{found['groups']} groups",
        verdict,
    ]


if __name__ == "__main__":
    sys.exit(main())
