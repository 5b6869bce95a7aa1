"""What a benchmark says about the machine, and where it says nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spa.bench import BenchReport, Clocks, remarks
from spa.bench.machine import Reading, allowed, clocks, read_clocks
from spa.bench.tables import _clocks

CPUINFO = """processor\t: 0
model name\t: A Processor
cpu MHz\t\t: 1000.000

processor\t: 1
model name\t: A Processor
cpu MHz\t\t: 2000.500

processor\t: 2
cpu MHz\t\t: unknown
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def frequencies(number: int, now: int, limit: int, governor: str) -> dict[str, str]:
    """As the kernel has them: kHz, and a line end."""
    folder = f"sys/devices/system/cpu/cpu{number}/cpufreq"
    return {
        f"{folder}/scaling_cur_freq": f"{now}\n",
        f"{folder}/scaling_max_freq": f"{limit}\n",
        f"{folder}/scaling_governor": f"{governor}\n",
    }


def test_rates_are_means_over_the_processors_that_may_be_used(tmp_path: Path) -> None:
    files = {
        **frequencies(0, 800_000, 3_000_000, "powersave"),
        **frequencies(1, 2_400_000, 3_600_000, "performance"),
        **frequencies(2, 1_600_000, 3_600_000, "performance"),
    }
    root = write(tmp_path, {**files, "proc/cpuinfo": CPUINFO})
    assert read_clocks(root=root, processors=[1, 2]) == Reading("performance", None, 3600, 2000)
    assert read_clocks(root=root, processors=[0]) == Reading("powersave", None, 3000, 800)
    assert read_clocks(root=root, processors=[0, 1]).governor == "performance, powersave"


def test_cpuinfo_helps_where_there_is_no_driver(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": CPUINFO})
    assert read_clocks(root=root, processors=[1]) == Reading(mhz=2000.5)
    assert read_clocks(root=root, processors=[0, 1]).mhz == pytest.approx(1500.25)
    assert read_clocks(root=root, processors=[2]) == Reading()  # no number


@pytest.mark.parametrize(
    ("file", "text", "boost"),
    [
        ("intel_pstate/no_turbo", "0\n", True),
        ("intel_pstate/no_turbo", "1\n", False),
        ("cpufreq/boost", "1\n", True),
        ("cpufreq/boost", "0\n", False),
    ],
)
def test_boost(tmp_path: Path, file: str, text: str, boost: bool) -> None:
    root = write(tmp_path, {f"sys/devices/system/cpu/{file}": text})
    assert read_clocks(root=root, processors=[0]).boost is boost


def test_a_system_that_tells_nothing_gets_no_line(tmp_path: Path) -> None:
    nothing = read_clocks(root=tmp_path)
    assert nothing == Reading()
    assert clocks(nothing, nothing) is None
    assert _clocks(None) == ""


def test_this_system() -> None:
    assert set(allowed()) <= set(range(os.cpu_count() or 1))
    found = read_clocks()
    assert found.gpu is None
    assert found.mhz is None or 1 < found.mhz < 20_000


def test_the_line(tmp_path: Path) -> None:
    before = Reading("performance", True, 3600, 3500)
    after = Reading("performance", True, 3600, 3100)
    found = clocks(before, after)
    assert found == Clocks("performance", True, 3600, 3500, 3100)
    assert _clocks(found) == (
        "clocks: 3500 MHz before, 3100 MHz after the rounds, at most 3600 MHz, governor performance, boost on"
    )
    gpu = Reading(gpu="A GPU", gpu_limit_mhz=1980.0, gpu_mhz=1755.0)
    assert _clocks(clocks(Reading(), gpu)) == "clocks: A GPU: unknown before, 1755 MHz after, at most 1980 MHz"


def test_a_sweep_says_which_setting_ran_at_which_rate() -> None:
    def report(batch: int, mhz: float) -> BenchReport:
        found = clocks(Reading(mhz=mhz), Reading(mhz=mhz))
        return BenchReport((), batch, {}, 5, 5, 0, 0, "1.31", "cpu", 1, "measured", 3, "none", found)

    assert [text for text in remarks(report(1, 2000), report(8, 2000)) if "clocks" in text] == [
        "clocks: 2000 MHz before, 2000 MHz after the rounds"
    ]
    assert [text for text in remarks(report(1, 2000), report(8, 1500)) if "clocks" in text] == [
        "batch 1, threads auto: clocks: 2000 MHz before, 2000 MHz after the rounds",
        "batch 8, threads auto: clocks: 1500 MHz before, 1500 MHz after the rounds",
    ]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NVIDIA H100 80GB HBM3, 1755, 1980", ("NVIDIA H100 80GB HBM3", 1755.0, 1980.0)),
        ("A GPU, with a comma, 300, [N/A]", ("A GPU, with a comma", 300.0, None)),
        ("No devices were found", (None, None, None)),
    ],
)
def test_the_gpu_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: tuple[str | None, float | None, float | None]
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\nif [ "$1" = --id=3 ]; then echo "{line}"; else exit 6; fi\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    found = read_clocks(gpu=True, root=tmp_path)
    assert (found.gpu, found.gpu_mhz, found.gpu_limit_mhz) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert read_clocks(gpu=True, root=tmp_path).gpu is None
