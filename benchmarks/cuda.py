"""Everything about an NVIDIA GPU in one command: what really ran there, how fast, and whether it computes the same.

    python benchmarks/cuda.py [MODEL ...] [--batch 1 --batch 8 --batch 32] [--json FILE] [--markdown docs/cuda.md]

MODEL is an ONNX file or a name of `benchmarks/models.py` (default: mobilenet-v2, resnet50). For each model:

* `latency`: dense, pruned (`--target`, default macs=0.6), and both in float16, over batch sizes. Inputs and outputs
  stay on the GPU (IO binding), models take turns in every round, and the GPU has finished before the clock stops.
* `outputs`: CUDA against the CPU, on the same inputs.
* `statistics`: means and covariances of every layer's inputs, collected on CUDA and on the CPU: within 1e-3.
* `gradients`: Fisher information of gates through torch on CUDA and on the CPU: within 1e-3; and one epoch of
  fine-tuning on CUDA (both only where torch has CUDA).
* `table` and `target`: the latency table of `spa profile --provider cuda`, and pruning to `latency=0.6` by it.

TF32 is off wherever numbers are compared, and on (ONNX Runtime's default) where time is. Needs an NVIDIA GPU with its
driver, CUDA 13 and cuDNN 9: `pip install onnxruntime-gpu[cuda,cudnn]` brings both. Without a GPU it says so and ends
with status 1. `--provider cpu` rehearses all of it without one. Any check that fails makes the status 1, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, table, write  # first: it makes `spa` importable where it is not installed

import spa
from spa.calibration import load_calibration
from spa.errors import SpaError
from spa.executors.collect import Setup
from spa.feeds import make_feeds
from spa.gradients import Gradients
from spa.measured import Measured
from spa.runtime import cuda_problem, open_session, provider_of, run, runtime_version
from spa.signature import index_bounds, inputs_of

MODELS = ("mobilenet-v2", "resnet50")
CLOSE = 1e-3
"""Largest accepted difference between CUDA and the CPU, relative to the largest magnitude."""
HALF = 2e-2
"""The same for float16."""
Found = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--batch", type=int, action="append", help="may be given several times; default 1, 8, 32")
    parser.add_argument("--target", default="macs=0.6")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64, help="for statistics and gradients")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses without a GPU")
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="may be given several times")
    parser.add_argument("--profile-models", type=int, default=40, help="models with random widths in the latency table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    problem = missing() if options.provider == "cuda" else None
    if problem is not None:
        print(f"error: no NVIDIA GPU can be used here: {problem}", file=sys.stderr)
        return 1
    body: Found = {"device": device(options.provider), "target": options.target, "models": {}}
    for name in options.models or MODELS:
        path = located(name)
        if path is None:
            print(f"error: {name} is no ONNX file, and cannot be made here", file=sys.stderr)
            return 1
        with tempfile.TemporaryDirectory(prefix="spa-cuda-") as folder:
            body["models"][path.stem] = one_model(path, Path(folder), options)
        write(options.json, body)
    text = markdown(body, sys.argv[1:] if arguments is None else arguments)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    failed = [f"{m}: {part}" for m, found in body["models"].items() for part, f in found.items() if not f["passed"]]
    if failed:
        print(f"error: {'; '.join(failed)} did not pass, see above", file=sys.stderr)
    return 1 if failed else 0


def missing() -> str | None:
    """Why CUDA does not work here, or None; a session has the last word, not a list of providers."""
    problem = cuda_problem()
    if problem is not None:
        return problem
    import onnx
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", info[:1], info[1:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    try:
        session = open_session(model.SerializeToString(), provider="cuda")
        run(session, {"x": np.ones(1, np.float32)})
    except SpaError as error:
        return str(error)
    return None


def device(provider: str) -> Found:
    """What it ran on, and with which versions."""
    found: Found = {**machine(), "provider": provider, "onnxruntime": runtime_version(), "spa": spa.__version__}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    if shutil.which(query[0]) and provider == "cuda":
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        found["gpu"] = done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
    with contextlib.suppress(ImportError):
        import torch

        found["torch"], found["torch_cuda"] = torch.__version__, torch.version.cuda or "none"
    return found


def located(name: str) -> Path | None:
    """The file of a model; networks are made if they are not there."""
    if name.endswith(".onnx"):
        return Path(name) if Path(name).is_file() else None
    try:
        from analysis import made
        from paths import path_of

        return path_of(name) if made([name], None) else None
    except (ImportError, KeyError):
        return None


def one_model(path: Path, folder: Path, options: argparse.Namespace) -> Found:
    """All parts of one model; a part that fails says why, and the others go on."""
    out: Found = {}
    for name, part in PARTS.items():
        if options.only and name not in options.only:
            continue
        print(f"{path.stem}: {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            out[name] = part(path, folder, options)
        except Exception as error:  # one failure should not cost the other results of a rented machine
            out[name] = {"passed": False, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        out[name]["seconds"] = round(time.perf_counter() - start, 1)
    return out


# -- latency and outputs ----------------------------------------------------------------------------------------------


def variants(path: Path, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Dense and pruned, in float32 and float16."""
    from spa.edge.half import to_float16

    found = {"dense": path, "pruned": folder / "pruned.onnx"}
    if not found["pruned"].exists():
        spa.prune(path, target=options.target, output=found["pruned"], check=False)
        for name in ("dense", "pruned"):
            to_float16(found[name], folder / f"{name}16.onnx")
    return {**found, "dense float16": folder / "dense16.onnx", "pruned float16": folder / "pruned16.onnx"}


