"""Lists in pages, the newest first, and the tokens that lead to the next page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, and_, or_

from spa_server.errors import invalid

__all__ = ["before", "following", "width"]

_DEFAULT = 50
_MOST = 500


def width(page_size: int) -> int:
    """Rows of a page. Raises: Refusal if the size is negative."""
    if page_size < 0:
        raise invalid("page_size", "page_size must be 0 or more")
    return min(page_size or _DEFAULT, _MOST)


def before(table: Table, token: str) -> list[ColumnElement[bool]]:
    """Conditions for the rows behind those that were listed. Raises: Refusal if the token is none of ours."""
    if not token:
        return []
    try:
        created, _, id_ = base64.urlsafe_b64decode(token.encode()).decode().partition(" ")
        at = float(created)
    except ValueError:
        raise invalid("page_token", "page_token is not one that this server gave; begin without one") from None
    return [or_(table.c.created < at, and_(table.c.created == at, table.c.id < id_))]


def following(rows: Sequence[Row[Any]], limit: int) -> str:
    """The token of the next page: empty if there are no more than `limit` rows."""
    if len(rows) <= limit:
        return ""
    last = rows[limit - 1]
    return base64.urlsafe_b64encode(f"{last.created!r} {last.id}".encode()).decode()
