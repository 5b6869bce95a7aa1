"""A real server process on a free port."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """Started on entry; on exit told to stop, and expected to do so without complaint."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._command = [sys.executable, "-m", "spa_server.serving", str(folder), "--port", "0", *options]
        self.address = ""
        self.errors = ""

    def __enter__(self) -> ServerProcess:
        paths = [str(ROOT / "server"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("serving on "):
            raise AssertionError(self.process.communicate()[1])
        self.address = line.split()[-1]
        return self

    def stop(self) -> int:
        """Ask it to stop, as a service manager would; returns its exit status."""
        self.process.terminate()
        try:
            _, self.errors = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            status = self.stop()
            assert kind is not None or status == 0, self.errors
        assert kind is not None or "Traceback" not in self.errors, self.errors
