"""How long it takes to find what can be pruned: `spa`, Torch-Pruning's dependency graph, onnxsim's structured pruning.

    python benchmarks/analysis.py [NAME ...] [--repeats 5] [--peers PYTHON] [--json FILE]

`spa` analysis is from a loaded graph to groups. Torch-Pruning 1.6.1 builds its dependency graph from the same
network as a torch module (its forward pass included, as it cannot do without); its groups are listed by a second
call, so both times are given: "TP build", and "TP groups" for graph and groups, which is what `spa` analysis does.
onnxsim 0.8.1 has no analysis of its own: its structured pruning, in Python and in C++, is compared with `spa.prune`
without verification, both from one `onnx.ModelProto` in memory to another. All tools run in processes of their own
that live through the run, one thread each, and take turns within each repeat. CPU time is of all threads; medians
over repeats, the first (cold) call apart.

`--peers` (or $SPA_PEERS_PYTHON) is a Python with torch, torch-pruning, onnx, onnxsim and transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from decoders import DECODERS
from measure import Times, Worker, brief, clock, seconds, serve, table, write
from models import build, needs
from networks import PEER_MODULES, example, module
from paths import path_of, size_of

GOALS = {"resnet50": 0.1, "vit-b16": 0.2, "bert-base": 0.2, "bert-base-hf": 0.2, "llama-7b": 2.0, "llama-7b-gqa": 2.0}
STANDARD = (
    "resnet50", "resnet50-dynamo", "vgg16-bn", "mobilenet-v2", "densenet121", "efficientnet-b0", "convnext-t",
    "vit-b16", "vit-b16-dynamo", "bert-base", "bert-base-hf", "bert-base-dynamo",
    "llama-narrow", "llama-7b", "llama-7b-gqa",
)  # fmt: skip
DEPTHS = (2, 4, 8, 16, 32)
LARGEST_FOR_ONNXSIM = 2**31  # it serializes the whole model

Rows = list[tuple[float, float]]


# -- the workers: each keeps what it loaded last ----------------------------------------------------------------------


def _spa() -> Callable[[dict[str, Any]], dict[str, Any]]:
    import onnx

    import spa.pipeline as pipeline
    from spa.graph import load
    from spa.groups import analyze_model

    held: dict[str, Any] = {}

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        path = question["path"]
        load_cpu, load_wall, graph = clock(partial(load, path))
        cpu, wall, analysis = clock(partial(analyze_model, graph.model))
        reply = {
            "load": [load_cpu, load_wall],
            "analysis": [cpu, wall],
            "nodes": sum(1 for _ in graph.model.graph),
            "groups": len(analysis.groups),
            "parameters": analysis.parameters,
            "prunable": analysis.prunable_parameters / analysis.parameters,
        }
        del graph, analysis
        if question.get("prune"):
            if path not in held:
                held.clear()
                held[path] = onnx.load(path)
            target = {"target": "params=0.75", "check": False, "align": 1}
            try:
                cpu, wall, result = clock(lambda: pipeline.prune(held[path], **target))
                reply["prune"] = [cpu, wall]
                reply["stages"] = dict(result.report.seconds)
            except Exception as error:  # a tool that fails on a model is a cell of the table
                reply["prune_error"] = brief(error)
        return reply

    return answer


def _torch_pruning() -> Callable[[dict[str, Any]], dict[str, Any]]:
    import torch
    import torch_pruning as tp

    torch.set_num_threads(1)
    held: dict[str, Any] = {}

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        name = question["name"]
        if name not in held:
            held.clear()
            held[name] = module(PEER_MODULES[name])
        inputs = example(name)
        cpu, wall, graph = clock(lambda: tp.DependencyGraph().build_dependency(held[name], inputs, verbose=False))
        reply: dict[str, Any] = {"build": [cpu, wall], "layers": len(graph.module2node)}
        try:
            cpu, wall, groups = clock(lambda: list(graph.get_all_groups()))
            reply |= {"groups": [reply["build"][0] + cpu, reply["build"][1] + wall], "found": len(groups)}
        except Exception as error:  # a tool that fails on a model is a cell of the table
            reply["groups_error"] = brief(error)
        return reply

    return answer


def _onnxsim() -> Callable[[dict[str, Any]], dict[str, Any]]:
    import onnx
    import onnxsim
    from onnxsim.pruning import apply_structured_pruning

    held: dict[str, Any] = {}

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        path = question["path"]
        if path not in held:
            held.clear()
            held[path] = onnx.load(path)
        reply: dict[str, Any] = {}
        before = _parameters(held[path])
        for key, call in (("cpp", onnxsim.apply_structured_pruning_cpp), ("python", apply_structured_pruning)):
            try:
                cpu, wall, pruned = clock(lambda call=call: call(held[path], sparsity=0.25))
                reply[key] = [cpu, wall]
                reply[f"{key}_left"] = _parameters(pruned) / before
            except Exception as error:  # a tool that fails on a model is a cell of the table
                reply[f"{key}_error"] = brief(error)
        return reply

    return answer


def _parameters(model: Any) -> int:
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in (1, 10, 11, 16))


WORKERS = {"spa": _spa, "torch-pruning": _torch_pruning, "onnxsim": _onnxsim}


# -- the run -----------------------------------------------------------------------------------------------------------


def made(names: list[str], python: str | None) -> list[str]:
    """The models that exist or could be made, here or with the peers' Python."""
    import importlib.util
    import subprocess

    for name in names:
        if not path_of(name).exists():
            if all(importlib.util.find_spec(package) for package in needs(name)):
                build(name)
            elif python is not None:
                script = Path(__file__).with_name("models.py")
                subprocess.run([python, str(script), name], check=False, capture_output=True)
    for name in names:
        if not path_of(name).exists():
            print(f"{name}: skipped, it cannot be made here (needs {', '.join(needs(name))})", file=sys.stderr)
    return [name for name in names if path_of(name).exists()]


