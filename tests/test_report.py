"""Pages: what they say is what the result says, they hold nothing foreign, and names cannot harm them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import spa
from spa.bench import Comparison
from spa.bench.operators import node_times, times_of
from spa.errors import UsageError
from spa.groups import Analysis
from spa.latency.loop import Attempt
from spa.latency.predict import Fitness
from spa.latency.query import LatencyReport
from spa.pipeline import Result
from spa.report import Frontier, FrontierPoint, Page, figures, gather, render, sections
from spa.report.data import Cause, OperatorTime, Sensitivity, Speed, Width
from spa.report.markup import Markup, data, join, tag
from spa.report.page import BOUND
from spa.report.speed import measure
from tests.command_line import Ran
from tests.pages import HARM, Element, check_accessible, check_alone, full, harmful, parse, speed
from tests.small_models import attention, cnn, custom


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Analysis, Path]:
    folder = tmp_path_factory.mktemp("report")
    onnx.save(cnn(), folder / "cnn.onnx")
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    result = spa.prune(
        folder / "cnn.onnx", target="macs=0.6", output=folder / "out.onnx", method="obspa", calibration={"x": x}
    )
    return result, spa.analyze(folder / "cnn.onnx"), folder


def cells(table: Element) -> list[list[str]]:
    return [[e.text for e in row.children if isinstance(e, Element)] for row in table.all("tr")]


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", text)]


# -- what it says ------------------------------------------------------------------------------------------------------


def test_every_number_of_the_headline_is_the_reports(pruned: tuple[Result, Analysis, Path]) -> None:
    result, analysis, _ = pruned
    report = result.report
    page = parse(render(gather(result, model="cnn.onnx", speed=speed())))
    rows = cells(page.section("before-after").all("table")[0])[1:]
    assert [row[:3] for row in rows] == [
        ["Multiply-accumulates", f"{report.macs.before:,}", f"{report.macs.after:,}"],
        ["Parameters", f"{report.parameters.before:,}", f"{report.parameters.after:,}"],
        ["Bytes", f"{report.bytes.before:,}", f"{report.bytes.after:,}"],
        ["Median latency", "3 ms", "2 ms"],
    ]
    assert rows[0][3] == f"{100 * report.macs.after / report.macs.before:.1f} %"
    said = page.section("before-after").all("p")[0].text
    assert {float(report.removed_units), float(report.groups), float(len(analysis.groups))} <= set(numbers(said))


def test_widths_are_those_of_the_plan(pruned: tuple[Result, Analysis, Path]) -> None:
    result, analysis, _ = pruned
    page = parse(render(gather(result, model="cnn.onnx")))
    left = {g.name: g.units for g in analysis.groups}
    left |= {g.name: g.units - len(g.removed) for g in result.plan.groups}
    shown = {}
    for row in page.section("widths").all("tbody")[0].all("tr"):
        shown[row.all("code")[0].text] = tuple(numbers(row.all("td")[1].text))
    assert shown == {g.name: (g.units, left[g.name]) for g in analysis.groups}
    assert any(before != after for before, after in shown.values())
    bars = page.section("widths").all("figure")[0].all("g")
    heights = [[float(r.attributes["height"]) for r in bar.all("rect")] for bar in bars]
    tallest = max(g.units for g in analysis.groups)
    expected = [[100 * g.units / tallest, 100 * left[g.name] / tallest] for g in analysis.groups]
    np.testing.assert_allclose(heights, expected, rtol=1e-5)


def test_proof_and_fit_are_the_reports(pruned: tuple[Result, Analysis, Path]) -> None:
    result, _, _ = pruned
    verify, fit = result.report.verify, result.report.fit
    assert verify is not None
    assert fit is not None
    page = parse(render(gather(result, model="m")))
    proof, compensation = (p.text for p in page.section("checks").all("p")[:2])
    for value in (verify.max_rel_error, verify.max_abs_error):
        assert any(math.isclose(value, n, rel_tol=0.01) for n in numbers(proof)), (value, proof)
    for value in (fit.samples, fit.error_before, fit.error_after):
        assert any(math.isclose(value, n, rel_tol=1e-3) for n in numbers(compensation)), (value, compensation)


def test_frozen_axes_are_counted_once_each(pruned: tuple[Result, Analysis, Path]) -> None:
    result, analysis, _ = pruned
    page = gather(result, model="cnn.onnx")
    assert sum(c.axes for c in page.causes) == len(analysis.frozen)
    assert sum(c.parameters for c in page.causes) == sum(f.parameters for f in analysis.frozen)
    assert {c.reason for c in page.causes} == {f.reason.text for f in analysis.frozen}
    assert "as a whole" in page.causes[-1].reason  # kernel windows come last, whatever their size
    rows = parse(render(page)).section("frozen").all("tbody")[0].all("tr")
    assert len(rows) == len(page.causes)


def test_groups_left_alone_say_why(tmp_path: Path) -> None:
    onnx.save(attention(), tmp_path / "m.onnx")
    result = spa.prune(tmp_path / "m.onnx", target="macs=0.8", output=tmp_path / "o.onnx", ignore=["*neuron*"])
    analysis = spa.analyze(tmp_path / "m.onnx")
    notes = {w.name: w.note for w in gather(result, model="m").widths}
    for group in analysis.groups:
        if not group.exact:
            assert notes[group.name] == f"left alone: {group.inexact}; --scope all prunes it"
        else:
            assert notes[group.name] == ("left alone by --kinds or --ignore" if "neuron" in group.name else "")
    assert any(notes.values())
    assert not all(notes.values())


def test_sensitivity_shows_the_curve_where_trials_were_made(pruned: tuple[Result, Analysis, Path]) -> None:
    result, analysis, _ = pruned
    curves = result.curves
    assert curves is not None
    page = gather(result, model="m")
    assert [s.name for s in page.sensitivity] == [g.name for g in analysis.groups]
    for found, group in zip(page.sensitivity, analysis.groups, strict=True):
        assert found.removed == (round(group.units * 0.25), round(group.units * 0.6))
        assert found.errors == tuple(float(curves[group.name][k]) for k in found.removed)
        assert found.chosen == next((len(g.removed) for g in result.plan.groups if g.name == group.name), 0)
    rows = parse(render(page)).section("sensitivity").all("tbody")[0].all("tr")
    first = page.sensitivity[0]
    row = next(r for r in rows if r.all("code")[0].text == first.name)
    expected = [n for k, e in zip(first.removed, first.errors, strict=True) for n in (k, float(f"{e:.2g}"))]
    assert numbers(row.all("td")[1].text) == expected


@pytest.mark.parametrize(
    ("found", "first"),
    [
        (speed("faster", 1.5), "1.50 times as fast, with "),
        (speed("slower", 0.8), "Not faster: 0.80 times the speed"),
        (speed("no measurable difference", 1.01), "Not measurably faster (1.01 times the speed)"),
        (None, ""),
    ],
)
def test_the_first_line_says_plainly_whether_it_is_faster(found: Speed | None, first: str) -> None:
    page = parse(render(dataclasses.replace(full(), speed=found)))
    heading = page.all("h1")[0].text
    assert heading.startswith(first)
    assert page.all("title")[0].text.startswith(heading)
    assert page.all("h1")[0].attributes["class"] == ("good" if found and found.verdict == "faster" else "plain")
    if found is None:
        assert "not measured" in heading
        assert "not automatically faster" in page.section("latency").text


def test_sections_without_data_are_left_out() -> None:
    bare = dataclasses.replace(
        full(), sensitivity=(), frontier=None, speed=None, fit=None, optimality=None, verify=None, command="", output=""
    )
    page = parse(render(bare))
    check_accessible(page)
    headings = {e.attributes["aria-labelledby"] for e in page.all("section")}
    assert headings == {"before-after", "widths", "latency", "checks", "frozen", "reproduce", "words"}
    assert page.section("checks").all("p")[0].text.startswith("Not verified.")


def test_a_page_without_groups_or_frozen_axes_stands() -> None:
    check_accessible(parse(render(dataclasses.replace(full(), widths=(), causes=(), settings={}, seconds={}))))


def test_how_to_reproduce_is_complete() -> None:
    page = parse(render(full()))
    text = page.section("reproduce").text
    for word in ("spa prune in.onnx -o out.onnx", "ab" * 32, "cd" * 32, '["macs=0.6"]', "0.1.0", "1.50 s"):
        assert word in text


# -- safe, alone, readable ---------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_is_accessible() -> None:
    page = parse(render(full()))
    check_alone(page)
    check_accessible(page)


def test_text_cannot_become_markup() -> None:
    for text in HARM:
        page = parse(f"<!doctype html>\n{tag('html', tag('p', text, title=text), data('d', {text: text}))}")
        assert page.all("p")[0].text == text
        assert page.all("p")[0].attributes["title"] == text
        assert json.loads(page.by_id("d").text) == {text: text}
        assert {e.tag for e in page.all()} == {"p", "script"}
    assert join("<b>", Markup("<i>"), None, ["&", 3]) == "&lt;b&gt;<i>&amp;3"
    assert "\u202e" not in tag("p", "a\u202eb\x00c\ud800")
    turned = tag("html", tag("p", "a\u202eb"))
    assert parse(f"<!doctype html>\n{turned}").text == "a\ufffdb"


def test_names_of_the_model_cannot_harm(tmp_path: Path) -> None:
    onnx.save(harmful(), tmp_path / "m.onnx")
    result = spa.prune(tmp_path / "m.onnx", target="macs=0.7", output=tmp_path / "o.onnx")
    analysis = spa.analyze(tmp_path / "m.onnx")
    result = dataclasses.replace(result, curves={g.name: np.linspace(0.1, 1, g.units + 1) for g in analysis.groups})
    where = f"{HARM[3]}.onnx"
    text = render(gather(result, model=where, command=where, unmeasured=HARM[0]))
    page = parse(text)
    check_alone(page)
    check_accessible(page)
    known = {e.tag for e in parse(render(full())).all()}
    assert {e.tag for e in page.all()} <= known
    shown = page.section("widths").text
    assert all(g.name.replace("\u202e", "\ufffd") in shown for g in analysis.groups)
    assert any(harm in shown for harm in HARM)
    assert where in page.section("reproduce").text
    assert "\u202e" not in text


def test_a_page_of_any_model_is_bounded() -> None:
    length, many = 3000, 2500
    name = "<" * length
    page = dataclasses.replace(
        full(),
        widths=tuple(Width(f"{name}{k}", "channel", 64, 32, True, 10, name) for k in range(many)),
        sensitivity=tuple(Sensitivity(f"{name}{k}", name, 64, (16, 38), (0.1, 0.2), 3) for k in range(many)),
        causes=tuple(Cause(f"{name}{k}", "", 1, 1, (name,) * 4) for k in range(many)),
        frontier=Frontier(name, name, True, tuple(FrontierPoint(f"{name}{k}", k, k) for k in range(many))),
        speed=dataclasses.replace(speed(), nodes=tuple(OperatorTime(name, name, 1.0, 1.0) for _ in range(200))),
    )
    text = render(page)
    assert len(text.encode()) <= BOUND
    assert f"{many - sections.LISTED:,} groups that are not listed here" in parse(text).section("widths").text


@pytest.mark.parametrize("most", [20, 21])
@pytest.mark.parametrize("length", [0, 19, 20, 21, 22, 500])
def test_a_clipped_name_keeps_its_ends(length: int, most: int) -> None:
    text = "".join(chr(0x100 + k) for k in range(length))
    short = figures.clip(text, most)
    assert len(short) == min(length, most)
    start, gap, end = short.partition(" … ")
    assert gap == (" … " if length > most else "")
    assert text.startswith(start)
    assert text.endswith(end)
    assert not gap or abs(len(start) - len(end)) <= 1


# -- speed -------------------------------------------------------------------------------------------------------------


def test_node_times_are_medians_over_all_runs_but_the_first() -> None:
    def event(name: str, start: int, took: int, kind: str = "Node", operator: str = "Conv") -> dict[str, Any]:
        return {"cat": kind, "ph": "X", "name": name, "ts": start, "dur": took, "args": {"op_name": operator}}

    trace = [event("model_run", 1000 * k, 900, "Session") for k in range(4)]
    took = {"a": (500, 10, 30, 20), "b": (500, 100, 5, 7)}
    for name, times in took.items():
        for k, t in enumerate(times):
            trace.append(event(f"{name}_kernel_time", 1000 * k + 10, t))
    trace.append(event("a_kernel_time", 1500, 10))  # twice in run 1, as in a loop: 10 + 10
    trace.append(event("a_fence_before", 1500, 999))
    trace.append(event("a_kernel_time", 1950, 999))  # between two runs
    trace.append({"cat": "Session", "ph": "i", "name": "note", "ts": 0})
    assert [(n.name, n.ms) for n in times_of(trace)] == [("a", 0.02), ("b", 0.007)]


def known(versus: Comparison | None) -> LatencyReport:
    return LatencyReport(
        versus is not None, 4.0, 2.5, 0.6, 0.61, versus, (Attempt(0.6, 0.6, 0.66), Attempt(0.55, 0.56, 0.625)),
        Fitness(0.8, 0.02, 0.05), "a board", "1.31.0", "cpu", 1, 1,
    )  # fmt: skip


def test_a_latency_that_was_measured_already_is_not_measured_again(pruned: tuple[Result, Analysis, Path]) -> None:
    result, _, folder = pruned
    latency = known(Comparison(1.6, 1.55, 1.65, 0.95, "faster"))
    result = dataclasses.replace(result, report=dataclasses.replace(result.report, latency=latency))
    found = measure(folder / "cnn.onnx", folder / "out.onnx", known=latency)
    assert (found.before.median_ms, found.after.median_ms, found.speedup) == (4.0, 2.5, 1.6)
    assert found.operators
    data = gather(result, model="m", speed=found)
    assert Page.from_json(json.loads(json.dumps(data.to_json()))) == data
    page = parse(render(data))
    check_accessible(page)
    assert page.all("h1")[0].text.startswith("1.60 times as fast")
    rows = [row for table in page.section("latency").all("table") for row in cells(table)]
    assert ["1", "60.0 %", "60.0 %", "66.0 %"] in rows
    assert ["2", "55.0 %", "56.0 %", "62.5 %"] in rows
    assert ["after", "2.5 ms", "-", "-"] in rows


def test_a_latency_on_another_device_is_not_measured_here(pruned: tuple[Result, Analysis, Path]) -> None:
    _, _, folder = pruned
    with pytest.raises(UsageError, match=r"latency on a board .* predicts 2\.5 ms instead of 4 ms"):
        measure(folder / "cnn.onnx", folder / "out.onnx", known=known(None))


def test_measuring_gives_every_operator_of_both_models(tmp_path: Path) -> None:
    onnx.save(cnn(), tmp_path / "m.onnx")
    spa.prune(tmp_path / "m.onnx", target="macs=0.6", output=tmp_path / "o.onnx")
    found = measure(tmp_path / "m.onnx", tmp_path / "o.onnx")
    assert found.batch == 1
    assert found.before.p10_ms <= found.before.median_ms <= found.before.p90_ms
    assert {"Gemm", "GlobalAveragePool"} <= {o.name for o in found.operators}
    for side in ("before_ms", "after_ms"):
        total = sum(getattr(o, side) or 0.0 for o in found.operators)
        assert total == pytest.approx(sum(getattr(n, side) or 0.0 for n in found.nodes))
        assert total > 0
    assert not list(tmp_path.glob("*trace*"))
    assert node_times(tmp_path / "m.onnx", {"x": np.zeros((1, 3, 8, 8), np.float32)}, runs=2)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_on_the_page_is_the_one_that_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "it's a <b> folder & more"
    folder.mkdir()
    onnx.save(cnn(), folder / "m.onnx")
    command = ["prune", folder / "m.onnx", "-o", folder / "o.onnx", "--target", "macs=0.7", "--ignore", "$x *"]
    command += ["--report", folder / "page.html", "--no-latency"]
    ran = Ran(capsys, *command)
    assert ran.status == 0, ran.err
    assert f"report: {folder / 'page.html'}" in ran.out
    page = parse((folder / "page.html").read_text(encoding="utf-8"))
    check_alone(page)
    said = page.section("reproduce").all("pre")[0].text
    assert shlex.split(said) == ["spa", *map(str, command)]
    assert "--no-latency was given" in page.section("latency").text


def test_a_measured_page_says_what_the_measurement_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(cnn(), tmp_path / "m.onnx")
    ran = Ran(
        capsys, "prune", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--target", "macs=0.7", "--json",
        "--report", tmp_path / "page.html",
    )  # fmt: skip
    assert ran.json()["page"] == str(tmp_path / "page.html")
    page = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    check_alone(page)
    check_accessible(page)
    heading, text = page.all("h1")[0].text, page.section("latency").text
    assert ("Not" not in heading) == (": faster." in text)
    assert "Conv" in text


def test_what_does_not_run_is_pruned_and_the_page_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(custom(), tmp_path / "m.onnx")
    ran = Ran(
        capsys, "prune", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--target", "params=0.9", "--no-verify",
        "--report", tmp_path / "page.html",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    page = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "ONNX Runtime cannot load" in page.section("latency").text
    assert page.section("checks").all("p")[0].text.startswith("Not verified.")


@pytest.mark.parametrize(
    ("extra", "status", "said"),
    [
        (["--no-latency"], 2, "--no-latency is about the page of --report"),
        (["--report", "{}/o.onnx"], 2, "is used for something else in this command"),
        (["--report", "{}/m.onnx"], 2, "is used for something else in this command"),
        (["--report", "{}/p.json", "--plan", "{}/p.json"], 2, "is used for something else in this command"),
        (["--report", "{}/none/page.html"], 10, "does not exist"),
        (["--report", "{}"], 10, "is a directory"),
    ],
)
def test_mistakes_about_the_page_are_found_before_the_work(
    extra: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(cnn(), tmp_path / "m.onnx")
    extra = [text.format(tmp_path) for text in extra]
    ran = Ran(capsys, "prune", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--target", "macs=0.7", *extra)
    assert ran.status == status
    assert said in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
