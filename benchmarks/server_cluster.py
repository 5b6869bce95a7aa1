"""Two servers, one PostgreSQL, one Ray cluster: jobs are spread, and one server is killed in the middle.

    python benchmarks/server_cluster.py [--jobs 100] [--cpus 2] [--json FILE]

Needs Ray (`make test-ray` puts it into .venv/ray) and PostgreSQL's binaries. All jobs must end exactly once, and well,
with the bytes of a local run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import ROOT, write

sys.path.insert(0, str(ROOT / "server"))

import onnx

import spa
from spa.jobs import PruneSpec
from spa_server._generated import jobs_pb2
from spa_server.blobs import digest_of
from spa_server.client import Client
from tests.server.postgres import Postgres
from tests.server.ray_cluster import RayCluster
from tests.server.running import Running
from tests.small_models import cnn

TARGETS = ("macs=0.9", "macs=0.8", "macs=0.7", "macs=0.6")


def ended(client: Client) -> int:
    return sum(job.state > jobs_pb2.JOB_STATE_RUNNING for job in client.jobs())


def problems_of(client: Client, jobs: dict[str, str], wanted: dict[str, str]) -> tuple[list[str], Counter[str]]:
    """What is wrong, and how jobs fared."""
    problems: list[str] = []
    fared: Counter[str] = Counter()
    for name, target in jobs.items():
        try:
            job = client.wait(name)
        except spa.SpaError as error:
            problems.append(f"{name}: {error}")
            continue
        if next(file.sha256 for file in job.files if file.path == "model.onnx") != wanted[target]:
            problems.append(f"{name}: another result than here")
        states = [e.state.state for e in client.watch(name) if e.WhichOneof("event") == "state"]
        if sum(state > jobs_pb2.JOB_STATE_RUNNING for state in states) != 1:
            problems.append(f"{name}: ended more than once")
        fared[f"attempt {job.attempt}"] += 1
    return problems, fared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, wanted = folder / "net.onnx", {}
        onnx.save(cnn(), model)
        for target in TARGETS:
            spa.prune(model, target=target, output=folder / "local.onnx")
            wanted[target] = digest_of(folder / "local.onnx")
        database, cluster = Postgres().start(), RayCluster(arguments.cpus)
        common = {"database": database.url, "blobs": str(folder / "blobs"), "executor": "ray", "quotas": {"open": 0}}
        workers = {"count": arguments.cpus, "memory": "1GB"}
        servers = [
            Running(folder / which, workers=workers, **common).start(environment=cluster.environment)
            for which in ("a", "b")
        ]
        start = time.monotonic()
        with servers[0].client() as one, servers[1].client() as two:
            sent = [(client, client.push_model(model).name) for client in (one, two)]
            jobs = {}
            for number in range(arguments.jobs):
                client, model_name = sent[number % 2]
                target = TARGETS[number % len(TARGETS)]
                jobs[client.submit(PruneSpec(model_name, (target,))).name] = target
            while ended(two) < arguments.jobs // 3:
                time.sleep(0.5)
            before = ended(two)
            servers[0].kill()
            print(f"killed one server when {before} of {len(jobs)} jobs had ended", flush=True)
            problems, fared = problems_of(two, jobs, wanted)
            if {job.name for job in two.jobs()} != set(jobs):
                problems.append("jobs were lost, or became more")
        seconds = time.monotonic() - start
        here = [server.text().count('"message": "begun: jobs/') for server in servers]
        servers[1].stop()
        cluster.stop()
        database.remove()
    print(f"{len(jobs)} jobs in {seconds:.0f} s; begun by the servers: {here}; {dict(fared)}")
    print("\n".join(problems) or "every job ended once, with the bytes of a local run")
    write(arguments.json, {"jobs": len(jobs), "seconds": seconds, "begun": here, "fared": fared, "problems": problems})
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
