"""A Ray cluster of one node on this machine, for tests and benchmarks/server_cluster.py."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.running import ROOT

FOLDER = ROOT / ".venv" / "ray"
"""Where `make test-ray` puts Ray."""
_HEAD = """
import sys, ray
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False,
         logging_level="error", object_store_memory=100 << 20, _node_ip_address="127.0.0.1")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


class RayCluster:
    """Started by itself on free ports; ends with this process. Takes some twenty seconds."""

    def __init__(self, cpus: int = 2) -> None:
        paths = [str(ROOT), str(ROOT / "server"), *filter(None, [os.environ.get("PYTHONPATH")])]
        if importlib.util.find_spec("ray") is None:
            if not FOLDER.is_dir():
                pytest.skip("no Ray: `make test-ray` puts it into .venv/ray, and runs these tests")
            paths.append(str(FOLDER))
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._folder = tempfile.mkdtemp(prefix="spa-ray-")  # short: Ray's sockets are in it
        here = {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": self._folder}
        self.environment = {**here, "RAY_USAGE_STATS_ENABLED": "0", **auth}
        """Of servers that use it; with `executor: ray`."""
        self._head = subprocess.Popen(
            [sys.executable, "-c", _HEAD, str(cpus)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **self.environment}, text=True,
        )  # fmt: skip
        assert self._head.stdout is not None
        address = self._head.stdout.readline().strip()
        assert address, "Ray did not start"
        self.environment["RAY_ADDRESS"] = address

    def stop(self) -> None:
        """End it as somebody would who stops Ray."""
        assert self._head.stdin is not None
        assert self._head.stdout is not None
        self._head.stdin.close()
        self._head.wait(60)
        self._head.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def supervisors(self) -> list[int]:
        """Process ids of the processes of Ray around workers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.read_bytes().startswith(b"ray::Node"):
                    fields = (path.parent / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
                    above = Path("/proc", fields[1], "cmdline").read_bytes()
                    if self._folder.encode() in above:  # the raylet, whose sockets are in there
                        found.append(int(path.parent.name))
            except OSError:  # gone meanwhile
                continue
        return found

    @contextmanager
    def client_server(self, port: int) -> Iterator[str]:
        """Ray's server for clients that are not in the cluster; its address, as `ray://HOST:PORT`."""
        address = ["--address", self.environment["RAY_ADDRESS"], "--host", "127.0.0.1", "--port", str(port)]
        command = [sys.executable, "-m", "ray.util.client.server", *address, "--mode", "legacy"]
        with subprocess.Popen(command, env={**os.environ, **self.environment}) as process:
            try:
                for _ in range(600):
                    with socket.socket() as asked:
                        if asked.connect_ex(("127.0.0.1", port)) == 0:
                            break
                    assert process.poll() is None, "Ray's client server did not start"
                    time.sleep(0.1)
                yield f"ray://127.0.0.1:{port}"
            finally:
                process.kill()
