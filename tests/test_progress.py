"""What long operations say while they run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import onnx
import pytest

import spa
from spa.calibration.trials import PART
from spa.cli import output
from tests.models import BUILT
from tests.small_models import cnn

INNER = {"collect", "weigh", "refit", "norms"}


def told(model: onnx.ModelProto, **more: object) -> list[tuple[str, int, int]]:
    seen: list[tuple[str, int, int]] = []
    result = spa.prune(
        model, target="macs=0.7", min_keep=1, align=1, calibration="none", progress=lambda *s: seen.append(s), **more
    )
    assert {name for name, _, _ in seen} - INNER <= set(result.report.seconds)
    return seen


def check_order(seen: Sequence[tuple[str, int, int]]) -> None:
    """Each stage begins with 0, never goes back, has one total, and ends with all of it before it begins anew."""
    at: dict[str, tuple[int, int]] = {}
    for name, done, total in seen:
        assert 0 <= done <= total
        if done == 0:
            assert name not in at or at[name][0] == at[name][1]
        else:
            assert at[name][0] < done
            assert at[name][1] == total
        at[name] = done, total
    assert all(done == total for done, total in at.values())


@pytest.mark.parametrize("method", ["obspa", "obspa-paper", "flap", "auto"])
def test_stages_only_go_forward(method: str) -> None:
    seen = told(BUILT["residual_cnn"].build(), method=method, recalibrate="norm", samples=80)
    check_order(seen)
    names = [name for name, _, _ in seen]
    outer = ["load", "analyze", "calibrate", "score", "plan", "rewrite", "verify", "compensate"]
    assert [n for n in dict.fromkeys(names) if n in outer] == outer
    assert {"collect", "norms"} <= set(names)
    if method in ("obspa", "auto"):
        assert {"weigh", "refit"} <= set(names)
    samples = [total for name, _, total in seen if name == "collect"]
    assert max(samples) >= 80 - 80 // PART  # some are held out


def test_inner_stages_run_inside_outer_ones() -> None:
    seen = told(BUILT["residual_cnn"].build(), method="obspa", samples=40)
    begin, end = seen.index(("score", 0, 1)), seen.index(("score", 1, 1))
    assert {name for name, _, _ in seen[begin + 1 : end]} == {"collect", "weigh"}
    begin, end = seen.index(("compensate", 0, 1)), seen.index(("compensate", 1, 1))
    assert {name for name, _, _ in seen[begin + 1 : end]} >= {"refit"}


def test_words() -> None:
    assert output.doing("refit", 3, 20) == "refitting layers, 3 of 20 ..."
    assert output.doing("load", 0, 1) == "loading the model ..."
    for name in (*INNER, *spa.prune(cnn(), target="macs=0.9").report.seconds):
        assert output.doing(name, 0, 1) != f"{name} ..."


def command(folder: Path, *more: str) -> list[str]:
    source, out = folder / "model.onnx", folder / "out.onnx"
    onnx.save(cnn(), source)
    words = ["prune", source, "-o", out, "--target", "macs=0.7", "--method", "obspa", "--calibration", "none"]
    return [sys.executable, "-m", "spa", *map(str, words), "--no-cache", *more]


def plain(text: str) -> str:
    """Without the times that were measured."""
    return re.sub(r"seconds: .*", "seconds", text)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_pipe_gets_the_results_only(tmp_path: Path, more: tuple[str, ...]) -> None:
    ran = subprocess.run(command(tmp_path, *more), capture_output=True, text=True, check=True)
    assert not ran.stderr
    assert "\x1b" not in ran.stdout
    assert not re.search("loading|collecting|refitting", ran.stdout)


def on_a_terminal(command: list[str]) -> tuple[str, str]:
    """stdout, and stderr as a terminal gets it."""
    pty = pytest.importorskip("pty")
    main, other = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                block = os.read(main, 1 << 16)
            except OSError:  # how Linux says that nobody writes any more
                return
            if not block:
                return
            shown.extend(block)

    reader = threading.Thread(target=read)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other, text=True, env=environment) as process:
        os.close(other)
        reader.start()
        out: IO[str] | None = process.stdout
        assert out is not None
        text = out.read()
    reader.join()
    os.close(main)
    assert process.returncode == 0
    return text, shown.decode()


def test_a_terminal_sees_progress_on_stderr(tmp_path: Path) -> None:
    ran = subprocess.run(command(tmp_path), capture_output=True, text=True, check=True)
    out, shown = on_a_terminal(command(tmp_path))
    assert plain(out) == plain(ran.stdout)
    assert re.search(r"[a-z] \.\.\.", shown)
    assert "\x1b[2K" in shown  # what was shown is wiped again


def test_no_progress_with_json(tmp_path: Path) -> None:
    assert not on_a_terminal(command(tmp_path, "--json"))[1]
