"""Connections, transactions, and the schema brought up to date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config as Alembic
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from spa.errors import SpaError, UsageError

__all__ = ["Database", "connect", "is_busy"]

_BUSY = 10.0
"""Seconds that a writer waits for another one; `?timeout=` in the URL says otherwise."""
_SCHEMA_LOCK = 731_664_001
"""Of PostgreSQL: two servers that start at the same time do not both change the schema."""


class Database:
    """Transactions on one database. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.postgres = engine.dialect.name == "postgresql"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing."""
        with self.engine.connect() as connection:
            if not self.postgres:
                connection.exec_driver_sql("BEGIN")
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, committed at its end. On SQLite writers take turns from its beginning on, so that what was
        read stays true."""
        with self.engine.connect() as connection:
            if not self.postgres:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    def close(self) -> None:
        """Give connections back."""
        self.engine.dispose()


def connect(url: str) -> Database:
    """Open a database, made or brought up to date where needed.

    Raises:
        UsageError: the URL is wrong, or its driver is not installed.
        SpaError: the database cannot be reached, or is newer than this server.
    """
    try:
        engine = _engine(url)
    except OSError as error:
        raise SpaError(f"database: {error.filename} cannot be made ({error.strerror})") from error
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError) as error:
        raise UsageError(
            f"database: cannot use this URL ({_first(error)}); write for example sqlite:///spa.db"
        ) from error
    database = Database(engine)
    try:
        _upgrade(database)
    except SpaError:
        raise
    except Exception as error:  # alembic and drivers raise many things
        if not isinstance(error, SQLAlchemyError | OSError):
            raise SpaError(f"database: its schema cannot be brought up to date ({_first(error)})") from error
        raise SpaError(f"database: cannot be opened ({_first(error)}); check the URL and that it runs") from error
    return database


def is_busy(error: BaseException) -> bool:
    """Whether a database could not answer now, but may later: locked, restarted, out of connections or of space."""
    return isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and error.connection_invalidated)


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={} if "timeout" in parsed.query else {"timeout": _BUSY})
        event.listen(engine, "connect", _sqlite)
        return engine
    return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)


def _sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions begin where `Database.write` says so
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _upgrade(database: Database) -> None:
    config = Alembic()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with database.engine.connect() as connection:
        if database.postgres:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({_SCHEMA_LOCK})")
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
            connection.commit()
        finally:
            if database.postgres:
                connection.rollback()
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_SCHEMA_LOCK})")


def _first(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__).rstrip(".")
