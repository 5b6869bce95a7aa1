"""Reading a page the way a strict stranger would, and models with names that mean harm."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import helper

from spa.budget.widths import Optimality
from spa.pipeline import Change
from spa.report import Frontier, FrontierPoint, Page, Speed
from spa.report.data import Cause, OperatorTime, Sensitivity, Timing, Width
from spa.study import Fit
from spa.verify import Verification
from tests.small_models import build, weight

VOID = {"meta", "link", "br", "input", "hr", "wbr"}
HARM = (
    "</script><img src=x onerror=alert(1)>",
    "\"><svg onload=alert(2)>'",
    "<!-- ]]> &amp; {{x}} ${x} `",
    "</title></style><script>alert(3)</script>",
)


@dataclass
class Element:
    """A node of the tree."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag: str = "") -> list[Element]:
        """Elements inside, in order; of one tag if that is given."""
        found = [e for c in self.children if isinstance(c, Element) for e in (c, *c.all())]
        return [e for e in found if not tag or e.tag == tag]

    def by_id(self, identifier: str) -> Element:
        """The element with an id."""
        (found,) = [e for e in self.all() if e.attributes.get("id") == identifier]
        return found

    def section(self, heading: str) -> Element:
        """The section with the heading of this id."""
        (found,) = [e for e in self.all("section") if e.attributes["aria-labelledby"] == heading]
        return found


class _Strict(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def parse(text: str) -> Element:
    """The tree of a page; every element is closed, in order, and nothing is there twice."""
    assert text.startswith("<!doctype html>\n<html")
    parser = _Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.root], [e.tag for e in parser.open]
    (page,) = [e for e in parser.root.children if isinstance(e, Element)]
    return page


def check_alone(page: Element) -> None:
    """The page loads nothing, and allows nothing but its own style and script."""
    elements = page.all()
    for element in elements:
        assert element.tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}, element
        for name, value in element.attributes.items():
            assert not name.startswith("on"), element
            assert name not in {"src", "srcset", "style", "data", "action", "xlink:href"}, element
            assert name != "href" or value.startswith("#"), element
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    scripts = [e for e in page.all("script") if e.attributes.get("type") != "application/json"]
    assert len(scripts) == 1
    for word in ("fetch(", "XMLHttpRequest", "innerHTML", "insertAdjacentHTML", "document.write", "eval(", "import("):
        assert word not in scripts[0].text
    (policy,) = [e for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.attributes["content"].split("; "))
    assert rules["default-src"] == "'none'"
    for rule, element in (("style-src", style), ("script-src", scripts[0])):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def check_accessible(page: Element) -> None:
    """One main heading, no level left out, references that lead somewhere, pictures that say what they show."""
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    levels = [int(e.tag[1]) for e in page.all() if e.tag in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    assert page.attributes["lang"]
    for element in page.all():
        for name in ("for", "aria-labelledby"):
            if name in element.attributes:
                assert element.attributes[name] in ids
        if element.attributes.get("href", "").startswith("#"):
            assert element.attributes["href"][1:] in ids
    for picture in page.all("svg"):
        hidden = picture.attributes.get("aria-hidden") == "true"
        assert hidden != bool(picture.attributes.get("aria-label")), picture.attributes
    for table in page.all("table"):
        assert table.all("caption")[0].text
        assert all(e.attributes.get("scope") in {"row", "col"} for e in table.all("th"))
        widths = {len(row.all("th")) + len(row.all("td")) for row in table.all("tr")}
        assert len(widths) == 1, widths


def embedded(page: Element) -> dict[str, Any]:
    """The JSON of the page's script."""
    body = json.loads(page.by_id("data").text)
    assert isinstance(body, dict)
    return body


def chain(length: int, channels: int = 8) -> onnx.ModelProto:
    """Convolutions one after the other: every one is a group of its own but the last."""
    rng = np.random.default_rng(0)
    weights, nodes, x = {}, [], "x"
    for k in range(length):
        stage = f"stage{k // 100}.block{k}"
        weights[f"{stage}.weight"] = weight(rng, channels, channels, 1, 1)
        nodes.append(helper.make_node("Conv", [x, f"{stage}.weight"], [f"conv{k}"], f"/{stage}/Conv"))
        nodes.append(helper.make_node("Relu", [f"conv{k}"], [f"relu{k}"], f"/{stage}/Relu"))
        x = f"relu{k}"
    size = ["batch", channels, 4, 4]
    return build(nodes, weights, {"x": size}, {x: size})


def harmful() -> onnx.ModelProto:
    """A chain whose every name is an attack."""
    model = chain(6)
    names: dict[str, str] = {}

    def changed(name: str) -> str:
        if name not in names:
            names[name] = f"{HARM[len(names) % len(HARM)]}{name}\u202e"
        return names[name]

    for tensor in model.graph.initializer:
        tensor.name = changed(tensor.name)
    for node in model.graph.node:
        node.name = changed(node.name)
        node.input[:] = [changed(name) for name in node.input]
        node.output[:] = [changed(name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = changed(value.name)
    return model


def speed(verdict: Any = "faster", factor: float = 1.5) -> Speed:
    return Speed(
        Timing(3.0, 2.5, 3.5),
        Timing(3.0 / factor, 1.9, 2.2),
        factor,
        factor - 0.1,
        factor + 0.1,
        0.95,
        verdict,
        "cpu",
        1,
        0,
        "1.31.0",
        "a <cpu>, 2 cores",
        24,
        (OperatorTime("Conv", "Conv", 2.0, 1.0), OperatorTime("FusedConv", "FusedConv", None, 0.25)),
        (OperatorTime("stem", "Conv", 2.0, 1.0),),
    )


def full() -> Page:
    """A page with every section."""
    return Page(
        model="in.onnx",
        output="out.onnx",
        macs=Change(6_738_415_616_123, 4_012_345_678_901),
        parameters=Change(98_765, 54_321),
        bytes=Change(400_004, 220_022),
        groups=2,
        removed_units=40,
        method="obspa",
        align=8,
        widths=(
            Width("a:channel", "channel", 64, 40, True, 5000, ""),
            Width("b:head", "head", 12, 12, False, 900, "left alone: meets a norm; --scope all prunes it"),
            Width("c:channel", "channel", 32, 16, True, 700, ""),
        ),
        causes=(Cause("graph output", "", 2, 650, ("fc.weight axis 0", "fc.bias axis 0")),),
        prunable_parameters=90_000,
        verify=Verification(True, 2.5e-6, 1.25e-7, 1e-4, 1),
        fit=Fit("photos/", 512, "", 0.0517, 0.0123, True),
        optimality=Optimality(0.5, 0.49, 0.02, 0.55, {"macs=0.6": 0.998}, 3, True),
        sensitivity=(
            Sensitivity("a:channel", "channel", 64, (16, 38), (0.011, 0.19), 24),
            Sensitivity("c:channel", "channel", 32, (8, 19), (0.0023, 0.017), 16),
        ),
        frontier=Frontier(
            "latency (ms)",
            "top-1 (%)",
            True,
            (FrontierPoint("p0", 2.0, 71.5), FrontierPoint("p1", 1.5, 70.0, True), FrontierPoint("p2", 1.8, 69.0)),
        ),
        speed=speed(),
        command="spa prune in.onnx -o out.onnx",
        settings={"targets": ["macs=0.6"], "seed": 0, "calibration": {"name": "photos/", "samples": 512}},
        versions={"spa": "0.1.0"},
        sha256_before="ab" * 32,
        sha256_after="cd" * 32,
        seconds={"load": 0.25, "plan": 1.5},
    )
