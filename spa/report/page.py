"""A page about one run, from its data."""

from __future__ import annotations

from spa.report import sections
from spa.report.data import Page
from spa.report.figures import clip
from spa.report.markup import Markup, document, tag

BOUND = 6_000_000
"""Bytes that a page has at most, whatever the model."""

_WORDS = (
    ("unit", "a channel, attention head, neuron ...: the smallest part that can be removed from all tensors at once"),
    ("group", "units of layers that are coupled: removing one from one layer removes it from all of them"),
    ("exact", "removing such a unit gives what the original computes with the unit's weights set to zero"),
    ("statistic", "removing such a unit changes a mean or norm, which is then taken over what is left"),
    ("frozen", "cannot be removed without changing the inputs, the outputs or the meaning of the model"),
    (
        "multiply-accumulate (MAC)",
        "one multiplication and one addition, the work that convolutions and products consist of",
    ),
)


def render(page: Page) -> str:
    """`page` as one HTML file that needs nothing else; at most `BOUND` bytes."""
    first = sections.headline(page)
    parts = [
        sections.totals(page),
        sections.widths(page),
        sections.speed(page),
        sections.sensitivity(page),
        sections.frontier(page),
        sections.checks(page),
        sections.frozen(page),
        sections.origin(page),
        _words(),
    ]
    good = page.speed is not None and page.speed.verdict == "faster"
    files = [tag("code", clip(page.model))]
    if page.output:
        files += [Markup(" → "), tag("code", clip(page.output))]
    body = (
        tag("a", "Skip to the content", href="#before-after", class_="skip"),
        tag(
            "header",
            tag("h1", first, class_="good" if good else "plain"),
            tag("p", "Pruned with spa: ", files, class_="files"),
            sections.cards(page),
        ),
        search(),
        tag("main", parts),
    )
    return document(f"{first} - {page.model}", body, styles=("base.css", "page.css"), scripts=("page.js",))


def search() -> Markup:
    """The box that filters all tables; the script shows it."""
    return tag(
        "search",
        tag("label", "Find a layer or reason", for_="find"),
        tag("input", type="search", id="find", autocomplete="off", spellcheck="false", placeholder="layer1, Conv, ..."),
        tag("output", for_="find", id="found", aria_live="polite"),
        hidden=True,
        id="search",
    )


def _words() -> Markup:
    return sections.section("words", "Words", sections.facts(_WORDS))
