"""What the server remembers: SQLite by default, PostgreSQL by URL."""

from spa_server.database.engine import Database, connect

__all__ = ["Database", "connect"]
