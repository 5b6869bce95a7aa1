"""The page of `spa inspect --html`: tracks, the list of layers, and a box to search both."""

from __future__ import annotations

from spa.groups import Analysis
from spa.readable import count, share
from spa.report.figures import clip
from spa.report.markup import Child, Markup, data, document, literal, tag
from spa.report.tracks import Layer, Track, Tracks, tracks

BOUND = 20_000_000
"""Bytes that a page has at most, whatever the model."""
LINE = 28
"""Height of a line, in pixels; map.css has the same."""
STEP = 16
"""Between columns."""
_NAME = 120
"""Characters of a name."""
_TAIL = 20
"""Characters of a name that are always shown."""
_PARTS = 60_000
"""Weights listed in all ..."""
_PARTS_OF_ONE = 400
"""... and for one group."""
_NAMES_BYTES = 4_000_000
"""For names that can be searched."""
_FROZEN = 8
"""Reasons listed for a tensor."""


def chart(analysis: Analysis, model: str) -> str:
    """What is coupled with what in `model`, as one HTML file that needs nothing else; at most `BOUND` bytes."""
    exact = sum(g.exact for g in analysis.groups)
    summary = (
        f"{count(analysis.parameters)} parameters, {share(analysis.prunable_parameters, analysis.parameters)} of them "
        f"prunable; {count(analysis.macs)} multiply-accumulates; {len(analysis.groups):,} groups, {exact:,} exact."
    )
    return draw(tracks(analysis), f"What is coupled in {clip(model)}", summary)


def draw(found: Tracks, title: str, summary: str) -> str:
    """The page of `found`."""
    facts, unnamed = _data(found)
    body = (
        tag("header", tag("h1", title), tag("p", summary, class_="note"), _help(found, unnamed)),
        tag(
            "search",
            tag("label", "Find a tensor, node or group, and see what it drags along", for_="find"),
            tag(
                "input",
                type="search",
                id="find",
                autocomplete="off",
                spellcheck="false",
                placeholder="layer1, Conv ...",
            ),
            tag("output", for_="find", id="found", aria_live="polite"),
            tag("ul", id="matches", hidden=True, aria_label="Matches"),
            id="search",
            hidden=True,
        ),
        tag(
            "main",
            tag("div", tag("div", _drawing(found), class_="gutter"), _list(found), class_="map", id="map")
            if found.tracks
            else tag("p", "Nothing in this model can be pruned."),
            tag("aside", id="panel", hidden=True, aria_live="polite", aria_label="What was found"),
        ),
        data("data", facts),
    )
    return document(title, body, styles=("base.css", "map.css"), scripts=("map.js",))


def _help(found: Tracks, unnamed: int) -> list[Child]:
    notes = []
    if found.left_out:
        notes.append(
            f"The {found.left_out:,} groups with fewest parameters are not drawn; spa inspect --json has them."
        )
    if found.unlisted:
        notes.append(f"The last {found.unlisted:,} layers are not listed.")
    if unnamed:
        notes.append(f"{unnamed:,} names cannot be searched here; spa explain knows all tensors.")
    return [
        tag(
            "p",
            "Each coloured track is a group: units (channels, heads, neurons ...) that leave all its layers together. "
            "It runs from the first operator that has these units to the last. Each line of the list is a layer, from "
            "the model's input at the top to its output: ",
            tag("span", "it reads", class_="mark reads"),
            " units of one track, over which it sums, and ",
            tag("span", "makes", class_="mark makes"),
            " those of another. Choose a track or a layer to see what must change together.",
        ),
        [tag("p", note, class_="note") for note in notes],
    ]


def _x(column: int) -> int:
    return STEP // 2 + column * STEP


def _y(line: int) -> int:
    return LINE // 2 + line * LINE


def _drawing(found: Tracks) -> Markup:
    width, height = max(found.columns, 1) * STEP + 6, len(found.lines) * LINE
    bars = [
        tag(
            "rect",
            tag("title", f"{clip(t.name, 100)}: {t.units} units"),
            x=_x(t.column) - 4,
            y=_y(t.first) - 8,
            width=8,
            height=_y(t.last) - _y(t.first) + 16,
            rx=4,
            class_=f"track {_kind(t)}",
            data_g=k,
        )
        for k, t in enumerate(found.tracks)
    ]
    joints = [_joint(found, layer, line) for line, layer in enumerate(found.lines) if isinstance(layer, Layer)]
    return tag(
        "svg",
        tag("g", bars, joints, id="all"),
        tag("g", id="chosen"),
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        aria_hidden="true",
        focusable="false",
    )


