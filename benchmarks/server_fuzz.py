"""Messages and models that make no sense.

    python benchmarks/server_fuzz.py [--messages 10000] [--models 2000] [--seed 0] [--json FILE]

Messages go to a server of its own: no crash, no hang, no growth, proper statuses only. Models go through the job layer,
in a process as workers are: each must end with an error that is explained, or be read; crashes of the process are
counted, since a worker is there for that.
"""

from __future__ import annotations

import argparse
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


def resident(pid: int) -> float:
    """MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def damaged(start: int, count: int, seed: int) -> None:
    """Inspect mutated models number `start` to `count`, and print how each ended. Runs in a process of its own."""
    from spa.errors import SpaError
    from spa.jobs import InspectSpec, Store, run
    from tests.small_models import attention, cnn

    nets = [net.SerializeToString() for net in (cnn(), attention())]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(start, count):
            path = folder / "net.onnx"
            path.write_bytes(mutated(nets[number % 2], np.random.default_rng([seed, number])))
            store = Store({"models/1": path}, folder, folder)
            try:
                run(InspectSpec("models/1"), store, lambda event: None, lambda: False)
                print(number, "read", flush=True)
            except SpaError as error:
                print(number, error.code, flush=True)
            except Exception as error:  # what the benchmark looks for
                print(number, f"UNFORESEEN {type(error).__name__} {str(error)[:100]}", flush=True)


def models(count: int, seed: int) -> Counter[str]:
    """How mutated models ended."""
    codes: Counter[str] = Counter()
    start = 0
    while start < count:
        command = [sys.executable, __file__, "--damaged", f"{start},{count},{seed}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.partition(" ")[0].isdecimal()]
        codes.update(line.partition(" ")[2] for line in lines)
        start = int(lines[-1].split()[0]) + 1 if lines else start
        if done.returncode:
            codes[f"crash {done.returncode}"] += 1
            start += 1
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--damaged", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.damaged:
        damaged(*map(int, arguments.damaged.split(",")))
        return
    ended = models(arguments.models, arguments.seed)
    print("models:", dict(ended), flush=True)
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
        {"codes": codes, "slowest": slowest, "memory": memory, "unforeseen": unforeseen, "models": ended},
    )
    wrong = [code for code in ended if code.startswith("UNFORESEEN")]
    raise SystemExit(bool(bad or unforeseen or status or wrong))


if __name__ == "__main__":
    main()
