"""The drawing of `spa inspect --html` against the groups themselves, `spa.explain`, and brute force."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

import spa
from spa.explain import explain
from spa.groups import Analysis, Member
from spa.report import chart
from spa.report.drawing import BOUND, LINE, STEP, draw
from spa.report.tracks import GROUPS, LAYERS, Layer, Name, Part, Track, Tracks, tracks
from tests.command_line import Ran
from tests.models import BUILT
from tests.pages import HARM, check_accessible, check_alone, embedded, harmful, parse
from tests.small_models import attention, cnn, stuck
from tests.zoo import MISSING, recorded

CASES = ("residual_cnn", "unet", "shuffle_net", "vit_split", "swin", "decoder", "experts", "lstm_tagger", "tied")


@pytest.fixture(scope="module", params=CASES)
def analysis(request: pytest.FixtureRequest) -> Analysis:
    return spa.analyze(BUILT[request.param].build())


def line_of(found: Tracks, node: str) -> int | None:
    return next((k for k, line in enumerate(found.lines) if isinstance(line, Layer) and line.name == node), None)


def readers(member: Member) -> list[str]:
    uses = [member.use] if member.use is not None else list(member.value.uses())
    return [node.name or "" for node, _ in uses]


def test_every_group_is_a_track_with_its_members(analysis: Analysis) -> None:
    found = tracks(analysis)
    assert [(t.name, t.kind, t.units, t.exact) for t in found.tracks] == [
        (g.name, g.kind, g.units, g.exact) for g in analysis.groups
    ]
    for track, group in zip(found.tracks, analysis.groups, strict=True):
        assert {(p.tensor, p.axis, p.role) for p in track.parts} == {(m.tensor, m.axis, m.role) for m in group.members}
    assert sorted(line for line in found.lines if isinstance(line, int)) == list(range(len(found.tracks)))
    assert all(found.lines[t.first] == k for k, t in enumerate(found.tracks))


def test_layers_join_the_tracks_of_their_weights(analysis: Analysis) -> None:
    """A weight that is produced in one group and contracted in another is a layer that joins their tracks."""
    found = tracks(analysis)
    seen = 0
    for k, group in enumerate(analysis.groups):
        for member in group.members:
            for node in readers(member):
                line = line_of(found, node)
                if line is None:
                    continue
                layer = found.lines[line]
                assert isinstance(layer, Layer)
                if member.role == "in":
                    assert k in layer.sums, (group.name, member.tensor, node)
                elif member.role == "out" and member.rank > 1 and layer.operator != "ConvTranspose":
                    assert k in (*layer.makes, *layer.passes), (group.name, member.tensor, node)
                seen += member.role in ("in", "out")
    assert seen


def test_tracks_span_the_layers_they_join(analysis: Analysis) -> None:
    found = tracks(analysis)
    joined = 0
    for line, layer in enumerate(found.lines):
        if isinstance(layer, Layer):
            for k in (*layer.sums, *layer.makes, *layer.passes):
                assert found.tracks[k].first < line <= found.tracks[k].last
                joined += 1
    assert joined


def test_columns_are_as_few_as_can_be_and_hold_one_track_at_a_time(analysis: Analysis) -> None:
    found = tracks(analysis)
    busy = [[t.column for t in found.tracks if t.first <= line <= t.last] for line in range(len(found.lines))]
    assert all(len(columns) == len(set(columns)) for columns in busy)
    assert found.columns == max(map(len, busy))


def test_a_name_drags_along_what_explain_says(analysis: Analysis) -> None:
    """Searched in the page or asked for on the command line, a tensor belongs to the same groups."""
    found = tracks(analysis)
    tensors = [n for n in found.names if n.what != "node"]
    assert len(tensors) > 5
    for name in tensors:
        expected = {part.name for axis in explain(analysis, name.text).axes for part in axis.groups}
        assert {found.tracks[k].name for k in name.tracks} == expected, name.text


def test_the_names_are_those_of_the_model() -> None:
    model = cnn()
    found = tracks(spa.analyze(model))
    assert {n.text for n in found.names if n.what == "node"} == {n.name for n in model.graph.node}
    assert {n.text for n in found.names if n.what == "weight"} == {t.name for t in model.graph.initializer}
    kinds = {n.text: n.what for n in found.names}
    assert (kinds["x"], kinds["y"], kinds["stem_relu"]) == ("input", "output", "activation")
    assert [n.what for n in found.names if n.text == "bn"] == ["node", "activation"]
    frozen = {n.text: n.frozen for n in found.names if n.frozen}
    assert frozen["fc.bias"] == ("axis 0: graph output",)
    assert all(n.frozen or n.tracks for n in found.names if n.what == "weight")


def test_what_cannot_be_pruned_gives_a_page_too() -> None:
    page = parse(chart(spa.analyze(stuck()), "m"))
    check_alone(page)
    check_accessible(page)
    if not embedded(page)["groups"]:
        assert "Nothing in this model can be pruned" in page.text


def test_the_drawing_is_that_of_the_tracks() -> None:
    analysis = spa.analyze(attention())
    found = tracks(analysis)
    page = parse(chart(analysis, "m.onnx"))
    check_alone(page)
    check_accessible(page)
    bars = [e for e in page.all("rect") if "track" in e.attributes["class"]]
    assert len(bars) == len(found.tracks)
    for bar, track in zip(bars, found.tracks, strict=True):
        top, height = float(bar.attributes["y"]), float(bar.attributes["height"])
        assert int(top // LINE) == track.first
        assert int((top + height) // LINE) == track.last
        assert int(float(bar.attributes["x"]) // STEP) == track.column
    lines = page.all("ol")[0].all("li")
    assert len(lines) == len(found.lines)
    for item, line in zip(lines, found.lines, strict=True):
        name = line.name if isinstance(line, Layer) else found.tracks[line].name
        assert name in item.text
    body = embedded(page)
    assert [g["line"] for g in body["groups"]] == [t.first for t in found.tracks]
    assert [n[0] for n in body["names"]] == [n.text for n in found.names]
    for short, track in zip(body["groups"], found.tracks, strict=True):
        parts = {(body["names"][n][0], axis, role) for n, axis, role, _ in short["parts"]}
        assert parts == {(p.tensor, p.axis, p.role) for p in track.parts}


def test_names_of_the_model_cannot_harm() -> None:
    text = chart(spa.analyze(harmful()), HARM[3])
    page = parse(text)
    check_alone(page)
    known = {e.tag for e in parse(chart(spa.analyze(cnn()), "m")).all()}
    assert {e.tag for e in page.all()} <= known
    assert any(harm in name[0] for name in embedded(page)["names"] for harm in HARM)
    assert HARM[3] in page.all("h1")[0].text


def test_a_drawing_of_any_model_is_bounded() -> None:
    evil = "<" * 3000
    count = GROUPS
    parts = tuple(Part(f"{k}{evil}", 0, "in", "") for k in range(450))
    group = Track(evil, "channel", 8, False, evil, 10, 1, 1, parts, 0, 0, 0)
    lines: list[Layer | int] = []
    groups = []
    for k in range(count):
        groups.append(dataclasses.replace(group, first=len(lines), last=len(lines) + 3, column=k % 30, parts=parts[:4]))
        lines += [k, *[Layer(evil, "Conv", (k,), (min(k + 1, count - 1),), ())] * (LAYERS // count)]
    names = tuple(Name(f"{k}{evil}", "weight", (k % count,), (evil,) * 9) for k in range(40_000))
    text = draw(Tracks(tuple(groups), tuple(lines), 30, names, 7, 9), evil[:50], "")
    assert len(text.encode()) <= BOUND
    assert "The 7 groups with fewest parameters are not drawn" in text


def test_the_largest_groups_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa.report.tracks.GROUPS", 3)
    monkeypatch.setattr("spa.report.tracks.LAYERS", 5)
    monkeypatch.setattr("spa.report.drawing._NAMES_BYTES", 700)
    analysis = spa.analyze(BUILT["vit_split"].build())
    found = tracks(analysis)
    largest = sorted((g.parameters for g in analysis.groups), reverse=True)[:3]
    assert sorted((t.parameters for t in found.tracks), reverse=True) == largest
    assert found.left_out == len(analysis.groups) - 3 > 0
    assert sum(isinstance(line, Layer) for line in found.lines) == 5
    assert found.unlisted > 0
    page = parse(chart(analysis, "m"))
    check_alone(page)
    names = embedded(page)["names"]
    assert 0 < len(names) < len(found.names)
    for note in (
        "groups with fewest",
        f"last {found.unlisted} layers",
        f"{len(found.names) - len(names)} names cannot",
    ):
        assert note in page.all("header")[0].text
    for group in embedded(page)["groups"]:
        assert all(n < len(names) for n, *_ in group["parts"])


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(cnn(), tmp_path / "m.onnx")
    ran = Ran(capsys, "inspect", tmp_path / "m.onnx", "--html", tmp_path / "m.html")
    assert ran.status == 0
    assert f"drawing: {tmp_path / 'm.html'}" in ran.out
    assert (tmp_path / "m.html").read_text(encoding="utf-8") == chart(spa.analyze(tmp_path / "m.onnx"), "m.onnx")
    assert Ran(capsys, "inspect", tmp_path / "m.onnx", "--html", tmp_path / "m.onnx").status == 2
    assert Ran(capsys, "inspect", tmp_path / "m.onnx", "--html", tmp_path / "no" / "m.html").status == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.html", "m.onnx"]


ZOO = [m for m in recorded() if m.status == "ok"][::12]


@pytest.mark.skipif(not ZOO, reason=MISSING)
@pytest.mark.parametrize("model", ZOO, ids=lambda m: m.name)
def test_recorded_models_can_be_drawn(model: object) -> None:
    analysis = spa.analyze(model.path)  # type: ignore[attr-defined]  # a parameter of pytest
    page = parse(chart(analysis, "m"))
    check_alone(page)
    body = embedded(page)
    assert len(body["groups"]) == len(analysis.groups)
    assert all(body["lines"][g["line"]] == k for k, g in enumerate(body["groups"]))