def measure(name: str, workers: dict[str, Worker], repeats: int, prune: bool) -> dict[str, Any]:
    """All tools on one model, taking turns."""
    path = path_of(name)
    size = size_of(path)
    found: dict[str, Rows] = {}
    facts: dict[str, Any] = {"bytes": size}
    first: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    plain = name.removesuffix("-dynamo")
    questions = {
        "spa": {"path": str(path), "prune": prune and size < LARGEST_FOR_ONNXSIM},
        "torch-pruning": {"name": plain},
        "onnxsim": {"path": str(path)},
    }
    if plain not in PEER_MODULES:
        absent["torch-pruning"] = "no torch module of this size"
    if size >= LARGEST_FOR_ONNXSIM:
        absent["onnxsim"] = "above 2 GB, which it cannot serialize"
    for turn in range(repeats + 1):
        for tool, worker in workers.items():
            if tool in absent:
                continue
            reply = worker.ask(**questions[tool])
            if "error" in reply:
                absent[tool] = reply["error"]
                continue
            for key, value in reply.items():
                if not isinstance(value, list):
                    facts[f"{tool}.{key}"] = value
                elif turn:
                    found.setdefault(f"{tool}.{key}", []).append((value[0], value[1]))
                else:
                    first[f"{tool}.{key}"] = value
    return {
        "name": name,
        "facts": facts,
        "absent": absent,
        "first": first,
        "times": {key: vars(Times.of(rows)) for key, rows in found.items()},
    }


def _row(result: dict[str, Any]) -> list[str]:
    times, facts = result["times"], result["facts"]

    def cpu(key: str) -> float | None:
        return times[key]["cpu"] if key in times else None

    def both(key: str) -> str:
        return f"{seconds(times[key]['cpu'])} / {seconds(times[key]['wall'])}" if key in times else "-"

    def ratio(key: str, base: str) -> str:
        a, b = cpu(key), cpu(base)
        return "-" if a is None or not b else f"{a / b:.1f}x"

    goal = GOALS.get(result["name"])
    mine = cpu("spa.analysis")
    verdict = "" if goal is None or mine is None else f" ({'met' if mine <= goal else 'MISSED'} {goal:g})"
    return [
        result["name"],
        f"{facts.get('spa.nodes', 0):,}",
        f"{facts.get('spa.groups', 0)}",
        both("spa.load"),
        both("spa.analysis") + verdict,
        seconds(result["first"]["spa.analysis"][0]) if "spa.analysis" in result["first"] else "-",
        both("torch-pruning.build"),
        ratio("torch-pruning.build", "spa.analysis"),
        both("torch-pruning.groups"),
        ratio("torch-pruning.groups", "spa.analysis"),
        both("spa.prune"),
        both("onnxsim.cpp"),
        ratio("onnxsim.cpp", "spa.prune"),
        both("onnxsim.python"),
        ratio("onnxsim.python", "spa.prune"),
        " / ".join(f"{facts[k]:.2f}" for k in ("onnxsim.cpp_left", "onnxsim.python_left") if k in facts) or "-",
    ]


