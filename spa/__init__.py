"""Exact structured pruning of any neural network at the ONNX level.

    result = spa.prune("model.onnx", target="macs=0.6", output="small.onnx")
    print(result.report.macs.after, result.report.verify)

`import spa` is cheap: what needs onnx, numpy or ONNX Runtime is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from spa.errors import (
    ExternalDataError,
    GateError,
    ModelError,
    OutputError,
    PlanError,
    RuntimeFailure,
    SpaError,
    TargetError,
    UnsupportedModelError,
    UsageError,
    VerifyError,
)
from spa.version import __version__

if TYPE_CHECKING:
    from spa.bench import BenchReport, bench
    from spa.calibration import Calibration, Preprocessing, load_calibration
    from spa.criteria import CRITERIA
    from spa.explain import Explanation, explain
    from spa.export.run import Exported, export
    from spa.frontier.index import Family
    from spa.frontier.pick import pick
    from spa.frontier.run import frontier
    from spa.graph import load
    from spa.groups import Analysis, Group
    from spa.implant import implant
    from spa.methods import METHODS, Method
    from spa.pipeline import Report, Result, analyze, apply, prune, verify
    from spa.plan import Plan
    from spa.study import Fit
    from spa.train import export_torch, finetune, import_weights
    from spa.verify import Verification

__all__ = [
    "CRITERIA",
    "METHODS",
    "Analysis",
    "BenchReport",
    "Calibration",
    "Explanation",
    "Exported",
    "ExternalDataError",
    "Family",
    "Fit",
    "GateError",
    "Group",
    "Method",
    "ModelError",
    "OutputError",
    "Plan",
    "PlanError",
    "Preprocessing",
    "Report",
    "Result",
    "RuntimeFailure",
    "SpaError",
    "TargetError",
    "UnsupportedModelError",
    "UsageError",
    "Verification",
    "VerifyError",
    "__version__",
    "analyze",
    "apply",
    "bench",
    "explain",
    "export",
    "export_torch",
    "finetune",
    "frontier",
    "implant",
    "import_weights",
    "load",
    "load_calibration",
    "pick",
    "prune",
    "verify",
]

_HOME = {
    "CRITERIA": "spa.criteria",
    "METHODS": "spa.methods",
    "Analysis": "spa.groups",
    "BenchReport": "spa.bench",
    "Calibration": "spa.calibration",
    "Explanation": "spa.explain",
    "Exported": "spa.export.run",
    "Family": "spa.frontier.index",
    "Fit": "spa.study",
    "Group": "spa.groups",
    "Method": "spa.methods",
    "Plan": "spa.plan",
    "Preprocessing": "spa.calibration",
    "Report": "spa.pipeline",
    "Result": "spa.pipeline",
    "Verification": "spa.verify",
    "analyze": "spa.pipeline",
    "apply": "spa.pipeline",
    "bench": "spa.bench",
    "explain": "spa.explain",
    "export": "spa.export.run",
    "export_torch": "spa.train",
    "finetune": "spa.train",
    "frontier": "spa.frontier.run",
    "implant": "spa.implant",
    "import_weights": "spa.train",
    "load": "spa.graph",
    "load_calibration": "spa.calibration",
    "pick": "spa.frontier.pick",
    "prune": "spa.pipeline",
    "verify": "spa.pipeline",
}
"""Where the names live that are imported on first use."""


class _Package(ModuleType):
    """This package: `spa.bench`, `spa.explain` and `spa.verify` are functions, also after the modules of these names
    were imported (Python would then bind the modules here); `from spa.bench import ...` reaches the modules.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


if not TYPE_CHECKING:  # a type checker reads the imports above, and reports names that do not exist

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'spa' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
