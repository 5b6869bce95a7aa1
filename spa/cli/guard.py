"""The entry point: runs the command line and turns every way to end into one sentence and an exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType

import typer

from spa.cli import output
from spa.errors import SpaError, kinds

INTERNAL = 70
"""Exit status of an error that nobody foresaw."""
INTERRUPTED = 130
TERMINATED = 143
PIPE = 141

_CommandLineError: type[BaseException] = typer.BadParameter.__mro__[2]
"""Click's base of errors; new versions of typer carry a copy of click, old ones import it."""


def statuses() -> Iterator[tuple[int, str, str]]:
    """Exit statuses: (status, code, meaning), in ascending order."""
    yield 0, "", "success"
    for kind in sorted(kinds(), key=lambda k: k.exit_status):
        yield kind.exit_status, kind.code, (kind.__doc__ or "").strip().rstrip(".")
    yield INTERNAL, "internal", "an error nobody foresaw; please report it"
    yield INTERRUPTED, "interrupted", "interrupted with Ctrl-C"
    yield PIPE, "", "the reader of the output went away"
    yield TERMINATED, "", "ended by SIGTERM; nothing is left behind"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `spa` with `arguments` (the process's own if None) and return the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    _settle("--verbose" in argv)
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return PIPE
    return status


def _settle(verbose: bool) -> None:
    """Let libraries be quiet, and SIGTERM end the program the way an exception does: temporary files are removed."""
    if not verbose:
        logging.getLogger().addHandler(logging.NullHandler())
        if not sys.warnoptions:
            warnings.simplefilter("ignore")

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    try:
        signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread
        return


def _run(argv: list[str]) -> int:
    from spa.cli.app import app

    json = "--json" in argv
    try:
        status = app(argv, prog_name="spa", standalone_mode=False, obj=tuple(argv))
    except SpaError as error:
        return _fail(error.code, str(error), error.exit_status, json)
    except (typer.Abort, KeyboardInterrupt):  # older versions of typer
        return _fail("interrupted", "interrupted", INTERRUPTED, json)
    except _CommandLineError as error:
        return _usage(error, json)
    except MemoryError:
        return _fail("error", "not enough memory for this model", 1, json)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        raise
    except Exception as error:  # the last line of defence: a sentence and a status, not a traceback
        return _internal(error, argv, json)
    if status == INTERRUPTED:  # newer versions of typer
        return _fail("interrupted", "interrupted", INTERRUPTED, json)
    return status if isinstance(status, int) else 0


def _fail(code: str, message: str, status: int, json: bool) -> int:
    output.complain(message)
    if json:
        output.emit({"error": {"code": code, "message": message}})
    return status


def _usage(error: BaseException, json: bool) -> int:
    """Typer's own complaints: unknown options, missing arguments, values that are not numbers."""
    format_message = getattr(error, "format_message", lambda: str(error))
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "spa"
    message = " ".join(str(format_message()).split()).rstrip(".")
    return _fail("usage", f"{message[:1].lower()}{message[1:]}; see `{command} --help`", 2, json)


def _internal(error: Exception, argv: list[str], json: bool) -> int:
    if "--verbose" in argv or os.environ.get("SPA_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    advice = "please report it with the model, or with what --verbose prints"
    return _fail("internal", f"internal error ({what.rstrip('.')}); {advice}", INTERNAL, json)
