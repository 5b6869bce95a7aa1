"""Pruning as a query: further queries, metric targets, families, picks; on a network that has learned something."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import spa
from spa.errors import OutputError, PlanError, TargetError, UsageError
from spa.frontier.index import NAME, Family
from spa.frontier.index import read as read_family
from spa.frontier.run import ranked
from spa.metrics import Drop
from tests.command_line import Ran
from tests.pages import check_accessible, check_alone, parse
from tests.trained import trained

ROOT = Path(__file__).parents[1]
HELD = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits network, samples to fit on and others to measure on, and a cache."""
    out = tmp_path_factory.mktemp("frontier")
    onnx.save(trained("cnn"), out / "cnn.onnx")
    from examples import digits

    x, test, y, labels = digits.data()
    np.savez(out / "fit.npz", image=x[:200], labels=y[:200])
    np.savez(out / "held.npz", image=test[:HELD], labels=labels[:HELD])
    return out


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"calibration": folder / "fit.npz", "cache": folder / "cache"} | more


def top1(model: Path | onnx.ModelProto, samples: Path) -> float:
    """What ONNX Runtime alone makes of it."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    with np.load(samples) as z:
        (scores,) = session.run(None, {"image": z["image"]})
        return float((scores.argmax(axis=1) == z["labels"]).mean())


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return spa.frontier(
        folder / "cnn.onnx",
        output=folder / "family",
        shares=(0.9, 0.7, 0.5, 0.3, 0.0001),
        evaluate=folder / "held.npz",
        **options(folder),
    )


# -- the database ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_second_query_is_one_on_an_empty_cache(name: str, tmp_path: Path) -> None:
    """Bit for bit; and it runs the original on no sample: what is asked of it is known."""
    from examples import digits

    x = {"image": digits.data()[0][:96]}

    def query(cache: Path, target: str) -> bytes:
        found = spa.prune(
            trained(name), target=target, method="obspa", compensate="stitch", calibration=x, cache=cache, check=False
        )
        assert isinstance(found.model, onnx.ModelProto)
        return found.model.SerializeToString()

    query(tmp_path / "warm", "macs=0.8")
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "warm").iterdir()}
    second = query(tmp_path / "warm", "macs=0.6")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "warm").iterdir()} == files, "nothing new was measured"
    assert second == query(tmp_path / "cold", "macs=0.6")


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_stitches_are_better_than_the_cut_and_no_better_than_the_refit(name: str) -> None:
    from examples import digits

    x = {"image": digits.data()[0][:128]}

    def fit(how: Any) -> Any:
        return spa.prune(trained(name), target="macs=0.7", method="obspa", compensate=how, calibration=x).report.fit

    found = {how: fit(how) for how in ("stitch", "obs")}
    assert found["stitch"].error_after < 0.7 * found["stitch"].error_before
    assert found["obs"].error_after < found["stitch"].error_after


def test_the_plan_of_a_draft_is_that_of_the_refit(folder: Path) -> None:
    plans = [
        spa.prune(folder / "cnn.onnx", target="macs=0.6", method="obspa", compensate=how, **options(folder)).plan
        for how in ("stitch", "obs")
    ]
    assert plans[0].removed == plans[1].removed


# -- targets on a metric -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", ["stitch", "obs"])
def test_a_metric_target_is_met_on_the_samples_it_reports(compensate: Any, folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    result = spa.prune(
        folder / "cnn.onnx",
        target="top1-drop=0.05",
        output=tmp_path / "out.onnx",
        method="obspa",
        compensate=compensate,
        evaluate=folder / "held.npz",
        reached=seen.append,
        **options(folder),
    )
    held = result.report.metric
    assert held is not None
    before, after = (top1(p, folder / "held.npz") for p in (folder / "cnn.onnx", tmp_path / "out.onnx"))
    assert (held.drop.before, held.drop.after) == (pytest.approx(before), pytest.approx(after))
    assert before - after <= 0.05 + 1e-9  # six of 120 samples, as floats
    assert held.drop.samples == HELD
    assert result.report.macs.after < 0.9 * result.report.macs.before
    assert tuple(seen) == held.reached
    assert any(not p.met for p in held.reached), "the search looked on the other side, too"
    final = [p for p in held.reached if p.met and not p.draft]
    assert result.report.macs.after == min(round(p.costs["macs"]) for p in final)
    assert any(p.draft for p in held.reached) == (compensate == "obs")
    with pytest.raises(UsageError, match="--metric"):
        spa.prune(folder / "cnn.onnx", target="macs=0.9", metric="top1")


def test_together_with_other_targets(folder: Path) -> None:
    """Smallest in parameters, within a limit on the size, judged without labels on a part of the samples."""
    with np.load(folder / "fit.npz") as z:
        x = {"image": z["image"]}

    def ask(*targets: str) -> Any:
        return spa.prune(
            folder / "cnn.onnx",
            target=targets,
            method="obspa",
            compensate="stitch",
            minimise="params",
            calibration=x,
            cache=folder / "cache",
        )

    result = ask("divergence-drop=0.1", "size=80%")
    held = result.report.metric
    assert (held.drop.metric, held.minimised, held.drop.before) == ("divergence", "params", 0.0)
    assert held.drop.samples == 40
    assert 0 < held.drop.after <= 0.1
    assert result.report.bytes.after <= 0.8 * result.report.bytes.before
    assert result.report.fit.samples == 160
    with pytest.raises(TargetError, match=r"divergence-drop=0.0001 cannot be kept to with size=50%: the smallest drop"):
        ask("divergence-drop=0.0001", "size=50%")


def test_it_says_what_the_samples_cannot_tell(folder: Path) -> None:
    held = spa.prune(
        folder / "cnn.onnx", target="top1-drop=0.005", method="obspa", compensate="stitch", **options(folder)
    ).report.metric
    assert held is not None
    assert "held-out samples" in held.note
    sure = replace(held, limit=0.5, drop=replace(held.drop, error=0.1))
    assert sure.note == ""
    assert "below one standard error" in replace(sure, limit=0.05).note
    assert "not known" in replace(sure, drop=replace(held.drop, error=None)).note


def test_a_metric_of_the_users_own(folder: Path) -> None:
    """One number, or one per sample, which gives a standard error."""

    def right(outputs: Mapping[str, Any], labels: Any) -> Any:
        return (outputs["logits"].argmax(axis=1) == labels).astype(float)

    def ask(metric: Any) -> Any:
        return spa.prune(
            folder / "cnn.onnx",
            target="metric-drop=0.05",
            metric=metric,
            method="obspa",
            compensate="stitch",
            evaluate=folder / "held.npz",
            **options(folder),
        ).report

    each, one, known = ask(right), ask(lambda o, y: float(right(o, y).mean())), ask("top1")
    assert each.metric.drop.error is not None
    assert one.metric.drop.error is None
    assert each.macs == one.macs == known.macs
    assert each.metric.drop.after == pytest.approx(known.metric.drop.after)
    with pytest.raises(UsageError, match=r"metric: failed with KeyError"):
        ask(lambda outputs, labels: outputs["nothing"])
    with pytest.raises(UsageError, match="must give one number"):
        ask(lambda outputs, labels: np.zeros(3))


# -- families ----------------------------------------------------------------------------------------------------------


def test_a_family(family: Family, folder: Path) -> None:
    """Monotone and non-dominated along the front; every number is that of the plan and of ONNX Runtime."""
    assert [p.share for p in family.points] == [0.3, 0.5, 0.7, 0.9]
    assert "cannot be reached" in family.skipped["0.0001"]
    assert family.complete
    front = family.front
    assert [p.costs["macs"] for p in front] == sorted(p.costs["macs"] for p in front)
    drops = [p.drop.drop for p in front]
    assert all(a > b for a, b in itertools.pairwise(drops))
    for p in family.points:
        beaten = any(q.costs["macs"] <= p.costs["macs"] and q.drop.drop <= p.drop.drop for q in family.points if q != p)
        assert p.front != beaten
        assert p.drop.before == pytest.approx(top1(folder / "cnn.onnx", folder / "held.npz"))
        cut = spa.apply(folder / "cnn.onnx", family.folder / p.plan)
        assert cut.report.macs.after == round(p.costs["macs"]) <= p.share * family.original["macs"]
    assert read_family(family.folder) == family


def test_ties_and_steps_back_are_no_part_of_the_front(family: Family) -> None:
    empty = replace(family, points=())
    for share, drop in ((0.5, 0.2), (0.7, 0.2), (0.8, 0.1), (0.9, 0.15), (0.6, 0.3)):
        point = replace(
            family.points[0], share=share, costs={"macs": share}, drop=Drop("top1", 1.0, 1 - drop, drop, 0.0, 9)
        )
        empty = ranked(empty, point, "macs")
    assert [(p.share, p.front) for p in empty.points] == [
        (0.5, True), (0.6, False), (0.7, False), (0.8, True), (0.9, False),
    ]  # fmt: skip
    assert [p.index for p in empty.points] == [0, 1, 2, 3, 4]


def test_a_pick_is_its_point(family: Family, folder: Path, tmp_path: Path) -> None:
    """The stitch gives the plan and the metric of the index exactly; the refit is at least nearly as good."""
    for point in family.points[1:3]:
        found = spa.pick(family.folder, index=point.index, compensate="stitch", output=tmp_path / "out.onnx")
        assert found.report.metric is not None
        assert found.report.metric.drop == point.drop
        assert found.report.verify is not None
        plan = json.loads((family.folder / point.plan).read_text())
        assert json.loads(found.plan.to_json())["removed"] == plan["removed"]
        assert top1(tmp_path / "out.onnx", folder / "held.npz") == pytest.approx(point.drop.after)
    refit = spa.pick(family, index=point.index)
    assert refit.report.metric.drop.drop <= point.drop.drop + 2 / HELD
    assert refit.report.fit.error_after < found.report.fit.error_after
    assert refit.report.method == "obspa"


def test_picks_by_target(family: Family) -> None:
    from spa.frontier.pick import choose

    shares = {p.share: p for p in family.points}
    assert choose(family, "macs=0.75", None)[0] == min(
        (p for p in family.points if p.costs["macs"] <= 0.75 * family.original["macs"]), key=lambda p: p.drop.drop
    )
    assert choose(family, "top1-drop=1", None)[0] == shares[0.3]
    middle = shares[0.5].drop.drop
    good = [p for p in family.points if p.drop.drop <= middle]
    assert choose(family, f"top1-drop={max(middle, 0)}", None)[0] == min(good, key=lambda p: p.costs["macs"])
    for text, error, message in (
        ("macs=0.01", TargetError, "no point .* meets macs=0.01: the smallest there is macs="),
        ("top5-drop=0.1", UsageError, "was measured with top1"),
        ("latency=5ms", UsageError, "does not know that cost"),
        ("params=0.2,top1-drop=0", TargetError, "no point"),
    ):
        with pytest.raises(error, match=message):
            choose(family, text, None)
    with pytest.raises(UsageError, match="go from 0 to 3"):
        choose(family, None, 9)
    with pytest.raises(UsageError, match="say which point"):
        choose(family, None, None)


def test_what_pick_refuses(family: Family, folder: Path, tmp_path: Path) -> None:
    other = onnx.load(folder / "cnn.onnx")
    other.producer_name = "another"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(PlanError, match="belongs to another model"):
        spa.pick(family, index=0, model=tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="not those that"):
        spa.pick(family, index=0, evaluate=folder / "fit.npz")
    with pytest.raises(PlanError, match="holds no frontier"):
        spa.pick(tmp_path, index=0)
    shutil.copytree(family.folder, tmp_path / "bad")
    (tmp_path / "bad" / NAME).write_text('{"version": 1, "points": [{}], "shares": []}')
    with pytest.raises(PlanError, match="is damaged"):
        spa.pick(tmp_path / "bad", index=0)
    moved = replace(family, model=str(tmp_path / "gone.onnx"))
    with pytest.raises(UsageError, match="not there any more"):
        spa.pick(moved, index=0)


def test_what_frontier_refuses(family: Family, folder: Path, tmp_path: Path) -> None:
    def ask(**more: Any) -> Family:
        return spa.frontier(folder / "cnn.onnx", **{"output": tmp_path / "new", **options(folder), **more})

    with pytest.raises(UsageError, match="holds a frontier of another model, other samples or options"):
        ask(output=family.folder, evaluate=folder / "held.npz", seed=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(OutputError, match="not empty and holds no frontier"):
        ask(output=tmp_path / "full")
    for more, message in (
        ({"shares": (1.5,)}, "--shares"),
        ({"shares": ()}, "--shares"),
        ({"calibration": None}, "a metric needs samples"),
        ({"minimise": "watts"}, "unknown cost 'watts'"),
        ({"metric": "f1"}, "unknown metric 'f1'"),
        ({"steps": 2}, "--steps"),
        ({"colour": "red"}, "unknown option 'colour'"),
    ):
        with pytest.raises(UsageError, match=message):
            ask(**more)
    assert not (tmp_path / "new").exists()


def test_more_shares_are_added(family: Family, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(family.folder, tmp_path / "copy")
    more = spa.frontier(
        folder / "cnn.onnx", output=tmp_path / "copy", shares=(0.6,), evaluate=folder / "held.npz", **options(folder)
    )
    assert [p.share for p in more.points] == [0.3, 0.5, 0.6, 0.7, 0.9]
    by_share = {p.share: p for p in more.points}
    for p in family.points:
        assert replace(by_share[p.share], index=p.index, front=p.front) == p


# -- the command line --------------------------------------------------------------------------------------------------


def command(folder: Path, out: Path, *more: object) -> list[str]:
    fixed = ["frontier", folder / "cnn.onnx", "--calibration", folder / "fit.npz", "--evaluate", folder / "held.npz"]
    return [str(a) for a in (*fixed, "--cache", folder / "cache", "-o", out, *more)]


def test_a_run_that_is_killed_goes_on(folder: Path, family: Family, tmp_path: Path) -> None:
    """kill -9 after the first point, the same command again: the family of a run that was let alone."""
    shares = "0.9,0.7,0.5,0.3,0.0001"
    arguments = [sys.executable, "-m", "spa", *command(folder, tmp_path / "out", "--shares", shares)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "out" / "plans").is_dir() and len(list((tmp_path / "out" / "plans").glob("[0-9]*.json"))) >= 1:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    left = read_family(tmp_path / "out")
    assert len(left.points) < 4
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_family(tmp_path / "out").points == family.points
    assert not list((tmp_path / "out").rglob(".*")), "nothing half written stays"


def test_frontier_and_pick_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "family"
    ran = Ran(capsys, *command(folder, out, "--shares", "0.8,0.5"))
    assert ran.status == 0, ran.err
    assert "0.5: " in ran.out
    assert "spa pick" in ran.out
    body = Ran(capsys, *command(folder, out, "--shares", "0.8,0.5", "--json")).json()
    assert [p["share"] for p in body["points"]] == [0.5, 0.8]
    assert body["complete"] is True
    page = parse((out / "frontier.html").read_text())
    check_alone(page)
    check_accessible(page)
    for p in body["points"]:
        assert f"{p['drop']['after']:.4g}" in page.text

    picked = tmp_path / "small.onnx"
    ran = Ran(
        capsys, "pick", out, "--index", "0", "-o", picked, "--plan", tmp_path / "plan.json", "--report",
        tmp_path / "page.html", "--no-latency",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "point 0: top1" in ran.out
    assert "What else could be had" in (tmp_path / "page.html").read_text()
    assert Ran(capsys, "verify", folder / "cnn.onnx", picked, "--plan", tmp_path / "plan.json").status == 0
    body = Ran(capsys, "pick", out, "--target", "macs=0.6", "-o", picked, "--json").json()
    assert body["metric"]["drop"]["samples"] == HELD
    for arguments, status, message in (
        (("--index", "7"), 2, "there is no such point"),
        ((), 2, "say which point"),
        (("--target", "macs=0.1"), 7, "no point"),
        (("--index", "0", "--model", picked), 2, "is the input"),
    ):
        ran = Ran(capsys, "pick", out, *arguments, "-o", picked)
        assert ran.status == status
        assert message in ran.err
        assert len(ran.err.splitlines()) == 1


def test_prune_with_a_metric_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "prune", folder / "cnn.onnx", "-o", tmp_path / "out.onnx", "--method", "obspa", "--compensate", "stitch",
        "--calibration", folder / "fit.npz", "--cache", folder / "cache",
    ]  # fmt: skip
    ran = Ran(capsys, *arguments, "--target", "top1-drop=0.1", "--report", tmp_path / "page.html", "--no-latency")
    assert ran.status == 0, ran.err
    assert ran.out.count("keeps to the target") >= 1
    assert "top1-drop=0.1: top1 " in ran.out
    assert "What else could be had" in (tmp_path / "page.html").read_text()
    body = Ran(capsys, *arguments, "--target", "top1-drop=0.1", "--json").json()
    assert body["metric"]["drop"]["drop"] <= 0.1
    assert len(body["metric"]["reached"]) >= 3
    for more, message in (
        (("--target", "f1-drop=0.1"), "unknown metric 'f1'"),
        (("--target", "macs=0.6", "--metric", "top1"), "--metric"),
        (("--target", "top1-drop=0.1", "--evaluate", tmp_path / "nothing.npz"), "do not exist"),
        (("--target", "perplexity-drop=1%"), "perplexity needs a model from token ids"),
    ):
        ran = Ran(capsys, *arguments, *more)
        assert ran.status == 2
        assert message in ran.err
