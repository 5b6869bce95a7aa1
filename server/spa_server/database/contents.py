"""Which contents there are, who has them, and what nobody needs any more.

The order of steps makes sure that no row promises bytes that are not stored, and no stored bytes are without a row:
`announce`, store the bytes, `confirm`; and to get rid of them: mark the row, then remove the bytes and the row while
the row is locked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from sqlalchemy import Connection, and_, delete, exists, func, insert, select, update

from spa_server.database.engine import Database
from spa_server.database.tables import blobs, files, holdings

__all__ = ["announce", "confirm", "forget", "has", "hold", "sizes", "sweep", "used"]


def has(database: Database, owner: str, sha256: str) -> bool:
    """Whether `owner` has these bytes here; if so they stay for a while."""
    with database.write() as connection:
        held = and_(holdings.c.owner == owner, holdings.c.sha256 == sha256)
        return connection.execute(update(holdings).where(held).values(touched=time.time())).rowcount > 0


def sizes(connection: Connection, owner: str, digests: Sequence[str]) -> dict[str, int]:
    """Sizes of those contents among `digests` that `owner` has; they are not forgotten before the transaction ends."""
    out: dict[str, int] = {}
    for start in range(0, len(digests), 500):  # databases limit how many parameters a query has
        part = digests[start : start + 500]
        held = and_(holdings.c.owner == owner, holdings.c.sha256.in_(part))
        connection.execute(update(holdings).where(held).values(touched=time.time()))
        query = select(blobs.c.sha256, blobs.c.size).join(holdings, holdings.c.sha256 == blobs.c.sha256)
        rows = connection.execute(query.where(holdings.c.owner == owner, blobs.c.sha256.in_(part)))
        out.update({row.sha256: row.size for row in rows})
    return out


def used(connection: Connection, owner: str) -> int:
    """Bytes of all contents of `owner`."""
    query = select(func.coalesce(func.sum(blobs.c.size), 0)).join(holdings, holdings.c.sha256 == blobs.c.sha256)
    return int(connection.execute(query.where(holdings.c.owner == owner)).scalar_one())


def announce(database: Database, sha256: str, size: int) -> bool:
    """Say that these bytes will be stored; whether they are already."""
    with database.write() as connection:
        mine = blobs.c.sha256 == sha256
        if connection.execute(update(blobs).where(mine).values(touched=time.time())).rowcount:
            return bool(connection.execute(select(blobs.c.stored).where(mine)).scalar_one())
        connection.execute(insert(blobs).values(sha256=sha256, size=size, stored=False, touched=time.time()))
        return False


def confirm(database: Database, owner: str, sha256: str) -> None:
    """Say that they are stored, and that `owner` has them."""
    with database.write() as connection:
        connection.execute(update(blobs).where(blobs.c.sha256 == sha256).values(stored=True, touched=time.time()))
        hold(connection, owner, sha256)


def hold(connection: Connection, owner: str, sha256: str) -> None:
    """`owner` has these bytes from now on."""
    held = and_(holdings.c.owner == owner, holdings.c.sha256 == sha256)
    if not connection.execute(update(holdings).where(held).values(touched=time.time())).rowcount:
        connection.execute(insert(holdings).values(owner=owner, sha256=sha256, touched=time.time()))


def forget(connection: Connection, owner: str, digests: Iterable[str]) -> None:
    """`owner` does not have these bytes any more, except where something of theirs still needs them."""
    for sha256 in set(digests):
        needed = exists().where(files.c.owner == owner, files.c.sha256 == sha256)
        connection.execute(delete(holdings).where(holdings.c.owner == owner, holdings.c.sha256 == sha256, ~needed))


def sweep(database: Database, remove: Callable[[str], None], unused: float, grace: float) -> int:
    """Get rid of what nobody needs; returns how many contents left.

    Args:
        database: what there is.
        remove: gets rid of the bytes of a digest; it is no error if they are gone.
        unused: seconds after which an upload is forgotten of which nothing was made; 0 for never.
        grace: seconds after which bytes are removed that nobody has; more than any upload takes to be stored.
    """
    now = time.time()
    if unused:
        with database.write() as connection:
            needed = exists().where(files.c.owner == holdings.c.owner, files.c.sha256 == holdings.c.sha256)
            connection.execute(delete(holdings).where(holdings.c.touched < now - unused, ~needed))
    orphan = and_(
        blobs.c.touched < now - grace,
        ~exists().where(holdings.c.sha256 == blobs.c.sha256),
        ~exists().where(files.c.sha256 == blobs.c.sha256),
    )
    with database.read() as connection:
        found = [row.sha256 for row in connection.execute(select(blobs.c.sha256).where(orphan))]
    count = 0
    for sha256 in found:
        still = and_(orphan, blobs.c.sha256 == sha256)
        with database.write() as connection:  # if the next step is cut short, nobody may rely on the bytes
            connection.execute(update(blobs).where(still).values(stored=False))
        with database.write() as connection:
            if connection.execute(select(blobs.c.sha256).where(still).with_for_update()).first() is not None:
                remove(sha256)
                connection.execute(delete(blobs).where(blobs.c.sha256 == sha256))
                count += 1
    return count
