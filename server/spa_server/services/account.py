"""What holds for a caller."""

from __future__ import annotations

import asyncio

import grpc
from sqlalchemy import func, select

from spa.version import __version__
from spa_server._generated import account_pb2 as pb
from spa_server._generated import account_pb2_grpc as rpc
from spa_server.callers import current
from spa_server.database import Database, contents
from spa_server.database.collections import LIVE
from spa_server.database.tables import jobs

__all__ = ["Account"]


class Account(rpc.AccountServiceServicer):
    """spa.v1.AccountService."""

    def __init__(self, database: Database, *, chunk: int, quota_bytes: int, quota_jobs: int) -> None:
        """
        Args:
            database: what is used.
            chunk: bytes of one piece of an upload.
            quota_bytes, quota_jobs: what one owner may take.
        """
        self._database, self._chunk, self._bytes, self._jobs = database, chunk, quota_bytes, quota_jobs

    async def GetAccount(
        self, request: pb.GetAccountRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetAccountResponse:
        """See the proto."""
        caller = current()
        used, count = await asyncio.to_thread(self._used, caller.owner)
        return pb.GetAccountResponse(
            owner=caller.owner,
            scopes=caller.scopes,
            version=__version__,
            chunk_bytes=self._chunk,
            used_bytes=used,
            quota_bytes=self._bytes,
            open_jobs=count,
            quota_jobs=self._jobs,
        )

    def _used(self, owner: str) -> tuple[int, int]:
        mine = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(LIVE))
        with self._database.read() as connection:
            return contents.used(connection, owner), connection.execute(mine).scalar_one()
