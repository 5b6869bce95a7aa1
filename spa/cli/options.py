"""Options that several commands have, how their text is read, and which files may be written."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from spa.errors import OutputError, SpaError, UsageError

Model: TypeAlias = Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)]
Output: TypeAlias = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="OUT", help="File to write; never MODEL itself.", show_default=False),
]
Dims: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=N", help="Size of a symbolic axis of the inputs; repeatable."),
]
Inputs: TypeAlias = Annotated[
    Path | None,
    typer.Option("--inputs", metavar="FILE.npz", help="One array per graph input, instead of made-up inputs."),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.", min=0)]
NoVerify: TypeAlias = Annotated[
    bool, typer.Option("--no-verify", help="Write without comparing the result with its reference.")
]
Report: TypeAlias = Annotated[
    Path | None,
    typer.Option("--report", metavar="PAGE.html", help="Write a page about the result, for a browser, there."),
]
NoLatency: TypeAlias = Annotated[
    bool, typer.Option("--no-latency", help="Do not measure latency for --report (some seconds).")
]
Samples: TypeAlias = Annotated[
    int | None, typer.Option("--samples", metavar="N", help="Use only so many samples.", min=1, show_default="all")
]
Batch: TypeAlias = Annotated[int, typer.Option("--batch", metavar="N", help="Samples per run.", min=1)]
Preprocess: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        help="How images become inputs: imagenet, cifar10, tf, caffe, unit, a JSON file, or size=...,mean=...",
    ),
]
Tokenizer: TypeAlias = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="tokenizer.json", help="Tokenizer for texts.")
]
MaxLength: TypeAlias = Annotated[int | None, typer.Option("--max-length", metavar="N", help="Tokens per text.", min=1)]
Memory: TypeAlias = Annotated[str, typer.Option("--memory", metavar="SIZE", help="What measurements may take.")]
SamplesProvider: TypeAlias = Annotated[
    Literal["cpu", "cuda", "auto"], typer.Option("--provider", help="Where samples are run.")
]
Normalised: TypeAlias = Annotated[
    Literal["none", "sum", "mean", "max", "gaussian", "isomorphic"] | None,
    typer.Option(
        "--normalisation",
        help="How scores of different groups are made comparable.",
        show_default="the method's",
    ),
]
Server: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help="Let this server do it: see `spa serve` and `spa remote`.",
        show_default=False,
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and no progress.")]
Verbose: TypeAlias = Annotated[
    bool, typer.Option("--verbose", help="Whole tables, warnings of libraries, tracebacks of internal errors.")
]


def read_dims(texts: Sequence[str] | None) -> dict[str, int]:
    """NAME=N, repeated.

    Raises:
        UsageError: a text is not of this form.
    """
    out = {}
    for text in texts or ():
        name, _, value = text.rpartition("=")
        if not name or not value.strip().isdecimal() or int(value) < 1:
            raise UsageError(f"--dim: cannot read {text!r}; write NAME=N, for example --dim sequence=128")
        out[name.strip()] = int(value)
    return out


def read_list(texts: Sequence[str] | None) -> list[str]:
    """Values given one by one or separated by commas."""
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]


def check_output(model: Path, output: Path, *others: Path | None) -> None:
    """Refuse to write over what is read: it may be the only copy.

    Args:
        model: the file that is read.
        output: the file that will be written, and its external data beside it.
        others: more files that are read.

    Raises:
        UsageError: they are the same file.
    """
    for read in (model, *others):
        if read is not None and _same(read, output):
            raise UsageError(f"{output}: is the input; write to another file, the input is never overwritten")
    for data in output.parent.glob(f"{glob.escape(output.name)}.data*"):
        if any(_same(data, used) for used in _external(model)):
            raise UsageError(
                f"{output}: its external data {data.name!r} would overwrite that of {model}; choose another name"
            )


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def _external(model: Path) -> list[Path]:
    """Files with external data of a model; none if it cannot be read, which is reported later."""
    import onnx_ir as ir

    from spa.signature import as_ir

    with contextlib.suppress(SpaError):
        tensors = (v.const_value for graph in as_ir(model).graphs() for v in graph.initializers.values())
        return [model.parent / t.location for t in tensors if isinstance(t, ir.ExternalTensor)]
    return []


@contextmanager
def text_file(path: Path | None, *taken: Path) -> Iterator[Callable[[str], None]]:
    """Write a text file, all or nothing: what cannot be written fails on entry, before the work.

    Args:
        path: the file; None to write nothing.
        taken: files that it may not be.

    Raises:
        UsageError: it is one of `taken`.
        OutputError: it cannot be written.
    """
    if path is None:
        yield lambda text: None
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
    if any(_same(path, other) for other in taken):
        raise UsageError(f"{path}: is used for something else in this command; choose another file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")

    def write(text: str) -> None:
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise _unwritable(path, error) from error

    try:
        try:
            temporary.touch()
        except OSError as error:
            raise _unwritable(path, error) from error
        yield write
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be written ({error.strerror}); check the folder's permissions and free space")
