"""The other end: a client for programs, and what `spa remote` does."""

from spa_server.client.client import Client

__all__ = ["Client"]
