"""One stage by itself: read the samples, run it, and write the file only if every gate was reached."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa.calibration import load_calibration
from spa.edge import stages
from spa.edge.base import Step, release, require, staging
from spa.edge.fidelity import Metric, Samples
from spa.edge.gates import nearest, parse_gates
from spa.errors import UsageError
from spa.graph import load
from spa.options import check_output
from spa.progress import Progress, silent
from spa.runtime import Provider

__all__ = ["CONVERSIONS", "Data", "check_suffix", "convert"]

CONVERSIONS: Mapping[str, Callable[..., Step]] = {
    "quantize": stages.quantize,
    "float16": stages.float16,
    "opset": stages.opset,
    "ort": stages.ort,
}
"""Stages that turn one file into another and change nothing that should change the outputs; each takes a `Job`."""
MADE_UP = 32
"""Samples made up where none are given."""


@dataclass(frozen=True)
class Data:
    """Where samples come from, see `spa.load_calibration`."""

    source: Any = "noise"
    samples: int | None = None
    preprocess: Any = None
    tokenizer: str | os.PathLike[str] | None = None
    max_length: int | None = None
    dims: Mapping[str, int] | None = None
    seed: int = 0
    batch: int = 32
    """Samples per run."""
    provider: Provider = "cpu"
    """Where outputs are compared."""

    def read(self, model: Path, metric: Metric | None = None) -> Samples:
        """The samples of a model.

        Raises:
            UsageError: they cannot be read, or do not fit the model.
            ModelError: the model cannot be read.
        """
        if self.batch < 1:
            raise UsageError(f"batch must be 1 or more, not {self.batch}")
        made_up = self.source in ("none", "noise", "bn") if isinstance(self.source, str) else False
        data = load_calibration(
            self.source,
            load(model).model,
            samples=MADE_UP if made_up and self.samples is None else self.samples,
            seed=self.seed,
            preprocess=self.preprocess,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            dims=self.dims,
        )
        return Samples(data, self.batch, self.provider, metric=metric)


def convert(
    stage: str,
    model: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    data: Data | None = None,
    gate: Mapping[str, Any] | Sequence[str] | str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Step:
    """Run one stage, `quantize`, `float16`, `opset` or `ort`, and write its file.

        step = spa.edge.convert("quantize", "small.onnx", output="int8.onnx", data=Data("calib.npz"),
                                gate={"agreement": 0.98})

    Args:
        stage: key of `CONVERSIONS`.
        model: ONNX file; it is not changed.
        output: file to write.
        data: samples on which ranges are measured (`quantize`) and outputs are compared; noise by default.
        gate: what must be reached, `{"agreement": 0.98, "size": "2MB"}` or texts, see `spa.edge.GATES`.
        progress: called with (stage, done, total).
        options: of the stage, see `spa.edge.stages`.

    Raises:
        UsageError: an option is wrong, or samples do not fit.
        ModelError, UnsupportedModelError: the model cannot be read, or not be converted.
        GateError: a gate was missed; nothing was written.
        RuntimeFailure: a model does not run.
        OutputError: the file cannot be written.
    """
    if stage not in CONVERSIONS:
        names = list(CONVERSIONS)
        raise UsageError(f"unknown stage {stage!r}{nearest(stage, names) or '; choose one of ' + ', '.join(names)}")
    source, target = Path(model), Path(output)
    gates = parse_gates(gate)
    check_output(target)
    check_suffix(target, stage)
    on = (data or Data()).read(source)
    with staging(target) as folder:
        step = CONVERSIONS[stage](stages.Job(stage, source, folder / target.name, on, gates, progress), **options)
        require(step)
        release([file for file in folder.iterdir() if file.is_file()], target.parent, target)
    return stages.moved(step, target)


def check_suffix(target: Path, stage: str) -> None:
    """Raise UsageError unless a file is named as what it will hold: ONNX Runtime tells its own format by the name."""
    named, wanted = target.suffix.lower() == ".ort", stage == "ort"
    if wanted and not named:
        raise UsageError(f"{target}: name it *.ort, by which ONNX Runtime knows its own format")
    if named and not wanted:
        raise UsageError(f"{target}: stage {stage} writes ONNX; name it *.onnx")
