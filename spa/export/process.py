"""The side of an export that asks: a process of the framework's own Python, and the conversation with it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from spa.errors import RuntimeFailure, UsageError, kinds
from spa.export.request import Request

Array = npt.NDArray[Any]

_PACKAGE = Path(__file__).parents[1]
# This package by its place: nothing else of this installation becomes visible to the other Python.
_START = """
import importlib.util, sys
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0])
spec = importlib.util.spec_from_file_location("spa", sys.argv[1], submodule_search_locations=[sys.argv[2]])
module = importlib.util.module_from_spec(spec)
sys.modules["spa"] = module
spec.loader.exec_module(module)
from spa.export.worker import main
main()
"""
_ENVIRONMENT = {
    # the check runs where every machine can repeat it
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}


@dataclass(frozen=True)
class Written:
    """What an exporter wrote."""

    exporter: str
    """Its name, with versions."""
    examples: dict[str, Array]
    """The source's own inputs."""
    axes: dict[str, dict[int, str]]
    """By input: axes that are meant to be open, and their names."""
    outputs: tuple[str, ...]
    """Names of the outputs; empty: as they are in the file."""


class Worker:
    """A process that has the framework; leave the `with` block to end it."""

    def __init__(self, request: Request, label: str, python: str | os.PathLike[str] | None = None) -> None:
        self._request = request
        self._label = label
        self._python = os.fspath(python or sys.executable)
        self._folder = tempfile.TemporaryDirectory(prefix="spa-export-")
        self._said = open(Path(self._folder.name) / "stderr", "w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed in __exit__
        self._runs = 0
        command = [self._python, "-c", _START, str(_PACKAGE / "__init__.py"), str(_PACKAGE)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                encoding="utf-8",
                env={**os.environ, **_ENVIRONMENT},
            )
        except OSError as error:
            self._close()
            raise UsageError(f"--python {self._python}: cannot be started ({error.strerror}); name a Python") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._pipes()[0].close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._pipes()[1].close()
        self._close()

    def _close(self) -> None:
        self._said.close()
        self._folder.cleanup()

    def _pipes(self) -> tuple[Any, Any]:
        return self._process.stdin, self._process.stdout

    def printed(self) -> str:
        """What the framework has printed so far."""
        self._said.flush()
        return (Path(self._folder.name) / "stderr").read_text(encoding="utf-8", errors="replace")

    def export(self, path: Path) -> Written:
        """Write the ONNX file.

        Raises:
            UsageError, UnsupportedModelError, RuntimeFailure: as the driver says.
        """
        examples = Path(self._folder.name) / "examples.npz"
        body = self._ask(
            {"do": "export", "request": self._request.to_json(), "path": str(path), "examples": str(examples)}
        )
        axes = {name: {int(k): str(symbol) for k, symbol in found.items()} for name, found in body["axes"].items()}
        given = dict(zip(body["examples"], _arrays(examples), strict=True))
        return Written(body["exporter"], given, axes, tuple(body["outputs"]))

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The source's own outputs.

        Raises:
            RuntimeFailure: it does not run on these inputs.
        """
        self._runs += 1
        folder = Path(self._folder.name)
        given, outputs = folder / f"feeds-{self._runs}.npz", folder / f"outputs-{self._runs}.npz"
        named: dict[str, Any] = {str(k): array for k, array in enumerate(feeds.values())}
        np.savez(given, allow_pickle=False, names=np.array(json.dumps(list(feeds))), **named)
        self._ask({"do": "run", "feeds": str(given), "outputs": str(outputs)})
        found = list(_arrays(outputs))
        given.unlink()
        outputs.unlink()
        return found

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._pipes()
        line = ""
        with contextlib.suppress(OSError):  # it has ended; why is said below
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            raise self._ended()
        body: dict[str, Any] = json.loads(line)
        if "error" in body:
            kind = {k.code: k for k in kinds()}.get(body["error"]["code"], RuntimeFailure)
            raise kind(f"{self._label}: {body['error']['message']}")
        return body

    def _ended(self) -> RuntimeFailure:
        status = self._process.wait()
        lines = [line.strip() for line in self.printed().splitlines() if line.strip()]
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        said = f": {lines[-1][:300].rstrip('.')}" if lines else ""
        return RuntimeFailure(
            f"{self._label}: {self._python} ended while the model was exported ({how}{said}); "
            "--verbose shows what it printed"
        )


def _arrays(path: Path) -> Iterator[Array]:
    with np.load(path, allow_pickle=False) as stored:
        yield from [stored[str(k)] for k in range(len(stored.files))]
