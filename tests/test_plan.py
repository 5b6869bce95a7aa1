"""The plan is the contract: what stands in the file, what is refused, and that nothing is lost on the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spa
from spa.pipeline import analyze
from spa.plan import Consumer, GroupRecord, Plan, Removal, read
from spa.removal import kept_by, kept_without, removals
from tests.models import BUILT

TEXT = st.text(min_size=1, max_size=12)
INDICES = st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True).map(lambda x: tuple(sorted(x)))
CONSUMERS = st.builds(Consumer, TEXT, st.integers(0, 9))
REMOVALS = st.builds(
    Removal, TEXT, st.none() | st.lists(CONSUMERS, min_size=1, max_size=3).map(tuple), st.integers(0, 5), INDICES,
)  # fmt: skip
PLANS = st.builds(
    Plan, st.text("0123456789abcdef", min_size=64, max_size=64), st.lists(REMOVALS, max_size=4).map(tuple),
    st.lists(st.builds(GroupRecord, TEXT, TEXT, st.integers(2, 99), INDICES, st.booleans()), max_size=3).map(tuple),
    st.dictionaries(TEXT, st.none() | st.integers() | st.text() | st.lists(st.text()), max_size=3), st.text(),
)  # fmt: skip


@settings(max_examples=40)
@given(PLANS)
def test_round_trip(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return spa.prune(BUILT["one_zero_bias"].build(), target="macs=0.6", scope="all", check=False).plan


def test_what_stands_in_it(plan: Plan) -> None:
    """The names that others read."""
    body = json.loads(plan.to_json())
    assert list(body) == ["version", "producer", "model", "settings", "groups", "removed"]
    assert body["version"] == 1
    assert body["producer"].startswith("spa ")
    assert list(body["model"]) == ["sha256"]
    for removal in body["removed"]:
        assert list(removal) == ["initializer", "consumers", "axis", "indices"]
    shared = [r for r in body["removed"] if r["consumers"] is not None]
    assert {r["initializer"] for r in shared} == {"zeros24"}
    assert all(list(use) == ["output", "input"] for r in shared for use in r["consumers"])
    assert body["settings"]["targets"] == ["macs=0.6"]
    assert {"criterion", "aggregation", "normalisation", "allocation", "scope", "seed", "align"} <= set(
        body["settings"]
    )
    assert all(list(g) == ["name", "kind", "units", "removed", "exact"] for g in body["groups"])


@pytest.mark.parametrize("name", list(BUILT))
def test_plans_and_masks_are_inverse(name: str) -> None:
    """Whatever leaves can be read back from the slices of the plan."""
    analysis = analyze(BUILT[name].build())
    rng = np.random.default_rng(2)
    for _ in range(4):
        chosen = [
            (g, rng.choice(g.units, int(rng.integers(0, g.units)), replace=False).tolist()) for g in analysis.groups
        ]
        kept = kept_without(analysis, chosen)
        plan = Plan("", removals(analysis, kept))
        assert (kept_by(analysis, plan, "plan") == kept).all()


# -- refused -----------------------------------------------------------------------------------------------------------


def _changed(plan: Plan, **changes: Any) -> str:
    return json.dumps(json.loads(plan.to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "it has no version"),
        ("{}", "it has no version"),
        ('{"version": "1"}', "it has no version"),
        ('{"version": 2}', "has plan version 2, expected 1"),
        ('{"version": 1}', "is not a valid plan"),
        ('{"version": 1, "model": {}, "removed": []}', "is not a valid plan"),
        ('{"version": 1, "model": {"sha256": "x"}, "removed": {"a": 1}}', "is not a valid plan"),
        ('{"version": 1, "model": {"sha256": "x"}, "removed": [{"initializer": "a"}]}', "is not a valid plan"),
        ('{"version": 1, "model": {"sha256": "x"}, "removed": [], "groups": [1]}', "is not a valid plan"),
    ],
)
def test_not_a_plan(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(spa.PlanError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(spa.PlanError, match="cannot read the plan"):
        read(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(spa.PlanError, match="cannot read the plan"):
        read(tmp_path / "binary.json")


def test_another_model(plan: Plan) -> None:
    with pytest.raises(spa.PlanError, match="belongs to another model"):
        spa.apply(BUILT["two_layers"].build(), plan)
    with pytest.raises(spa.PlanError, match="belongs to another model"):
        spa.verify(BUILT["two_layers"].build(), BUILT["two_layers"].build(), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initializer": "no.such.weight"}, "removes slices of 'no.such.weight'"),
        ({"axis": 5}, "prunes axis 5"),
        ({"axis": -1}, "axis -1"),
        ({"indices": (0, 10**6)}, "removes index 1000000"),
        ({"indices": (-1,)}, "removes index -1"),
        ({"indices": (0,)}, "cannot leave alone"),
        ({"axis": 1, "indices": (0,)}, "cannot"),
        ({"indices": ()}, "cannot leave alone"),
    ],
)
def test_impossible_slices(change: dict[str, Any], message: str) -> None:
    model = BUILT["two_layers"].build()
    plan = spa.prune(model, target="macs=0.6", check=False).plan
    first = next(r for r in plan.removed if r.initializer == "fc1.weight")
    wrong = replace(plan, removed=tuple(replace(r, **change) if r is first else r for r in plan.removed))
    with pytest.raises(spa.PlanError, match=message):
        spa.apply(model, wrong)


def test_parts_of_a_plan_are_refused() -> None:
    """Coupled slices leave together or not at all; everything of a group cannot leave."""
    model = BUILT["two_layers"].build()
    plan = spa.prune(model, target="macs=0.6", check=False).plan
    assert len(plan.removed) >= 3
    for k in range(len(plan.removed)):
        with pytest.raises(spa.PlanError, match="cannot leave alone"):
            spa.apply(model, replace(plan, removed=plan.removed[:k] + plan.removed[k + 1 :]))
    everything = tuple(
        replace(r, indices=tuple(range(64))) for r in plan.removed if r.initializer in ("fc1.weight", "fc1.bias")
    )
    everything += (Removal("fc2.weight", None, 1, tuple(range(64))),)
    with pytest.raises(spa.PlanError, match="removes all units of a layer"):
        spa.apply(model, replace(plan, removed=everything))


def test_an_empty_plan_changes_nothing(tmp_path: Path) -> None:
    model = BUILT["residual_cnn"].build()
    plan = spa.prune(model, target="macs=1.0").plan
    assert plan.removed == ()
    result = spa.apply(model, plan, check=True)
    assert result.report.macs.after == result.report.macs.before
    assert {t.name: t.raw_data for t in result.model.graph.initializer} == {
        t.name: t.raw_data for t in model.graph.initializer
    }
