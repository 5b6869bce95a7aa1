"""HTML that is escaped by construction: text is text until `tag` makes markup of it.

Names in an ONNX file are whatever somebody wrote there. They enter a page as `str`, and every `str` is escaped; only
`Markup`, which nothing but this module and the page's own files make, is passed through. The page's security policy
forbids everything but its own style and script, both by their hashes, so that even a mistake here would not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, TypeAlias

_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")
"""Characters that show nothing, turn the direction of text, or cannot be encoded."""
_VOID = frozenset({"meta", "link", "br", "input", "hr", "wbr"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"


def escape(text: str) -> Markup:
    """`text` as HTML that shows it; characters that nobody can see become U+FFFD."""
    return text if isinstance(text, Markup) else Markup(html.escape(_ODD.sub("\N{REPLACEMENT CHARACTER}", text)))


def join(*children: Child) -> Markup:
    """Children one after the other; None is nothing."""
    out: list[str] = []
    for child in children:
        if isinstance(child, (str, int)):
            out.append(escape(str(child)) if not isinstance(child, Markup) else child)
        elif child is not None:
            out.extend(join(part) for part in child)
    return Markup("".join(out))


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element.

    Args:
        name: of the element.
        children: text, which is escaped, markup, or iterables of these.
        attributes: a trailing underscore is dropped, others become hyphens; None and False are left out.
    """
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        given.append(label if value is True else f'{label}="{escape(_number(value))}"')
    start = " ".join([name, *given])
    return Markup(f"<{start}>" if name in _VOID else f"<{start}>{join(*children)}</{name}>")


def _number(value: str | int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def data(identifier: str, body: Any) -> Markup:
    """JSON for the page's script, which no text in it can end."""
    return tag("script", Markup(literal(body)), type="application/json", id=identifier)


def literal(body: Any) -> str:
    """JSON without a character that means something to HTML, and without those that nobody can see."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def document(title: str, body: Iterable[Markup], *, styles: Iterable[str], scripts: Iterable[str]) -> str:
    """A whole page, with everything it needs inside and nothing allowed from outside.

    Args:
        title: of the window.
        body: its elements.
        styles: names of style sheets in this package.
        scripts: names of scripts in this package.
    """
    style = "".join(_resource(name) for name in styles)
    script = "".join(_resource(name) for name in scripts)
    policy = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(policy)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    page = tag("html", tag("head", head), tag("body", body, tag("script", Markup(script))), lang="en")
    return f"<!doctype html>\n{page}\n"


def _policy(policy: Mapping[str, str]) -> str:
    return "; ".join(f"{key} {value}" for key, value in policy.items())


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _resource(name: str) -> str:
    return resources.files("spa.report").joinpath(name).read_text(encoding="utf-8")
