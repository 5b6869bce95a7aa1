"""Jobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import TypeAlias

import grpc

from spa_server._generated import jobs_pb2 as pb
from spa_server._generated import jobs_pb2_grpc as rpc
from spa_server.callers import current
from spa_server.database import Database, jobs
from spa_server.errors import invalid
from spa_server.execution.dispatcher import Dispatcher
from spa_server.messages import event_message, job_message, spec_of, states_of

__all__ = ["Changes", "Jobs"]

Context: TypeAlias = grpc.aio.ServicerContext
_LOOK = 1.0
"""Seconds after which a watcher looks again although nothing was said: other servers may run the job."""


class Changes:
    """Wakes those who wait for something to happen to a job. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def tell(self, id_: str) -> None:
        """Something happened."""
        for event in self._waiting.get(id_, ()):
            event.set()

    @contextlib.contextmanager
    def of(self, id_: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something happens."""
        event = asyncio.Event()
        self._waiting[id_].add(event)
        try:
            yield event
        finally:
            self._waiting[id_].discard(event)
            if not self._waiting[id_]:
                del self._waiting[id_]


class Jobs(rpc.JobServiceServicer):
    """spa.v1.JobService."""

    def __init__(self, database: Database, dispatcher: Dispatcher, changes: Changes, most: int) -> None:
        """
        Args:
            database: where they are.
            dispatcher: who runs them.
            changes: what happens to them.
            most: of one owner that wait or run.
        """
        self._database, self._dispatcher, self._changes, self._most = database, dispatcher, changes, most

    async def CreateJob(self, request: pb.CreateJobRequest, context: Context) -> pb.CreateJobResponse:
        """See the proto."""
        if len(request.request_id) > 128 or not request.request_id.isprintable():
            raise invalid("request_id", "request_id: must be at most 128 printable characters")
        spec = spec_of(request.spec)
        job = await asyncio.to_thread(
            jobs.create, self._database, current().owner, spec, request.request_id, self._most
        )
        self._dispatcher.poke()
        return pb.CreateJobResponse(job=job_message(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        """See the proto."""
        job = await asyncio.to_thread(jobs.get, self._database, current().owner, request.name)
        return pb.GetJobResponse(job=job_message(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """See the proto."""
        wanted, size, token = states_of(request.states), request.page_size, request.page_token
        found, following = await asyncio.to_thread(jobs.listed, self._database, current().owner, wanted, size, token)
        return pb.ListJobsResponse(jobs=map(job_message, found), next_page_token=following)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[pb.WatchJobResponse]:
        """See the proto."""
        owner, sequence = current().owner, request.after_sequence
        if sequence < 0:
            raise invalid("after_sequence", "after_sequence: must be 0 or more")
        with self._changes.of(request.name.partition("/")[2]) as changed:
            while True:
                changed.clear()
                found, ended = await asyncio.to_thread(jobs.events_after, self._database, owner, request.name, sequence)
                for event in found:
                    yield pb.WatchJobResponse(event=event_message(event))
                    sequence = event.sequence
                if ended:
                    return
                if not found:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), _LOOK)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        """See the proto."""
        job = await asyncio.to_thread(jobs.cancel, self._database, current().owner, request.name)
        self._dispatcher.stop(job.id)
        self._changes.tell(job.id)
        return pb.CancelJobResponse(job=job_message(job))

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Context) -> pb.DeleteJobResponse:
        """See the proto."""
        await asyncio.to_thread(jobs.remove, self._database, current().owner, request.name)
        return pb.DeleteJobResponse()