def feeds_of(path: Path, batch: int) -> dict[str, Any]:
    """The same inputs for all variants: those of the file."""
    model = spa.load(path).model
    specs = inputs_of(model)
    dims = {
        s.shape[0] or f"{s.name}:0": batch
        for s in specs
        if s.shape and not isinstance(s.shape[0], int)
    }  # fmt: skip
    return make_feeds(specs, seed=0, dims=dims, bounds=index_bounds(model))


class Timed:
    """A model whose inputs and outputs stay on the device."""

    def __init__(self, path: Path, feeds: Mapping[str, Any], provider: str) -> None:
        import onnxruntime as ort

        self.session = open_session(path, provider=provider, deterministic=False)  # type: ignore[arg-type]  # cuda or cpu
        self.provider = provider_of(self.session)
        self.binding = self.session.io_binding()
        for name, array in feeds.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self.provider, 0))
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name, self.provider)
        for _ in range(10):  # cuDNN chooses its algorithms in the first runs
            self.time()

    def time(self) -> float:
        """Milliseconds of one run."""
        start = time.perf_counter_ns()
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return (time.perf_counter_ns() - start) * 1e-6


def latency(path: Path, folder: Path, options: argparse.Namespace) -> Found:
    """Milliseconds per run of every variant and batch size, in turns."""
    rows, used = [], set()
    for batch in options.batch or [1, 8, 32]:
        feeds = feeds_of(path, batch)
        timed = {name: Timed(file, feeds, options.provider) for name, file in variants(path, folder, options).items()}
        used |= {t.provider for t in timed.values()}
        rng, times = np.random.default_rng(0), {name: [] for name in timed}  # type: dict[str, list[float]]
        for _ in range(options.rounds):
            for name in rng.permutation(list(timed)):
                times[name].append(timed[name].time())
        dense = np.array(times["dense"])
        for name, found in times.items():
            p50, p90, p99 = np.percentile(found, [50, 90, 99])
            rows.append(
                {
                    "batch": batch, "version": name, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99,
                    "samples_per_s": 1e3 * batch / p50, "speedup": float(np.median(dense / np.array(found))),
                }
            )  # fmt: skip
        del timed
    return {"passed": used == {options.provider}, "provider": sorted(used), "rounds": options.rounds, "rows": rows}


