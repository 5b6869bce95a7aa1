"""What a benchmark ran on: the processor, and how fast it was clocked, as far as the system tells."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_CPUS = "sys/devices/system/cpu"


@dataclass(frozen=True)
class Clocks:
    """Clock rates in MHz, means over the processors that this process may use; None where the system does not tell.

    On a virtual machine the present rate may be a constant.
    """

    governor: str | None
    """What decides on the rate, such as `performance` or `powersave`; several are joined by commas."""
    boost: bool | None
    """Whether rates above the nominal one are allowed."""
    limit_mhz: float | None
    """The highest rate that is allowed."""
    before_mhz: float | None
    """After warm-up, before the first round."""
    after_mhz: float | None
    """After the last round."""
    gpu: str | None = None
    """Name of the GPU, if a model ran there."""
    gpu_limit_mhz: float | None = None
    gpu_before_mhz: float | None = None
    gpu_after_mhz: float | None = None


@dataclass(frozen=True)
class Reading:
    """The clocks of one moment."""

    governor: str | None = None
    boost: bool | None = None
    limit_mhz: float | None = None
    mhz: float | None = None
    gpu: str | None = None
    gpu_limit_mhz: float | None = None
    gpu_mhz: float | None = None


def clocks(before: Reading, after: Reading) -> Clocks | None:
    """Both readings together; None if they are empty."""
    if before == after == Reading():
        return None
    return Clocks(
        after.governor,
        after.boost,
        after.limit_mhz,
        before.mhz,
        after.mhz,
        after.gpu,
        after.gpu_limit_mhz,
        before.gpu_mhz,
        after.gpu_mhz,
    )


def read_clocks(*, gpu: bool = False, root: Path = Path("/"), processors: Iterable[int] | None = None) -> Reading:
    """The clocks now.

    Args:
        gpu: also ask `nvidia-smi` about the first GPU that is visible.
        root: where `proc` and `sys` are.
        processors: which; those of this process if None.
    """
    chosen = sorted(allowed() if processors is None else processors)
    folders = [root / _CPUS / f"cpu{number}" / "cpufreq" for number in chosen]
    governors = sorted({text for folder in folders if (text := _text(folder / "scaling_governor"))})
    rates = [rate for folder in folders if (rate := _number(folder / "scaling_cur_freq")) is not None]
    limits = [rate for folder in folders if (rate := _number(folder / "scaling_max_freq")) is not None]
    mhz = _mean(rates, 1e-3)  # the files count kHz
    name, gpu_mhz, gpu_limit = _gpu() if gpu else (None, None, None)
    return Reading(
        governor=", ".join(governors) or None,
        boost=_boost(root / _CPUS),
        limit_mhz=_mean(limits, 1e-3),
        mhz=_mean(_cpuinfo_mhz(root, set(chosen))) if mhz is None else mhz,
        gpu=name,
        gpu_limit_mhz=gpu_limit,
        gpu_mhz=gpu_mhz,
    )


def _boost(folder: Path) -> bool | None:
    """Intel's driver says whether it is off, the general one whether it is on."""
    off, on = _number(folder / "intel_pstate" / "no_turbo"), _number(folder / "cpufreq" / "boost")
    if off is not None:
        return off == 0
    return None if on is None else on != 0


def _cpuinfo_mhz(root: Path, processors: set[int]) -> list[float]:
    """`cpu MHz` of each processor, where the system has such a line (not on Arm)."""
    found, number = [], -1
    for line in _text(root / "proc/cpuinfo").splitlines():
        label, _, value = (part.strip() for part in line.partition(":"))
        with contextlib.suppress(ValueError):
            if label == "processor":
                number = int(value)
            elif label == "cpu MHz" and number in processors:
                found.append(float(value))
    return found


def _gpu() -> tuple[str | None, float | None, float | None]:
    """Name, present rate and limit of the first visible GPU."""
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0].strip()
    command = ["nvidia-smi", f"--id={first}", "--query-gpu=name,clocks.sm,clocks.max.sm"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True, timeout=20
        )
        name, now, limit = done.stdout.splitlines()[0].rsplit(",", 2)
        return name.strip(), _float(now), _float(limit)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None, None, None


def _float(text: str) -> float | None:
    """None for what is no number, such as `[N/A]`."""
    with contextlib.suppress(ValueError):
        return float(text)
    return None


def _number(path: Path) -> float | None:
    return _float(_text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _mean(values: list[float], unit: float = 1.0) -> float | None:
    return sum(values) / len(values) * unit if values else None


def cpu_name() -> str:
    """The processor's model name, or its architecture."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allowed() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
