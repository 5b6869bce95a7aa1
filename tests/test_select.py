"""What must hold for every choice of units, whatever the scores are."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

import spa
from spa.budget import parse_targets, select
from spa.budget.select import Selection, alignment
from spa.criteria import NORMALISATIONS, normalise
from spa.groups import Analysis, Group
from spa.options import parse_min_keep
from tests.models import BUILT

NAMES = ["residual_cnn", "flat_cnn", "unet", "shuffle_net", "vit_split", "decoder", "lstm_tagger", "qdq", "four_bits"]
Scores = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=NAMES)
def analysis(request: pytest.FixtureRequest) -> Analysis:
    return spa.analyze(BUILT[request.param].build(), dims=None)


def random_scores(analysis: Analysis, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return {g.name: rng.gamma(2.0, size=g.units) for g in analysis.groups}


def removed(selection: Selection) -> dict[str, tuple[int, ...]]:
    return {group.name: units for group, units in selection.removed}


def costs_of(analysis: Analysis, removed: dict[str, int]) -> dict[str, float]:
    """All costs, anew, when so many units leave."""
    counts = list(analysis.cost.full)
    for group in analysis.groups:
        for leaf, n in group.leaves.items():
            counts[leaf] -= n * removed.get(group.name, 0)
    left = sum(group.units - removed.get(group.name, 0) for group in analysis.groups)
    return dict(analysis.cost.totals(counts)) | {"units": left}


def met(analysis: Analysis, costs: dict[str, float], texts: str) -> bool:
    full = costs_of(analysis, {})
    return all(costs[t.metric] <= t.bound(full[t.metric]) * (1 + 1e-9) for t in parse_targets(texts))


@pytest.mark.parametrize("allocation", ["global", "uniform", "efficient", "knapsack"])
@pytest.mark.parametrize("targets", ["macs=0.7", "units=0.6", "params=0.6", "macs=0.8,params=0.5,size=0.7"])
@pytest.mark.parametrize("align", [1, 2, "auto"])
def test_laws(analysis: Analysis, allocation: str, targets: str, align: int | str) -> None:
    scores = random_scores(analysis)
    keep = parse_min_keep("2")
    assert keep is not None
    options = {"allocation": allocation, "align": align, "min_keep": keep}
    chosen = select(analysis, analysis.groups, scores, parse_targets(targets), **options)
    gone = removed(chosen)
    numbers = {name: len(units) for name, units in gone.items()}

    assert met(analysis, dict(chosen.costs), targets)
    assert dict(chosen.costs) == pytest.approx(costs_of(analysis, numbers))
    for group in analysis.groups:
        units = gone.get(group.name, ())
        left = group.units - len(units)
        step = _step(group, align, chosen)
        assert left >= min(2, group.units)
        assert not units or left % step == 0
        assert list(units) == sorted(set(units))
        survivors = sorted(set(range(group.units)) - set(units))
        if units:
            assert scores[group.name][list(units)].max() <= scores[group.name][survivors].min()
    back = {
        g.name: numbers[g.name] - _last_chunk(g, numbers[g.name], _step(g, align, chosen))
        for g in analysis.groups
        if g.name in numbers
    }
    # the last chunk of any group cannot come back; with a uniform share: those of all groups together
    for again in [back] if allocation == "uniform" else [{name: count} for name, count in back.items()]:
        assert not met(analysis, costs_of(analysis, numbers | again), targets), f"{again} overshoots"


def _step(group: Group, align: int | str, chosen: Selection) -> int:
    if align != "auto":
        return int(align)
    most = 8 if chosen.align == "auto" else int(chosen.align)
    return min(alignment(group, "auto"), most)


def _last_chunk(group: Group, count: int, step: int) -> int:
    first = group.units % step or step
    return first if count == first else step


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_uniform_share(analysis: Analysis, share: float) -> None:
    """Every group loses the same share, up to one chunk (or to what its floor allows) and one chunk put back."""
    scores = random_scores(analysis)
    chosen = select(analysis, analysis.groups, scores, parse_targets(f"macs={share}"), allocation="uniform", align=1)
    gone = {name: len(units) for name, units in removed(chosen).items()}
    shares = {g.name: gone.get(g.name, 0) / g.units for g in analysis.groups}
    top = max(shares.values())
    for group in analysis.groups:
        limit = group.units - max(1, round(0.1 * group.units))
        assert gone.get(group.name, 0) >= min(limit, int(top * group.units) - 1) - 1, shares


def test_global_ranks_across_groups() -> None:
    """With scores that say which layer matters, only the other one is cut; scaled scores change nothing."""
    analysis = spa.analyze(BUILT["two_layers"].build())
    first, second = analysis.groups
    low, high = np.linspace(0.1, 0.2, first.units), np.linspace(10, 20, second.units)
    chosen = select(analysis, analysis.groups, {first.name: low, second.name: high}, parse_targets("macs=0.7"), align=1)
    assert set(removed(chosen)) == {first.name}
    assert removed(chosen)[first.name] == tuple(range(len(removed(chosen)[first.name])))
    other = select(
        analysis, analysis.groups, {first.name: 7 * low, second.name: 7 * high}, parse_targets("macs=0.7"), align=1
    )
    assert removed(other) == removed(chosen)


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_global_with_normalisation(analysis: Analysis, how: str) -> None:
    raw = random_scores(analysis, 3)
    scores = normalise({k: 100 * v for k, v in raw.items()}, analysis.groups, how)
    chosen = select(analysis, analysis.groups, scores, parse_targets("macs=0.7"))
    assert met(analysis, dict(chosen.costs), "macs=0.7")
    for group, units in chosen.removed:
        kept = np.delete(raw[group.name], list(units))
        assert raw[group.name][list(units)].max() <= kept.min(), "normalising keeps the order within a group"


def test_nothing_to_do() -> None:
    analysis = spa.analyze(BUILT["two_layers"].build())
    chosen = select(analysis, analysis.groups, random_scores(analysis), parse_targets("macs=1.0"))
    assert chosen.removed == ()
    assert chosen.costs == chosen.original


# -- automatic values yield, given ones do not -------------------------------------------------------------------------


def test_alignment_by_width() -> None:
    analysis = spa.analyze(BUILT["decoder"].build())
    groups = {g.kind: g for g in analysis.groups}
    assert alignment(groups["neuron"], "auto") == 8
    assert alignment(groups["v-dim"], "auto") == 2
    assert alignment(groups["qk-dim"], "auto") == 1
    assert alignment(groups["head"], "auto") == 1
    assert alignment(groups["v-dim"], 16) == 16


def test_automatic_alignment_yields(analysis: Analysis) -> None:
    """A target near what is possible at all is reached with a smaller alignment, which is reported."""
    floor = costs_of(analysis, {g.name: g.units - 1 for g in analysis.groups})["macs"]
    full = costs_of(analysis, {})["macs"]
    target = f"macs={floor * 1.0001:.10g}"
    chosen = select(analysis, analysis.groups, random_scores(analysis), parse_targets(target))
    assert chosen.costs["macs"] <= floor * 1.0001
    assert chosen.align in (1, 2, 4)
    with pytest.raises(spa.TargetError, match="cannot be reached"):
        select(analysis, analysis.groups, random_scores(analysis), parse_targets(target), align=64)
    assert full > floor


@pytest.mark.parametrize(
    ("text", "units", "kind", "least"),
    [
        ("4", 100, "channel", 4), ("10%", 100, "channel", 10), ("10%", 15, "channel", 2), ("0.25", 10, "head", 3),
        ("head=2,channel=10%", 40, "channel", 4), ("head=2,channel=10%", 40, "head", 2), ("head=2", 40, "channel", 1),
        ("3,head=50%", 8, "head", 4), ("3,head=50%", 8, "neuron", 3), ("0", 8, "neuron", 1), ("0%", 8, "neuron", 1),
    ],
)  # fmt: skip
def test_min_keep(text: str, units: int, kind: str, least: int) -> None:
    rule: Callable[[Group], int] | None = parse_min_keep(text)
    assert rule is not None
    group = Group("g", kind, np.zeros((units, 1), np.int64), {}, "", (), 0, 0.0, 0.0, 0.0)
    assert rule(group) == least


@pytest.mark.parametrize("text", ["", "x", "-1", "10%%", "kind=3", "head=", "head=x", "1.5", "head=2;channel=3"])
def test_min_keep_refused(text: str) -> None:
    with pytest.raises(spa.UsageError, match="--min-keep"):
        parse_min_keep(text)


# -- what cannot be reached --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "scope"), [("macs=0.001", "exact"), ("macs=0.001,params=0.001", "all")])
@pytest.mark.parametrize("name", list(BUILT))
def test_error_names_a_reachable_point(name: str, target: str, scope: str) -> None:
    """The message names the best point, what freezes the rest, and what to try; the point is really reachable."""
    model = BUILT[name].build()
    with pytest.raises(spa.TargetError) as caught:
        spa.prune(model, target=target, scope=scope, check=False)
    text = str(caught.value)
    best = re.findall(r"the best is (\w+)=(\S+) \(([\d.]+) of the original\)", text)
    assert [metric for metric, _, _ in best] == [t.metric for t in parse_targets(target)]
    assert "try --scope all, a smaller --align or --min-keep" in text
    assert re.search(r"; .*\w axis \d \(", text), "what freezes the rest"
    for point in (
        [f"{metric}={value}" for metric, value, _ in best],
        [f"{metric}={share}" for metric, _, share in best],
    ):
        if name in ("one_zero_bias", "merged") and "params" in target:
            continue  # shared constants are written several times then: the message is off by these copies
        report = spa.prune(model, target=point, scope=scope, check=False).report
        assert report.macs.after < report.macs.before


def test_error_names_the_reason() -> None:
    with pytest.raises(
        spa.TargetError, match=r"c2\.weight axis 0 \(no rule for operator org\.example\.custom::Mystery"
    ):
        spa.prune(BUILT["custom"].build(), target="params=0.01", check=False)
    with pytest.raises(spa.TargetError, match=r"--kinds and --ignore leave none of its 2 groups"):
        spa.prune(BUILT["two_layers"].build(), target="macs=0.5", ignore=["*"])
    with pytest.raises(spa.TargetError, match=r"macs=0.1 cannot be reached: the best is macs=\S+ \(0\.2"):
        spa.prune(BUILT["two_layers"].build(), target="macs=0.1", ignore=["fc1*"])
