"""An S3 server of its own for tests, on a free port of the loopback interface."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.server.running import ROOT, free_port

FOLDER = ROOT / ".venv" / "s3"
"""Where `make test-s3` puts moto and s3fs."""


class ObjectStore:
    """moto's server; it keeps everything in memory, and knows no wrong credentials."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(ROOT / "server"), *filter(None, [os.environ.get("PYTHONPATH")])]
        if importlib.util.find_spec("s3fs") is None or importlib.util.find_spec("moto") is None:
            if not FOLDER.is_dir():
                pytest.skip("no s3fs and moto: `make test-s3` puts them into .venv/s3, and runs these tests")
            sys.path.append(str(FOLDER))
            paths.append(str(FOLDER))
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        self.environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nowhere",
            "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        """Of servers that use it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **self.environment},
        )  # fmt: skip
        for _ in range(600):
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert self._process.poll() is None, "moto did not start"
            time.sleep(0.1)

    def client(self) -> Any:
        """boto3's, which is another one than the server's."""
        import boto3

        names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        keys = {name: self.environment[variable] for name, variable in names.items()}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def bucket(self) -> str:
        """A new, empty bucket."""
        name = f"spa-{secrets.token_hex(4)}"
        self.client().create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> set[str]:
        """Of all that is in a bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {entry["Key"] for page in pages for entry in page.get("Contents", ())}

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
