"""A real server in a process of its own, for tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from spa_server.client import Client
from spa_server.database import connect, tokens

ROOT = Path(__file__).parents[2]


class Running:
    """A server on a free port of the loopback interface."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        """
        Args:
            folder: for its files.
            settings: as in server.yaml.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.data = folder, folder / "data"
        self.config = folder / "server.yaml"
        workers = {"memory": "2GB", "threads": 1, "lease": "2s", **settings.pop("workers", {})}
        body = {"listen": "127.0.0.1:0", "data": "data", "drain": "20s", "workers": workers, **settings}
        self.config.write_text(yaml.safe_dump(body), encoding="utf-8")
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self, *, port: int = 0, environment: Mapping[str, str] | None = None) -> Running:
        command = [sys.executable, "-m", "spa", "serve", "--config", str(self.config)]
        if port:
            command += ["--listen", f"127.0.0.1:{port}"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "server")])
        env = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        with open(self.log, "ab") as log:
            log.write(b"--- start\n")
            log.flush()
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.folder)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            text = self.text().rpartition("--- start")[2]
            if found := re.search(r"^listening on (\S+)$", text, re.MULTILINE):
                self.address = found[1]
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.text()}")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """As a power cut would, but for what the disk has."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def client(self, token: str | None = None, **options: Any) -> Client:
        return Client(self.address, token=token, **options)

    def token(self, owner: str, *scopes: str, lifetime: float | None = None) -> str:
        database = connect(f"sqlite:///{self.data / 'spa.db'}")
        try:
            return tokens.create(database, owner, scopes or tokens.SCOPES, lifetime=lifetime)[1]
        finally:
            database.close()


def free_port() -> int:
    """One of the loopback interface that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def workers_of(server: Running) -> list[int]:
    """Process ids of a server's workers."""
    assert server.process is not None
    pid = server.process.pid
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    return found
