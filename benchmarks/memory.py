"""Peak memory of pruning, in a fresh process each: all resident pages, and those that no file backs.

    python benchmarks/memory.py [--only NAME] [--json FILE]

For each model: `spa.prune(target="params=0.7", check=False)`, the same with verification, and, as the floor, the
imports alone. "Peak" is VmHWM (every resident page, mapped files included, which the kernel may drop at any time);
"own" is the largest RssAnon seen, sampled every 5 ms: memory that must be there. Both are also given as multiples
of the model's size (with external data) after subtracting the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from analysis import made
from measure import brief, seconds, table, write
from paths import data_of, path_of, size_of

MODELS = ("resnet50", "decoder-1gb-single", "decoder-1gb", "decoder-3gb")
GOAL = 1.3


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


class Sampler(threading.Thread):
    """Largest RssAnon and RssFile."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.mapped = 0
        self.running = True

    def run(self) -> None:
        while self.running:
            self.sample()
            time.sleep(0.005)

    def sample(self) -> None:
        self.own = max(self.own, status("RssAnon"))
        self.mapped = max(self.mapped, status("RssFile"))


def child(mode: str, path: str, target: str) -> dict[str, Any]:
    """What one process does; `mode` is imports, prune or verify."""
    import spa.pipeline as pipeline

    if mode == "verify":  # its libraries belong to the floor of that mode
        import onnxruntime  # noqa: F401  # for what it loads
    floor = {"peak": status("VmHWM"), "own": status("RssAnon")}
    sampler = Sampler()
    sampler.start()
    reply: dict[str, Any] = {}
    cpu, wall = time.process_time(), time.perf_counter()
    if mode != "imports":
        with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".memory-") as folder:
            options: dict[str, Any] = {"dims": {"batch": 1, "length": 16}} if "decoder" in path else {}
            try:
                result = pipeline.prune(
                    path, target=target, output=Path(folder) / "out.onnx", check=mode == "verify", **options
                )
                reply["bytes_after"] = sum(f.stat().st_size for f in Path(folder).iterdir())
                reply["parameters"] = [result.report.parameters.before, result.report.parameters.after]
                reply["seconds"] = dict(result.report.seconds)
                reply["error"] = result.report.verify.max_rel_error if result.report.verify else None
            except Exception as error:  # the parent reports it beside what was measured
                reply["failed"] = brief(error)
    reply["cpu"], reply["wall"] = time.process_time() - cpu, time.perf_counter() - wall
    sampler.running = False
    sampler.join()
    sampler.sample()
    return {**reply, "floor": floor, "peak": status("VmHWM"), "own": sampler.own, "mapped": sampler.mapped}


def measure(mode: str, path: Path, target: str) -> dict[str, Any]:
    """Run `child` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", mode, str(path), target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        answer = {"failed": f"the process died (exit code {done.returncode}): {done.stderr[-200:]}"}
    return answer


def main() -> int:
    if len(sys.argv) > 4 and sys.argv[1] == "--child":
        print("\n" + json.dumps(child(*sys.argv[2:5])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--target", default="params=0.7")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, results = [], []
    for name in made(list(options.only or MODELS), os.environ.get("SPA_PEERS_PYTHON")):
        path = path_of(name)
        external, size = bool(data_of(path)), size_of(path)
        for mode in ("prune",) if options.no_verify else ("prune", "verify"):
            found = measure(mode, path, options.target)
            results.append({"name": name, "mode": mode, "bytes": size, "external": external, **found})
            kind = "external" if external else "single file"
            if "peak" not in found:
                rows.append([name, kind, f"{size / 1e6:,.0f}", mode, *["-"] * 6, found["failed"]])
                continue
            over = (found["peak"] - found["floor"]["peak"]) / size
            own = (found["own"] - found["floor"]["own"]) / size
            verdict = found.get("failed", "")
            if mode == "prune" and not verdict:
                verdict = "met" if found["peak"] / size <= GOAL else "met above floor" if over <= GOAL else "MISSED"
            rows.append(
                [
                    name, kind, f"{size / 1e6:,.0f}", mode,
                    f"{found['peak'] / 1e6:,.0f}", f"{found['peak'] / size:.2f}x",
                    f"{over:.2f}x", f"{found['own'] / 1e6:,.0f}", f"{own:.2f}x",
                    f"{seconds(found['cpu'])} / {seconds(found['wall'])}", verdict,
                ]
            )  # fmt: skip
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    headings = (
        "model", "kind", "MB", "mode", "peak MB", "peak/file", "above floor", "own MB", "own above floor",
        "CPU / wall s", f"goal {GOAL}x",
    )  # fmt: skip
    print(table(headings, rows))
    if results and "floor" in results[0]:
        floor = results[0]["floor"]
        print(f"\nfloor (imports alone): {floor['peak'] / 1e6:,.0f} MB, own {floor['own'] / 1e6:,.0f} MB")
    write(options.json, {"target": options.target, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
