"""What all stages have in common: how a model is read, written and weighed, and what is told about a stage."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from spa.edge.fidelity import Fidelity
from spa.edge.gates import Check
from spa.errors import GateError, OutputError, UnsupportedModelError
from spa.graph import load
from spa.store import SINGLE_FILE_LIMIT, publish, save, to_proto

__all__ = ["Step", "bytes_of", "files_of", "quiet", "read", "require", "staging", "write"]


@dataclass(frozen=True)
class Step:
    """One stage: what it made, how far that is from its input, and whether that is good enough."""

    stage: str
    """Its name: the kind of stage, numbered where a recipe has several."""
    output: Path | None
    """The file; None for stages that make none."""
    bytes_before: int
    """Of the input, with external data."""
    bytes_after: int
    seconds: float
    fidelity: Fidelity | None = None
    """Against the input of the stage (of `verify`: against the model that it names)."""
    checks: tuple[Check, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What only this kind of stage has to tell; plain values."""

    @property
    def passed(self) -> bool:
        """Whether every gate was reached."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        body = asdict(self)
        body["output"] = None if self.output is None else str(self.output)
        body["seconds"] = round(self.seconds, 4)
        return {**body, "passed": self.passed}


def require(step: Step) -> None:
    """Raise if a gate was missed.

    Raises:
        GateError: names the stage, the gates, and what was found.
    """
    missed = [f"{check.gate} (it is {check.value:.4g})" for check in step.checks if not check.passed]
    if missed:
        raise GateError(f"stage {step.stage} missed {' and '.join(missed)}; nothing was written")


def read(path: Path) -> onnx.ModelProto:
    """The whole model in one message: functions inlined, sorted, types inferred, weights inside.

    Raises:
        ModelError: it cannot be read.
        UnsupportedModelError: above what fits in one message.
    """
    graph = load(path)
    if graph.file_bytes > SINGLE_FILE_LIMIT:
        raise UnsupportedModelError(
            f"{path}: is above {SINGLE_FILE_LIMIT / 1e9:.1f} GB, which ONNX Runtime's converters cannot hold; "
            "prune it further first"
        )
    return to_proto(graph.model)


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Sorted, with freshly inferred shapes; the same model gives the same bytes.

    Raises:
        OutputError: it cannot be written.
    """
    model = ir.from_proto(proto)
    model.graph.sort()
    save(model, path, external=False)


def files_of(path: Path) -> list[Path]:
    """A file of ours and its external data."""
    data = path.with_name(path.name + ".data")
    return [data, path] if data.is_file() else [path]


def bytes_of(path: Path) -> int:
    """Of a model, with its external data.

    Raises:
        ModelError: it cannot be read.
    """
    return path.stat().st_size if path.suffix.lower() == ".ort" else load(path).file_bytes


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, gone afterwards, from which files can be renamed into place.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".spa-", dir=output.parent))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); check folder and permissions") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def release(files: Sequence[Path], folder: Path, output: Path) -> None:
    """Rename finished files into `folder`, all or none.

    Raises:
        OutputError: they cannot be renamed.
    """
    try:
        publish({folder / file.name: file for file in files})
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); check the folder's free space") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around converters of other packages, which print, and log by the root logger as if they owned it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(level)
