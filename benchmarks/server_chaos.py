"""Workers and servers killed at random moments, again and again; nothing that was accepted may be lost.

    python benchmarks/server_chaos.py [--kills 50] [--seed 0] [--json FILE]

All the time a client uploads files, starts prune jobs and waits for them, over kills. Every other kill is of a server,
the others are of a worker. At the end: every job that was accepted has ended well, its results are those of a local
run, every upload that was confirmed is there, and the store holds what the database knows, no more and no less.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from measure import ROOT, write

sys.path.insert(0, str(ROOT / "server"))

import numpy as np
import onnx

import spa
from spa.jobs import PruneSpec
from spa_server.blobs import Blobs, digest_of
from spa_server.client import Client
from spa_server.config import load
from spa_server.database import connect, contents
from spa_server.database.tables import blobs, files
from tests.server.running import Running, workers_of
from tests.small_models import cnn

TARGETS = ("macs=0.9", "macs=0.8", "macs=0.7", "macs=0.6")


class Load:
    """A client that never stops."""

    def __init__(self, server: Running, model: Path, folder: Path) -> None:
        self.server, self.model, self.folder = server, model, folder
        self.jobs: dict[str, str] = {}
        self.uploads: list[str] = []
        self.interrupted = 0
        self.over = threading.Event()

    def run(self) -> None:
        rng = np.random.default_rng(1)
        for number in range(1_000_000):
            if self.over.is_set():
                return
            try:
                with self.server.client() as client:
                    self._turn(client, number, rng)
            except spa.SpaError as error:  # the server was away for longer than the client has patience: not accepted
                if type(error) is not spa.SpaError:
                    raise
                self.interrupted += 1
                time.sleep(0.2)

    def _turn(self, client: Client, number: int, rng: np.random.Generator) -> None:
        path = self.folder / f"upload-{number}.bin"
        path.write_bytes(rng.bytes(3_000_000))
        try:
            self.uploads.append(client.push_dataset(path).files[0].sha256)
        finally:
            path.unlink()
        target = TARGETS[number % len(TARGETS)]
        name = client.push_model(self.model).name
        self.jobs[client.submit(PruneSpec(name, (target,)), request_id=f"turn-{number}").name] = target
        while sum(job.state <= 2 for job in client.jobs()) > 3 and not self.over.is_set():  # wait or run
            time.sleep(0.2)


def kill(server: Running, what: str) -> bool:
    """Whether there was something to kill."""
    if what == "server":
        port = server.port
        server.kill()
        server.start(port=port)
        return True
    found = workers_of(server)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return bool(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "net.onnx"
        onnx.save(cnn(), model)
        wanted = {}
        for target in TARGETS:
            spa.prune(model, target=target, output=folder / "local.onnx")
            wanted[target] = digest_of(folder / "local.onnx")
        server = Running(folder / "server", workers={"attempts": 1000}, quotas={"open": 0}).start()
        load_ = Load(server, model, folder)
        thread = threading.Thread(target=load_.run)
        thread.start()
        done = {"server": 0, "worker": 0}
        while sum(done.values()) < arguments.kills:
            time.sleep(float(rng.uniform(0.05, 6.0)))
            what = "server" if done["server"] <= done["worker"] else "worker"
            if kill(server, what):
                done[what] += 1
                print(f"killed: {done}, jobs accepted: {len(load_.jobs)}", flush=True)
        load_.over.set()
        thread.join()
        problems, again = settled(server, load_, wanted)
        server.stop()
        problems += consistent(server, load_.uploads)
    print(
        f"kills: {done}; jobs accepted: {len(load_.jobs)}, begun more than once: {again}; uploads: {len(load_.uploads)}"
    )
    print("\n".join(problems) or "no job lost, no wrong result, no orphan, no lost upload")
    write(arguments.json, {"kills": done, "jobs": len(load_.jobs), "again": again, "problems": problems})
    raise SystemExit(bool(problems))


def settled(server: Running, load_: Load, wanted: dict[str, str]) -> tuple[list[str], int]:
    """What is wrong with jobs, and how many were begun more than once."""
    problems, again = [], 0
    with server.client() as client:
        for name, target in load_.jobs.items():
            try:
                job = client.wait(name)
            except spa.SpaError as error:
                problems.append(f"{name}: {error}")
                continue
            again += job.attempt > 1
            if next(file.sha256 for file in job.files if file.path == "model.onnx") != wanted[target]:
                problems.append(f"{name}: another result than here")
            ends = [e for e in client.watch(name) if e.WhichOneof("event") == "state" and e.state.state > 2]
            if len(ends) != 1:
                problems.append(f"{name}: ended {len(ends)} times")
        known = {job.name for job in client.jobs()}
        if not set(load_.jobs) <= known:
            problems.append(f"jobs are lost: {set(load_.jobs) - known}")
        if len({job.request_id for job in client.jobs()}) != len(known):
            problems.append("a request made two jobs")
    return problems, again


def consistent(server: Running, uploads: list[str]) -> list[str]:
    """What is wrong with the store, after what nobody has was swept."""
    problems = []
    database, store = connect(load(server.config).database_url), Blobs(str(server.data / "blobs"))
    contents.sweep(database, store.remove, 0, -1)
    with database.read() as connection:
        rows = {row.sha256: row.size for row in connection.execute(blobs.select())}
        used = {row.sha256 for row in connection.execute(files.select())}
    database.close()
    there = set(store.every())
    if not set(uploads) <= there:
        problems.append(f"{len(set(uploads) - there)} uploads are lost")
    if there != set(rows) or not used <= set(rows):
        problems.append(f"the store has {len(there)} contents, the database {len(rows)}")
    for sha256 in there:
        with store.open(sha256) as file:
            import hashlib

            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                problems.append(f"{sha256}: other bytes")
    if list((server.data / "jobs").iterdir()):
        problems.append("folders of jobs are left")
    return problems


if __name__ == "__main__":
    main()