def _joint(found: Tracks, layer: Layer, line: int) -> Markup:
    """A layer's line across the tracks it joins."""
    y = _y(line)
    reads, makes, passes = (
        sorted({_x(found.tracks[k].column) for k in group}) for group in (layer.sums, layer.makes, layer.passes)
    )
    ends = reads + makes + passes
    return tag(
        "g",
        tag("line", x1=min(ends), x2=max(ends), y1=y, y2=y) if min(ends) < max(ends) else None,
        [tag("circle", cx=x, cy=y, r=3.5, class_="reads") for x in reads],
        [tag("circle", cx=x, cy=y, r=4, class_="makes") for x in makes],
        [tag("circle", cx=x, cy=y, r=4, class_="makes") for x in passes],
        class_="joint",
        data_l=line,
    )


def _kind(track: Track) -> str:
    return f"k-{track.kind}" + ("" if track.exact else " statistic")


def _list(found: Tracks) -> Markup:
    return tag("ol", [_line(found, line) for line in found.lines], class_="lines", aria_label="Groups and layers")


def _line(found: Tracks, line: Layer | int) -> Markup:
    if isinstance(line, int):
        track = found.tracks[line]
        about = f"{track.units:,} units, {count(track.parameters)} parameters" + ("" if track.exact else ", statistic")
        button = tag("button", _name(track.name), tag("small", about), type="button", class_=f"group {_kind(track)}")
        return tag("li", button)
    return tag("li", tag("button", tag("small", clip(line.operator, 40)), _name(line.name), type="button"))


def _name(text: str) -> list[Child]:
    """A name in two parts: where there is no room, the first is shortened, since names differ at their ends."""
    text = clip(text, _NAME)
    cut = max(len(text) - _TAIL, 0)
    return [tag("span", text[:cut], class_="head"), tag("span", text[cut:], class_="tail")]


def _data(found: Tracks) -> tuple[dict[str, object], int]:
    """What the script needs beside the list, and how many names had no room in it."""
    names, reasons = _names(found)
    weights, nodes = (
        {name.text: k for k, name in enumerate(found.names[: len(names)]) if name.what == what}
        for what in ("weight", "node")
    )
    room = _PARTS
    groups = []
    for track in found.tracks:
        listed = [p for p in track.parts if p.tensor in weights][: min(room, _PARTS_OF_ONE)]
        room -= len(listed)
        groups.append(
            {
                "kind": track.kind,
                "units": track.units,
                "why": clip(track.why, _NAME),
                "parameters": count(track.parameters),
                "saves": f"{count(track.unit_parameters)} parameters, {count(track.unit_macs)} multiply-accumulates",
                "line": track.first,
                "parts": [[weights[p.tensor], p.axis, p.role, nodes.get(p.node, -1)] for p in listed],
                "more": len(track.parts) - len(listed),
            }
        )
    lines = [
        [list(line.sums), list(line.makes), list(line.passes)] if isinstance(line, Layer) else line
        for line in found.lines
    ]
    body = {"groups": groups, "lines": lines, "names": names, "reasons": reasons}
    return body, len(found.names) - len(names)


def _names(found: Tracks) -> tuple[list[list[object]], list[str]]:
    """Names with their tracks and the numbers of their reasons, as many as there is room for; and the reasons."""
    reasons: dict[str, int] = {}
    out: list[list[object]] = []
    room = _NAMES_BYTES
    for name in found.names:
        new = [text for text in (clip(t, 2 * _NAME) for t in name.frozen[:_FROZEN]) if text not in reasons]
        numbers = [reasons.setdefault(clip(t, 2 * _NAME), len(reasons)) for t in name.frozen[:_FROZEN]]
        entry: list[object] = [clip(name.text, _NAME), name.what, list(name.tracks), numbers]
        room -= len(literal([entry, new]).encode("utf-8"))
        if room < 0:
            break
        out.append(entry)
    return out, list(reasons)
