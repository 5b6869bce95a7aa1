"""The data of a page, and its pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest

import spa
from spa.errors import UsageError
from spa.report import Frontier, FrontierPoint, Page, figures, gather, render
from spa.report.data import Width
from spa.study import Fit
from tests.pages import check_accessible, full, parse, speed
from tests.small_models import cnn

# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_frontier_joins_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    for higher in (True, False):
        points = [FrontierPoint(str(k), float(c), float(q)) for k, (c, q) in enumerate(rng.integers(0, 12, (60, 2)))]
        sign = 1 if higher else -1
        undominated = {
            (p.cost, p.quality)
            for p in points
            if not any(
                o.cost <= p.cost and sign * o.quality >= sign * p.quality and (o.cost, o.quality) != (p.cost, p.quality)
                for o in points
            )
        }
        best = figures.best_of(points, higher)
        assert {(p.cost, p.quality) for p in best} == undominated
        assert [p.cost for p in best] == sorted(p.cost for p in best)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 7.0], [1e12, 1.0], [71.2, 71.3, 71.25]])
def test_a_frontier_of_any_numbers_can_be_drawn(values: list[float]) -> None:
    points = tuple(FrontierPoint(f"p{k}", v, -v, k == 0) for k, v in enumerate(values))
    page = parse(render(dataclasses.replace(full(), frontier=Frontier("cost", "quality", False, points))))
    circles = page.section("frontier").all("circle")
    assert len(circles) == len(values)
    assert all(0 <= float(c.attributes["cx"]) <= 340 and 0 <= float(c.attributes["cy"]) <= 240 for c in circles)
    assert page.section("frontier").all("text")


def test_points_that_are_no_numbers_are_listed_and_not_drawn() -> None:
    points = (FrontierPoint("a", 1.0, math.nan), FrontierPoint("b", 2.0, 3.0), FrontierPoint("c", math.inf, 1.0))
    page = parse(render(dataclasses.replace(full(), frontier=Frontier("cost", "quality", True, points))))
    assert len(page.section("frontier").all("circle")) == 1
    assert len(page.section("frontier").all("tbody")[0].all("tr")) == 3
    none = (FrontierPoint("a", math.nan, 1.0),)
    check_accessible(parse(render(dataclasses.replace(full(), frontier=Frontier("cost", "quality", True, none)))))


def test_many_groups_share_bars_that_keep_the_mean() -> None:
    widths = [Width(f"g{k}", "channel", 10 + k % 3, k % 5, True, 1, "") for k in range(1000)]
    figure = figures.skyline(widths, "channel")
    bars = re.findall(r"<g>.*?</g>", figure)
    assert len(bars) == 200
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="after"', figure)]
    assert np.mean(heights) == pytest.approx(100 * np.mean([w.after for w in widths]) / 12, rel=1e-4)
    assert "mean of up to 5 groups" in figure


# -- data --------------------------------------------------------------------------------------------------------------


def test_the_data_survive_json() -> None:
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    result = spa.prune(cnn(), target="macs=0.6", method="obspa", allocation="knapsack", calibration={"x": x})
    assert result.report.optimality is not None
    for page in (full(), gather(result, model="m", speed=speed()), dataclasses.replace(full(), align="auto")):
        again = Page.from_json(json.loads(json.dumps(page.to_json(), allow_nan=False)))
        assert again == page
        assert render(again) == render(page)


def test_numbers_that_json_lacks_come_back_as_nan() -> None:
    page = dataclasses.replace(full(), fit=Fit("x", 1, "", math.nan, math.inf, False))
    again = Page.from_json(json.loads(json.dumps(page.to_json(), allow_nan=False)))
    assert again.fit is not None
    assert math.isnan(again.fit.error_before)
    assert math.isnan(again.fit.error_after)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("version",), 0, "version 1"),
        (("macs",), None, "data.macs"),
        (("macs", "before"), "many", "data.macs.before"),
        (("macs", "before"), True, "data.macs.before"),
        (("widths", 1, "units"), None, ""),
        (("widths", 1, "name"), 3, "data.widths[1].name"),
        (("speed", "verdict"), "splendid", "data.speed"),
        (("seconds", "load"), "long", "data.seconds.load"),
        (("causes",), {}, "data.causes"),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(place: tuple[Any, ...], value: Any, said: str) -> None:
    body = full().to_json()
    spot = body
    for step in place[:-1]:
        spot = spot[step]
    spot[place[-1]] = value
    if not said:
        assert Page.from_json(body, "data") == full()  # fields may be added
        return
    with pytest.raises(UsageError, match=re.escape(said)):
        Page.from_json(body, "data")


def test_a_missing_field_is_named() -> None:
    body = full().to_json()
    del body["macs"]["after"]
    with pytest.raises(UsageError, match=r"data\.macs: after is missing"):
        Page.from_json(body, "data")
    with pytest.raises(UsageError, match="is not the data of a report"):
        Page.from_json([], "data")
