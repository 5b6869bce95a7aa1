"""Messages and models that make no sense.

    python benchmarks/server_fuzz.py [--messages 10000] [--models 10000] [--seed 0] [--json FILE]

Messages go to a server of its own: no crash, no hang, no growth, proper statuses only. Models go through the job layer,
in processes with the limits of workers: each must end with an error that is explained, or be read; crashes of the
process are counted, since a worker is there for that, and so are the largest resident memory and the slowest model.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import ROOT, write

sys.path.insert(0, str(ROOT / "server"))

import grpc
import numpy as np

from tests.server.mutations import attack, mutated
from tests.server.running import Running
from tests.server.test_fuzz import PROPER

MEMORY = 2 * 10**9
"""Bytes that workers may take."""


def resident(pid: int) -> float:
    """MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def damaged(start: int, count: int, seed: int) -> None:
    """Inspect mutated models number `start` to `count`, and print how each ended. Runs in a process of its own."""
    from spa.errors import SpaError
    from spa.jobs import InspectSpec, Store, run
    from spa_server.worker import limit
    from tests.small_models import attention, cnn

    limit({"cpu_seconds": 0, "file_bytes": 20 * 10**9, "data_bytes": 2 * MEMORY + (1 << 30)})
    nets = [net.SerializeToString() for net in (cnn(), attention())]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(start, count):
            path = folder / "net.onnx"
            path.write_bytes(mutated(nets[number % 2], np.random.default_rng([seed, number])))
            store = Store({"models/1": path}, folder, folder)
            begun = time.monotonic()
            try:
                run(InspectSpec("models/1"), store, lambda event: None, lambda: False)
                ended = "read"
            except SpaError as error:
                ended = error.code
            except Exception as error:  # what the benchmark looks for
                ended = f"UNFORESEEN {type(error).__name__} {str(error)[:100]}"
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(number, f"{time.monotonic() - begun:.3f}", most, ended, flush=True)


def models(count: int, seed: int) -> tuple[Counter[str], float, float]:
    """How mutated models ended, the seconds of the slowest, and the MB of the largest process."""
    codes: Counter[str] = Counter()
    slowest = largest = 0.0
    start = 0
    while start < count:
        command = [sys.executable, __file__, "--damaged", f"{start},{count},{seed}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.partition(" ")[0].isdecimal()]
        for line in lines:
            _, seconds, most, ended = line.split(" ", 3)
            codes[ended] += 1
            slowest, largest = max(slowest, float(seconds)), max(largest, int(most) * 1024 / 1e6)
        start = int(lines[-1].split()[0]) + 1 if lines else start
        if done.returncode:
            codes[f"crash {done.returncode}"] += 1
            start += 1
    return codes, slowest, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--damaged", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.damaged:
        damaged(*map(int, arguments.damaged.split(",")))
        return
    ended, longest, most = models(arguments.models, arguments.seed)
    print("models:", dict(ended), f"slowest {longest:.2f} s, largest process {most:.0f} MB", flush=True)
    codes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        server = Running(Path(name)).start()
        assert server.process is not None
        start, memory, slowest = time.monotonic(), [resident(server.process.pid)], 0.0
        with grpc.insecure_channel(server.address) as channel:
            for number, outcome in enumerate(attack(channel, arguments.messages, arguments.seed), 1):
                codes[outcome.code.name] += 1
                slowest, start = max(slowest, time.monotonic() - start), time.monotonic()
                if number % 1000 == 0:
                    memory.append(resident(server.process.pid))
        with server.client() as client:
            client.account()
        unforeseen = server.text().count("nobody foresaw")
        status = server.stop()
    bad = set(codes) - {code.name for code in PROPER}
    print(dict(codes), f"slowest {slowest:.2f} s", "memory MB:", [round(m) for m in memory], sep="\n")
    print("improper:", bad or "none", "| unforeseen errors:", unforeseen, "| exit status:", status)
    write(
        arguments.json,
        {
            "codes": codes,
            "slowest": slowest,
            "memory": memory,
            "unforeseen": unforeseen,
            "models": ended,
            "slowest_model": longest,
            "largest_process": most,
        },
    )
    wrong = [code for code in ended if code.startswith("UNFORESEEN")]
    raise SystemExit(bool(bad or unforeseen or status or wrong))


if __name__ == "__main__":
    main()
