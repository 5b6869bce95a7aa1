"""Latency tables: what is measured is explained by widths, and predicts other widths."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from spa.errors import UsageError
from spa.graph import Graph, load
from spa.groups import Analysis
from spa.latency import device
from spa.latency.align import near_hull, worthwhile
from spa.latency.design import Configuration, configurations, step_of, widths_of
from spa.latency.kit import SCRIPT, emit
from spa.latency.observe import observed
from spa.latency.predict import extended, predicted, residual
from spa.latency.profile import imported, profile
from spa.latency.sizes import Widths, counts_of
from spa.latency.surface import Surface, alignments, monotone
from spa.latency.table import Operator, Table, read
from spa.pipeline import analyze
from tests.latency_device import Law, blocked, measured, milliseconds, smooth
from tests.models import BUILT

# -- surfaces ----------------------------------------------------------------------------------------------------------


def product(sizes: Any) -> Any:
    return 3.0 + 0.5 * sizes[:, 0] + 0.01 * sizes[:, 0] * sizes[:, 1]


def stairs(sizes: Any) -> Any:
    padded = -(-sizes // 16) * 16
    return 2.0 + 0.02 * padded[:, 0] * padded[:, 1] + 0.3 * sizes[:, 0] * (sizes[:, 0] % 16 != 0)


@pytest.mark.parametrize("law", [product, stairs])
def test_surfaces_predict_what_was_not_measured(law: Any) -> None:
    rng = np.random.default_rng(0)
    points = np.unique(8 * rng.integers(1, 25, (60, 2)), axis=0)
    surface = Surface(points, law(points) * (1 + 0.01 * rng.standard_normal(len(points))))
    others = 8 * rng.integers(2, 25, (200, 2))
    errors = np.abs(surface.at([tuple(p) for p in others.tolist()]) / law(others) - 1)
    assert np.median(errors) < 0.02
    assert errors.max() < 0.1


def test_equal_points_are_repeated() -> None:
    """Where there are samples, their values count, whatever the fit says."""
    points = np.array([[16], [32], [48], [64]])
    values = np.array([1.0, 5.0, 5.1, 20.0])
    assert Surface(points, values).at([(16,), (32,), (48,), (64,)]) == pytest.approx(values, rel=0.25)


def test_monotone_repair() -> None:
    rng = np.random.default_rng(1)
    points = np.unique(16 * rng.integers(1, 8, (40, 2)), axis=0)
    noisy = points.sum(axis=1) * (1 + 0.3 * rng.standard_normal(len(points)))
    repaired = monotone(points, noisy)
    for a, x in zip(points, repaired, strict=True):
        above = (points >= a).all(axis=1)
        assert (repaired[above] >= x - 1e-12).all()
    assert np.array_equal(monotone(points, repaired), repaired)


def test_repair_does_not_mix_alignments() -> None:
    """12 channels may take longer than 16."""
    points, values = np.array([[12], [16]]), np.array([5.0, 3.0])
    assert alignments(points).tolist() == [[4], [16]]
    assert monotone(points, values).tolist() == [5.0, 3.0]


def test_the_residual_line_ignores_a_slow_moment() -> None:
    sums = np.linspace(1, 3, 20)
    times = 0.2 + 0.9 * sums
    times[4] *= 3
    assert residual(sums, times) == pytest.approx((0.2, 0.9), rel=0.02)


# -- from widths to sizes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cnn() -> tuple[Graph, Analysis]:
    graph = load(BUILT["residual_cnn"].build())
    return graph, analyze(graph)


def test_sizes_follow_widths(cnn: tuple[Graph, Analysis]) -> None:
    _, analysis = cnn
    chosen = configurations(analysis.groups, 16)
    widths = Widths(analysis, [c.widths for c in chosen])
    group = next(g for g in analysis.groups if g.units == 64)
    row = np.array([c.widths.get(group.name, group.units) for c in chosen])
    for seen in (row, 9 * row, -(-row // 16) * 16, np.where(np.arange(len(row)) % 3, row, 0)):
        found = widths.followed(seen)
        assert found is not None
        follows, values = found
        assert values[0] == (9 * 64 if seen[0] == 9 * 64 else 64)
        assert follows.of(64) == values[0]
        assert (values % row == 0).all()
    rng = np.random.default_rng(0)
    assert widths.followed(np.full(len(row), 7)) is None
    assert widths.followed(rng.permutation(row)) is None


def test_designs_meet_all_widths_with_all_neighbours(cnn: tuple[Graph, Analysis]) -> None:
    _, analysis = cnn
    chosen = [c for c in configurations(analysis.groups, 40) if c.name.startswith("random")]
    for group in analysis.groups:
        levels = widths_of(group)
        counts = [sum(c.widths[group.name] == w for c in chosen) for w in levels]
        assert max(counts) - min(counts) <= 1
        assert all(w % step_of(group) == 0 for w in levels[:-1])
        assert levels[-1] == group.units


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [smooth, blocked])
@pytest.mark.parametrize("name", ["residual_cnn", "flat_cnn", "unet"])
def test_tables_predict_other_widths(name: str, law: Law) -> None:
    """On a device that is a formula, with a profiler that takes time and a machine that changes its speed."""
    graph = load(BUILT[name].build())
    analysis = analyze(graph, dims={"n": 1})
    chosen = configurations(analysis.groups, 40)
    result = measured(graph, analysis, chosen, law, rest=0.0, clock=1.5, noise=0.02, speed=0.5)
    table = observed(result, analysis, graph.sha256)
    cost = extended(analysis, predicted(table, graph.sha256, analysis).terms).cost
    others = [c for c in configurations(analysis.groups, 30, seed=9) if c.name.startswith(("random", "share"))]
    dense = Configuration("dense", {})
    true = np.array([milliseconds(graph, analysis, c.widths, law, 0.0) for c in (dense, *others)])
    guess = np.array([cost.totals(counts_of(analysis, c.widths))["latency"] for c in (dense, *others)])
    true, guess = true / true[0], guess / guess[0]  # which of the speeds counts is arbitrary
    errors = np.abs(guess / true - 1)
    assert true.max() > 1.5 * true.min()
    assert np.median(errors) < 0.05, errors.round(3)
    assert errors.max() < 0.2, errors.round(3)


def test_latency_is_a_cost_like_others(cnn: tuple[Graph, Analysis]) -> None:
    graph, analysis = cnn
    table = observed(measured(graph, analysis, configurations(analysis.groups, 12), blocked), analysis, graph.sha256)
    cost = extended(analysis, predicted(table, graph.sha256, analysis).terms).cost
    assert "latency" not in analysis.cost.totals(analysis.cost.full)
    counts = list(cost.full)
    group = max(analysis.groups, key=lambda g: g.units)
    gone = np.array([0.0, 8.0, 20.0])
    tried = {leaf: counts[leaf] - n * gone for leaf, n in group.leaves.items()}
    swept = cost.sweep(counts, tried, ["latency", "macs"])
    for k, units in enumerate(gone.astype(int).tolist()):
        new = {leaf: counts[leaf] - n * units for leaf, n in group.leaves.items()}
        left = [new.get(leaf, count) for leaf, count in enumerate(counts)]
        change = cost.change(counts, new)
        for metric in ("latency", "macs"):
            difference = cost.totals(left)[metric] - cost.totals(counts)[metric]  # type: ignore[index]  # names of metrics
            assert change[metric] == pytest.approx(difference)  # type: ignore[index]  # names of metrics
            values = np.asarray(swept[metric])  # type: ignore[index]  # names of metrics
            assert values[k] - values[0] == pytest.approx(difference, abs=1e-9)


def test_tables_are_kept_and_joined(cnn: tuple[Graph, Analysis], tmp_path: Path) -> None:
    graph, analysis = cnn
    table = observed(measured(graph, analysis, configurations(analysis.groups, 8), smooth), analysis, graph.sha256)
    table.write(tmp_path / "t.json")
    assert read(tmp_path / "t.json") == table
    other = load(BUILT["unet"].build())
    second = observed(measured(other, (a := analyze(other)), configurations(a.groups, 8), smooth), a, other.sha256)
    both = table.joined(second)
    assert set(both.models) == {graph.sha256, other.sha256}
    assert set(both.operators) == {*table.operators, *second.operators}
    assert table.joined(table).operators.keys() == table.operators.keys()
    with pytest.raises(UsageError, match="threads 1 instead of 2"):
        table.joined(Table(replace(table.key, threads=2)))
    with pytest.raises(UsageError, match="no measurements of this model"):
        predicted(table, other.sha256, a)


def test_samples_are_pooled() -> None:
    a = Operator(((8,), (16,)), (1.0, 2.0), (1, 1))
    b = Operator(((16,), (32,)), (5.0, 4.0), (3, 1))
    assert a.joined(b) == Operator(((8,), (16,), (32,)), (1.0, 4.25, 4.0), (1, 4, 1))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "operators": {}}', '{"format": 9}'])
def test_damaged_tables_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match=r"t\.json is not a (valid )?latency table"):
        read(tmp_path / "t.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "missing.json")


@pytest.mark.parametrize("damage", ["records", "key", "about", "format"])
def test_damaged_results_are_refused(cnn: tuple[Graph, Analysis], damage: str, tmp_path: Path) -> None:
    graph, analysis = cnn
    result = measured(graph, analysis, configurations(analysis.groups, 4), smooth)
    del result[damage]
    (tmp_path / "r.json").write_text(json.dumps(result))
    with pytest.raises(UsageError, match=r"r\.json: the result is damaged"):
        imported(tmp_path / "r.json", graph, analysis)


def test_results_must_be_whole_and_of_this_model(cnn: tuple[Graph, Analysis]) -> None:
    graph, analysis = cnn
    result = measured(graph, analysis, configurations(analysis.groups, 4), smooth)
    with pytest.raises(UsageError, match="another model"):
        observed(result, analysis, "0" * 64)
    result["records"] = [r for r in result["records"] if r["id"] != "random2"]
    with pytest.raises(UsageError, match="lacks 1 of"):
        observed(result, analysis, graph.sha256)


# -- widths that are worth having --------------------------------------------------------------------------------------


def test_near_hull() -> None:
    widths = np.array([4, 8, 12, 16])
    assert near_hull(widths, np.array([3.0, 6.0, 11.0, 10.0])).tolist() == [True, True, False, True]
    assert near_hull(widths, np.array([1.0, 2.0, 3.0, 4.0])).all()
    assert near_hull(widths, np.array([4.0, 4.0, 4.0, 4.0])).all()  # nothing to gain: no width is better
    assert near_hull(widths, np.array([4.0, 4.2, 4.2, 4.0])).tolist() == [True, False, False, True]


def test_padded_kernels_leave_their_multiples(cnn: tuple[Graph, Analysis]) -> None:
    graph, analysis = cnn
    table = observed(measured(graph, analysis, configurations(analysis.groups, 40), blocked), analysis, graph.sha256)
    cost = extended(analysis, predicted(table, graph.sha256, analysis).terms).cost
    group = next(g for g in analysis.groups if g.name.startswith("block.conv1") and g.units == 32)
    assert worthwhile(cost, [group])[group.name][-2:] == (16, 32)
    table = observed(measured(graph, analysis, configurations(analysis.groups, 40), smooth), analysis, graph.sha256)
    cost = extended(analysis, predicted(table, graph.sha256, analysis).terms).cost
    assert worthwhile(cost, [group])[group.name] == (8, 16, 24, 32)


# -- the device --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, cnn: tuple[Graph, Analysis]) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    chosen = [c for c in configurations(cnn[1].groups, 6) if not c.name.startswith("align")]
    emit(folder, *cnn, chosen)
    return folder


def test_kits_hold_no_weights(kit: Path, cnn: tuple[Graph, Analysis]) -> None:
    for path in kit.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert all(len(t.raw_data) <= 4096 for t in model.graph.initializer)
        outside = any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
        assert outside or path.stem != device.DENSE  # narrow ones may have no large weight
    assert not any(p.suffix == ".data" for p in kit.iterdir())


def test_a_kit_needs_onnxruntime_and_numpy_only(kit: Path, cnn: tuple[Graph, Analysis], tmp_path: Path) -> None:
    """Run as a script in a process that cannot see this package; its result makes a table."""
    output = tmp_path / "result.json"
    code = (
        "import sys, runpy; sys.argv[1:] = ['--threads', '1', '--passes', '1', '--seconds', '0.01', '-o', sys.argv[2]];"
        f"runpy.run_path({str(kit / SCRIPT)!r}, run_name='measure').pop('main')();"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('spa', 'onnx', 'onnx_ir', 'scipy')]"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, "x", str(output)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    graph, analysis = cnn
    table = imported(output, graph, analysis)
    assert table.key.provider == "cpu"
    assert table.key.batch == 1
    found = table.models[graph.sha256]
    assert found.configurations[0] == {}
    assert len(found.milliseconds) == len(json.loads((kit / "kit.json").read_text())["models"])
    assert {"Conv", "Gemm"} <= {name.split("(")[0] for name in table.operators}
    assert not output.with_name("result.json.journal").exists()


def test_a_stopped_run_goes_on(kit: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    class Killed(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    options: dict[str, Any] = {"threads": 1, "passes": 1, "seconds": 0.01, "journal": journal}
    with pytest.raises(Killed):
        device.measure(kit, progress=stop, **options)
    with open(journal, "a") as file:
        file.write('{"pass": 0, "id": "torn')
    before = [json.loads(line) for line in journal.read_text().splitlines()[1:-1]]
    seen: list[int] = []
    result = device.measure(kit, progress=lambda done, total: seen.append(done), **options)
    assert result["records"][: len(before)] == before
    assert seen[0] == len(before) == 3
    assert len({r["id"] for r in result["records"]}) == len(result["records"]) == seen[-1]
    again = device.measure(kit, progress=lambda done, total: None, **options)
    assert again == result  # nothing is measured twice


def test_a_journal_of_another_run_is_not_used(kit: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    options: dict[str, Any] = {"threads": 1, "passes": 1, "seconds": 0.01, "journal": journal}
    device.measure(kit, **options)
    text = journal.read_text()
    for other, found in ((text, text.count('"pass"')), (text.replace('"threads": 1', '"threads": 2'), 0)):
        journal.write_text(other)
        seen: list[int] = []
        device.measure(kit, progress=lambda done, total: seen.append(done), **options)  # noqa: B023  # called here
        assert seen[0] == found


def test_profiles_of_models_with_nothing_to_prune(tmp_path: Path) -> None:
    from tests.small_models import stuck

    graph = load(stuck())
    with pytest.raises(UsageError, match="nothing in this model can be pruned"):
        profile(graph, analyze(graph), tmp_path / "work")


def test_configurations_are_named_once(cnn: tuple[Graph, Analysis]) -> None:
    names = [c.name for c in configurations(cnn[1].groups)]
    assert len(set(names)) == len(names)
    assert names[0] == device.DENSE
    assert configurations(cnn[1].groups)[0] == Configuration(device.DENSE, {})
