"""Pages in a real browser: nothing complains, nothing loads, nothing sticks out, search finds, contrast is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import spa
from spa.report import chart, gather, render
from tests.browser import Browser, browser
from tests.models import BUILT
from tests.pages import HARM, chain, full, harmful
from tests.small_models import cnn
from tests.zoo import MISSING, ROOT

CONTRAST = """
(() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const { rgb, a } = parse(getComputedStyle(e).backgroundColor);
      if (a === 1) return rgb;
    }
    return parse(getComputedStyle(document.body).backgroundColor).rgb;
  };
  const out = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest("svg, script") || !e.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color).rgb), light(behind(e))].sort((x, y) => y - x);
    out.push([(a + 0.05) / (b + 0.05), e.tagName + "." + e.className + ": " + e.textContent.slice(0, 40)]);
  }
  return out.sort((x, y) => x[0] - y[0]).slice(0, 3).concat([[out.length, "count"]]);
})()
"""
"""The texts with the least contrast (WCAG 2, relative luminance), and how many texts there are."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by name: reports and drawings, of ordinary, large and malicious models."""
    folder = tmp_path_factory.mktemp("pages")
    texts = {"report": render(full())}
    for name, model in (("cnn", cnn()), ("evil", harmful()), ("vit", BUILT["vit_split"].build()), ("chain", chain(31))):
        onnx.save(model, folder / f"{name}.onnx")
        analysis = spa.analyze(folder / f"{name}.onnx")
        texts[f"map-{name}"] = chart(analysis, f"{name}.onnx")
        result = spa.prune(folder / f"{name}.onnx", target="macs=0.8", output=folder / f"{name}-out.onnx")
        result = dataclasses.replace(
            result, curves={g.name: np.linspace(0.01, 1, g.units + 1) for g in analysis.groups}
        )
        title = f"{HARM[0]}{HARM[3]}" if name == "evil" else name
        texts[f"report-{name}"] = render(gather(result, model=title, command=title))
    analysis = spa.analyze(chain(1201))
    assert len(analysis.groups) == 1200
    texts["map-large"] = chart(analysis, "large.onnx")
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


TRAINED = ("resnet56_cifar10_bn", "deit_tiny_patch16_224_imagenet", "stories260K_rotate_half_ts")
NAMES = ("report", "report-cnn", "report-evil", "report-vit", "map-cnn", "map-evil", "map-vit", "map-large")


def type_in(page: Browser, text: str) -> None:
    page.run(
        f"(() => {{ const box = document.getElementById('find'); box.value = {text!r};"
        " box.dispatchEvent(new Event('input')); })()"
    )
    page.run("new Promise(done => setTimeout(done, 200))")


