"""A PostgreSQL of its own for tests, from the binaries of the system."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.server.running import free_port


def binaries() -> Path | None:
    """Folder of `initdb` and `pg_ctl`; Debian has them outside of PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").is_file() and (place / "pg_ctl").is_file()), None)


class Postgres:
    """Started on a free port of the loopback interface; PostgreSQL refuses to be run by root."""

    def __init__(self) -> None:
        place = binaries()
        if place is None:
            pytest.skip("no PostgreSQL on this machine (Debian: apt-get install postgresql)")
        pytest.importorskip("psycopg", reason="needs the extra `postgres`")
        self._bin, self._user = place, None
        if os.getuid() == 0:
            try:
                self._user = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL refuses to be run by root, and there is no user `postgres`")
        self.folder = Path(tempfile.mkdtemp(prefix="spa-postgres-"))  # pytest's own folders are closed to others
        if self._user is not None:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "-D", str(self.folder / "data"), "-A", "trust", "-U", "spa")
        self.port = free_port()
        self.url = f"postgresql+psycopg://spa@127.0.0.1:{self.port}/postgres"

    def start(self) -> Postgres:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", log, "-w", "start")
        return self

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def _run(self, name: str, *arguments: str) -> None:
        command = [str(self._bin / name), *arguments]
        if self._user is not None:
            # not by arguments of `subprocess.run`: with these it forks, which gRPC's threads do not survive
            # (https://github.com/grpc/grpc/issues/43055)
            ids = [f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups"]
            command = ["setpriv", *ids, "--", *command]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", text=True, check=False
        )
        assert done.returncode == 0, done.stdout
