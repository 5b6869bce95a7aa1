"""Every error `spa` raises on purpose, in one tree.

    SpaError                       1   anything we foresaw and can explain
    ├── UsageError                 2   an option or argument is wrong
    ├── ModelError                 3   the model cannot be read or is not a valid ONNX model
    │   ├── UnsupportedModelError  4   valid, but outside of what is supported (opset, size ...)
    │   └── ExternalDataError      5   external data is missing, truncated or outside the model's folder
    ├── PlanError                  6   a plan is malformed or belongs to another model
    ├── TargetError                7   a target cannot be reached (or nothing is prunable)
    ├── VerifyError                8   the pruned model does not match its reference
    ├── RuntimeFailure             9   ONNX Runtime cannot run the model
    ├── OutputError               10   the result cannot be written
    └── GateError                 11   a stage ran, and missed what was asked of it

The number is the command line's exit status; `code` is stable text for programs.
A message is one sentence that names the file, node or option, and says what to do.
"""

from __future__ import annotations

from typing import ClassVar


class SpaError(Exception):
    """Base of all foreseen errors."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1


class UsageError(SpaError):
    """An option or argument is wrong."""

    code = "usage"
    exit_status = 2


class ModelError(SpaError):
    """The model cannot be read or is not a valid ONNX model."""

    code = "model"
    exit_status = 3


class UnsupportedModelError(ModelError):
    """The model is valid, but outside of what is supported."""

    code = "unsupported"
    exit_status = 4


class ExternalDataError(ModelError):
    """External data is missing, truncated or outside the model's folder."""

    code = "external-data"
    exit_status = 5


class PlanError(SpaError):
    """A plan is malformed or belongs to another model."""

    code = "plan"
    exit_status = 6


class TargetError(SpaError):
    """A target cannot be reached, or nothing can be pruned."""

    code = "target"
    exit_status = 7


class VerifyError(SpaError):
    """The pruned model does not match its masked dense reference."""

    code = "verify"
    exit_status = 8


class RuntimeFailure(SpaError):
    """ONNX Runtime cannot run the model."""

    code = "runtime"
    exit_status = 9


class OutputError(SpaError):
    """The result cannot be written."""

    code = "output"
    exit_status = 10


class GateError(SpaError):
    """A stage missed its gate."""

    code = "gate"
    exit_status = 11


def kinds() -> set[type[SpaError]]:
    """All of this module; those that others derive from them are not of the interface."""
    found, queue = set[type[SpaError]](), [SpaError]
    while queue:
        kind = queue.pop()
        found.add(kind)
        queue.extend(k for k in kind.__subclasses__() if k.__module__ == SpaError.__module__)
    return found