HEADINGS = (
    "model", "nodes", "groups", "spa load", "spa analysis", "cold", "TP build", "/spa", "TP groups", "/spa",
    "spa prune", "onnxsim C++", "/spa", "onnxsim Python", "/spa", "onnxsim kept",
)  # fmt: skip


def depth_scaling(series: str, workers: dict[str, Worker], repeats: int) -> dict[str, Any]:
    """Time of the analysis over depth, with a straight line through it."""
    names = {n: series if n == 32 else f"{series}-{n}" for n in DEPTHS}
    rows: dict[int, Rows] = {n: [] for n in DEPTHS}
    for turn in range(repeats + 1):
        for n, name in names.items():
            reply = workers["spa"].ask(path=str(path_of(name)))
            if turn and "error" not in reply:
                rows[n].append(tuple(reply["analysis"]))
    cpu = {n: Times.of(rows[n]).cpu for n in DEPTHS}
    slope, start = np.polyfit(list(cpu), list(cpu.values()), 1)
    return {
        "series": series,
        "cpu": cpu,
        "per_layer": float(slope),
        "constant": float(start),
        "worst_residual": float(max(abs(start + slope * n - t) for n, t in cpu.items())),
        "32/16": cpu[32] / cpu[16],
        "16/8": cpu[16] / cpu[8],
    }


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        serve(WORKERS[sys.argv[2]]())
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default=os.environ.get("SPA_PEERS_PYTHON"), metavar="PYTHON")
    parser.add_argument("--no-depth", action="store_true", help="skip the scaling with depth")
    parser.add_argument("--no-prune", action="store_true", help="skip spa.prune (the comparison with onnxsim)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    script = Path(__file__).resolve()
    workers = {"spa": Worker(sys.executable, script, "--worker", "spa")}
    if options.peers:
        workers |= {tool: Worker(options.peers, script, "--worker", tool) for tool in ("torch-pruning", "onnxsim")}
    names = made(list(options.names or STANDARD), options.peers)
    results = []
    for name in names:
        repeats = min(options.repeats, 2) if name in DECODERS and name.startswith("llama-7b") else options.repeats
        results.append(measure(name, workers, repeats, not options.no_prune))
        times = [f"{key} {value['cpu']:.3f}" for key, value in results[-1]["times"].items()]
        print(name, *times, results[-1]["absent"] or "", file=sys.stderr, flush=True)
        write(options.json, {"results": results, "repeats": options.repeats})
    print("CPU / wall seconds, medians; ratios of CPU time\n")
    print(table(HEADINGS, [_row(result) for result in results]))
    for result in results:
        for tool, why in result["absent"].items():
            print(f"- {result['name']}, {tool}: {why}")
        errors = {k: v for k, v in result["facts"].items() if k.endswith("_error")}
        for key, why in errors.items():
            print(f"- {result['name']}, {key}: {why}")
    scaling = []
    if not options.no_depth:
        for series in ("llama-narrow", "llama-7b"):
            made([f"{series}-{n}" for n in DEPTHS[:-1]] + [series], options.peers)
            scaling.append(depth_scaling(series, workers, min(options.repeats, 3 if series == "llama-narrow" else 2)))
        rows = [
            [s["series"], *(seconds(s["cpu"][n]) for n in DEPTHS), f"{s['per_layer'] * 1e3:.1f} ms",
             f"{s['constant'] * 1e3:.1f} ms", f"{s['16/8']:.2f}", f"{s['32/16']:.2f}"]
            for s in scaling
        ]  # fmt: skip
        print("\nAnalysis over depth, CPU seconds (linear growth: 32/16 is at most 2)\n")
        print(table(("layers", *map(str, DEPTHS), "per layer", "constant", "16/8", "32/16"), rows))
    for worker in workers.values():
        worker.close()
    write(options.json, {"results": results, "depth": scaling, "repeats": options.repeats})
    return 0


if __name__ == "__main__":
    sys.exit(main())