def press(page: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
    page.run("new Promise(done => setTimeout(done, 50))")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_complains_loads_or_sticks_out(chromium: Browser, pages: dict[str, Path], name: str) -> None:
    for width, dark in ((360, False), (768, True)) if name != "map-large" else ((360, True),):
        chromium.open(pages[name], width, dark=dark)
        assert chromium.complaints() == []
        assert chromium.requests() == [pages[name].resolve().as_uri()]
        assert chromium.run("document.documentElement.scrollWidth <= window.innerWidth"), width
        assert not any(e.get("method") == "Page.javascriptDialogOpening" for e in chromium.events)
        assert chromium.run("document.images.length") == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report", "map-vit"])
def test_text_has_contrast(chromium: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    chromium.open(pages[name], dark=dark)
    if name == "map-vit":
        chromium.run("document.querySelectorAll('.lines button')[3].click()")
    *worst, (count, _) = chromium.run(CONTRAST)
    assert count > 30
    assert worst[0][0] >= 4.5, worst


@pytest.mark.parametrize("name", ["report", "map-cnn"])
def test_it_prints(chromium: Browser, pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    chromium.open(pages[name], dark=True)
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    ink, paper = chromium.run(
        "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; })()"
    )
    assert (ink, paper) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")  # also where the screen is dark
    assert not chromium.run("document.getElementById('find').checkVisibility()")


def test_the_report_can_be_searched(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["report"])
    rows = chromium.run("document.querySelectorAll('.search tbody tr').length")
    shown = "[...document.querySelectorAll('.search tbody tr')].filter(r => !r.classList.contains('out')).length"
    assert chromium.run(shown) == rows > 5
    type_in(chromium, "C:CHANNEL exact")
    assert chromium.run("document.getElementById('found').value") == f"1 of {rows} rows match"
    assert chromium.run(shown) == 1
    chromium.run("document.getElementById('find').focus()")
    press(chromium, "Escape")
    assert chromium.run(shown) == rows
    assert chromium.run("document.getElementById('found').value") == ""


def test_a_match_in_a_folded_table_is_unfolded(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["report-chain"])
    folded = "[...document.querySelectorAll('.search details')].map(d => d.open)"
    assert not any(chromium.run(folded))
    name = chromium.run("document.querySelector('.search details code').textContent")
    type_in(chromium, name)
    assert any(chromium.run(folded))
    found = chromium.run("[...document.querySelectorAll('details[open] tr:not(.out) code')].map(c => c.textContent)")
    assert name in found
    type_in(chromium, "")
    assert not any(chromium.run(folded))


def test_the_drawing_shows_what_a_tensor_drags_along(chromium: Browser, pages: dict[str, Path]) -> None:
    """`expand.weight` of the test network is coupled with exactly these (see tests/test_explain.py)."""
    chromium.open(pages["map-cnn"])
    type_in(chromium, "depth.weight")
    chromium.run("document.getElementById('find').focus()")
    press(chromium, "Enter")
    assert chromium.run("document.querySelector('#panel h2').textContent") == "depth.weight"
    titles = chromium.run("[...document.querySelectorAll('#panel h3')].map(e => e.textContent)")
    assert titles == ["expand:channel"]
    parts = chromium.run("[...document.querySelectorAll('#panel li button')].map(e => e.textContent)")
    assert set(parts) == {
        "expand.weight", "expand.bias", "depth.weight", "depth.bias", "project.weight", "expand", "depth", "project",
    }  # fmt: skip
    lit = chromium.run("[...document.querySelectorAll('.lines li.on')].map(e => e.textContent)")
    assert [text for text in lit if "channel" in text] == [next(t for t in lit if t.startswith("expand:channel"))]
    assert {text for text in lit if "channel" not in text} == {"Convexpand", "Convdepth", "Convproject"}
    assert chromium.run("document.querySelectorAll('#chosen .track').length") == 1
    chromium.run("document.getElementById('close').click()")
    assert chromium.run("document.getElementById('panel').hidden")
    assert chromium.run("document.querySelectorAll('.on, #chosen > *').length") == 0
    assert chromium.complaints() == []


def test_what_is_frozen_says_why(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["map-cnn"])
    type_in(chromium, "fc.bias")
    chromium.run("document.querySelector('#matches button').click()")
    said = chromium.run("document.getElementById('panel').textContent")
    assert "This weight is in no group: nothing of it can be pruned." in said
    assert "Frozen, axis 0: graph output" in said
    type_in(chromium, "no such thing")
    assert chromium.run("document.getElementById('matches').textContent") == "no such name"


def test_malicious_names_are_shown_as_text(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["map-evil"])
    for harm in HARM:
        type_in(chromium, harm.split()[0][:12])
        chromium.run("document.querySelector('#matches button')?.click()")
    chromium.run("document.querySelectorAll('.lines button').forEach(b => b.click())")
    assert any(harm in chromium.run("document.querySelector('#panel').textContent") for harm in HARM)
    assert chromium.run("document.querySelectorAll('img, #panel svg, #panel script').length") == 0
    assert chromium.complaints() == []


def test_a_large_drawing_is_quick(chromium: Browser, pages: dict[str, Path]) -> None:
    """1,200 groups: there in less than two seconds, and a choice in less than one."""
    chromium.open(pages["map-large"])
    assert 0 < chromium.worked() < 2
    took = chromium.run(
        "(() => { const start = performance.now(); document.querySelectorAll('.lines button')[900].click();"
        " document.body.getBoundingClientRect(); return performance.now() - start; })()"
    )
    assert took < 1000, took  # 30 ms where nothing else runs
    assert chromium.run("document.querySelectorAll('.lines li.on').length") >= 2
    type_in(chromium, "stage11.block1150")
    chromium.run("document.getElementById('find').focus()")
    press(chromium, "Enter")
    assert chromium.run("document.querySelector('#panel h2').textContent").startswith("stage11.block1150")
    place = chromium.run("document.querySelector('.lines li.on').getBoundingClientRect().top")
    assert 0 < place < 900


@pytest.mark.skipif(not (ROOT / "data" / "models").is_dir(), reason=MISSING)
@pytest.mark.parametrize(
    "model", ["resnet56_cifar10_bn", "deit_tiny_patch16_224_imagenet", "stories260K_rotate_half_ts"]
)
def test_trained_models_can_be_drawn(chromium: Browser, model: str, tmp_path: Path) -> None:
    path = ROOT / "data" / "models" / f"{model}.onnx"
    if not path.is_file():
        pytest.skip(MISSING)
    (tmp_path / "map.html").write_text(chart(spa.analyze(path), path.name), encoding="utf-8")
    for width in (360, 1280):
        chromium.open(tmp_path / "map.html", width)
        assert 0 < chromium.worked() < 2
        assert chromium.complaints() == []
        assert chromium.run("document.documentElement.scrollWidth <= window.innerWidth")