def outputs(path: Path, folder: Path, options: argparse.Namespace) -> Found:
    """Largest difference of CUDA from the CPU, relative to the largest magnitude, for each variant."""
    feeds, errors = feeds_of(path, 2), {}
    for name, file in variants(path, folder, options).items():
        here = run(open_session(file, provider="cpu"), feeds)
        there = run(open_session(file, provider=options.provider), feeds)
        errors[name] = max(relative(here[n], there[n]) for n in here)
    good = all(error <= (HALF if "16" in name else CLOSE) for name, error in errors.items())
    return {"passed": good, "errors": errors}


def relative(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest magnitude."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not np.isfinite(b).all() or a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-30))


# -- statistics and gradients ------------------------------------------------------------------------------------------


def statistics(path: Path, folder: Path, options: argparse.Namespace) -> Found:
    """Moments of all layers' inputs and profiles of their channels, on both providers."""
    graph = spa.load(path)
    analysis = spa.analyze(path)
    data = load_calibration("noise", graph.model, samples=options.samples)
    taken = {}
    for provider in ("cpu", options.provider):
        measured = Measured(analysis, analysis.groups, data, Setup(batch=16, provider=provider))
        taken[provider] = measured
        taps = [tap for group in analysis.groups for tap in measured.taps(group)]
        measured.measure(tap.site for tap in taps if tap.site is not None)
    here, there = taken["cpu"], taken[options.provider]
    worst = {"mean": 0.0, "covariance": 0.0, "profile": 0.0}
    sites = {tap.site.name: tap.site for group in analysis.groups for tap in here.readers(group) if tap.site}
    for site in sites.values():
        a, b = here.joint(site), there.joint(site)
        scale = float(np.sqrt(np.abs(np.diagonal(a.xx, axis1=1, axis2=2)).max(initial=0.0) / a.rows)) or 1.0
        shift = float(np.abs(a.mean_x - b.mean_x).max(initial=0.0))
        worst["mean"] = max(worst["mean"], shift / max(scale, float(np.abs(a.mean_x).max(initial=0.0))))
        worst["covariance"] = max(worst["covariance"], relative(a.xx, b.xx))
    for group in analysis.groups:
        for mine, theirs in zip(here.taps(group), there.taps(group), strict=True):
            one, other = here.profile(mine), there.profile(theirs)
            worst["profile"] = max(worst["profile"], relative(one.variance, other.variance))
    return {"passed": max(worst.values()) <= CLOSE and bool(sites), "layers": len(sites), "errors": worst}


def gradients(path: Path, folder: Path, options: argparse.Namespace) -> Found:
    """Fisher information of every unit's gate on both devices, and one epoch of fine-tuning."""
    try:
        import torch
    except ImportError:
        return {"passed": True, "skipped": "torch is not installed"}
    if options.provider == "cuda" and not torch.cuda.is_available():
        return {"passed": True, "skipped": f"torch {torch.__version__} is a build without CUDA"}
    graph, analysis = spa.load(path), spa.analyze(path)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    data = load_calibration("noise", graph.model, samples=min(options.samples, 16))
    found = {
        provider: Gradients(analysis, analysis.groups, data, "sampled", Setup(batch=8, provider=provider)).gates
        for provider in ("cpu", options.provider)
    }
    errors = [relative(found["cpu"][name], found[options.provider][name]) for name in found["cpu"]]
    tuned = folder / "tuned.onnx"
    feeds = feeds_of(path, 32)
    np.savez(folder / "train.npz", **feeds)
    start = time.perf_counter()
    pruned = variants(path, folder, options)["pruned"]
    spa.finetune(
        pruned, data=str(folder / "train.npz"), teacher=path, loss="kd", epochs=1, batch=8, held_out=0,
        provider=options.provider, output=tuned,
    )  # fmt: skip
    took = time.perf_counter() - start
    return {"passed": max(errors) <= CLOSE, "errors": {"fisher": max(errors)}, "finetune_s": round(took, 1)}


# -- latency table and target: the only place that calls `spa profile` -------------------------------------------------


def profile(path: Path, folder: Path, options: argparse.Namespace) -> Found:
    """The latency table of this device."""
    return command(
        "profile", path, "-o", folder / "table.json", "--provider", options.provider, "--batch", 1,
        "--models", options.profile_models,
    )  # fmt: skip


def target(path: Path, folder: Path, options: argparse.Namespace) -> Found:
    """Pruning to 60 % of the latency, by that table, in a closed loop."""
    known = ["--latency-table", folder / "table.json"] if (folder / "table.json").is_file() else []
    out = folder / "target.onnx"
    found = command(
        "prune", path, "-o", out, "--target", "latency=0.6", "--provider", options.provider, "--no-verify", *known
    )
    body = found.get("latency") or {}
    kept = {k: body.get(k) for k in ("before_ms", "after_ms", "asked", "predicted", "provider", "device")}
    kept |= {"error": found["error"]} if isinstance(found.get("error"), str) else {}
    share = body["after_ms"] / body["before_ms"] if body else float("nan")
    return {"passed": bool(body) and abs(share / 0.6 - 1) <= 0.03, "share": share, **kept}


def command(*arguments: object) -> Found:
    """The JSON object of one command line."""
    call = [sys.executable, "-m", "spa", *map(str, arguments), "--json"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    body: Found = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr.strip()}
    if "error" in body:
        body["error"] = body["error"]["message"] if isinstance(body["error"], dict) else body["error"]
    return {"passed": done.returncode == 0, **body}


PARTS: dict[str, Callable[[Path, Path, argparse.Namespace], Found]] = {
    "latency": latency,
    "outputs": outputs,
    "statistics": statistics,
    "gradients": gradients,
    "table": profile,
    "target": target,
}


# -- the page ----------------------------------------------------------------------------------------------------------


def markdown(body: Found, arguments: Sequence[str]) -> str:
    """Everything as Markdown."""
    facts = body["device"]
    lines = [
        "# CUDA",
        "",
        f"Measured {facts['date']} with `python benchmarks/cuda.py {' '.join(map(str, arguments))}`".rstrip(" `")
        + "`.",
        "",
        ", ".join(f"{key} {value}" for key, value in facts.items() if key != "date"),
        "",
    ]
    for name, found in body["models"].items():
        lines += [f"## {name}", ""]
        if "rows" in found.get("latency", {}):
            rows = found["latency"]["rows"]
            cells = [
                [
                    r["version"], str(r["batch"]), f"{r['p50_ms']:.3f}", f"{r['p90_ms']:.3f}", f"{r['p99_ms']:.3f}",
                    f"{r['samples_per_s']:,.0f}", f"{r['speedup']:.2f}",
                ]
                for r in rows
            ]  # fmt: skip
            heads = ("version", "batch", "p50 ms", "p90 ms", "p99 ms", "samples/s", "times as fast")
            ran = ", ".join(found["latency"]["provider"])
            lines += [f"Provider that ran: {ran}; {found['latency']['rounds']} rounds.", "", table(heads, cells), ""]
        lines += [f"* {part}: {summary(one)}" for part, one in found.items()] + [""]
    return "\n".join(lines).rstrip() + "\n"


def summary(found: Found) -> str:
    """One part in a line."""
    if "skipped" in found:
        return f"skipped, {found['skipped']}"
    words = [f"{k} {v:.1e}" for k, v in found.get("errors", {}).items()]
    keys = ("layers", "finetune_s", "latency_ms", "operators", "error", "worst", "share", "before_ms", "after_ms")
    words += [
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
        for k in keys
        if not isinstance(v := found.get(k), str | None)
    ]
    words += [str(found["error"])] if isinstance(found.get("error"), str) else []
    return ", ".join(["passed" if found["passed"] else "FAILED", *words])


if __name__ == "__main__":
    sys.exit(main())
