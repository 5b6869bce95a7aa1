"""One loaded version of a model: accepts requests, gives them to its sessions, and closes when all are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from spa_server.serving.codec import Array
from spa_server.serving.errors import Overloaded, TooLate
from spa_server.serving.opening import Opened
from spa_server.serving.options import ModelOptions
from spa_server.serving.running import Outcome, Ran, execute
from spa_server.serving.signature import same_rows
from spa_server.serving.statistics import Statistics
from spa_server.serving.stoppable import StoppableSession
from spa_server.serving.waiting import Key, Request, RequestQueue

__all__ = ["LoadedVersion"]


class LoadedVersion:
    """Belongs to the event loop it was made in; everything but the runs themselves happens there."""

    def __init__(self, model: str, version: str, opened: Opened, options: ModelOptions) -> None:
        self.model, self.version, self.options = model, version, options
        self.signature = opened.signature
        self.provider = opened.provider
        self.statistics = Statistics()
        self._idle = list(opened.sessions)
        self._threads = ThreadPoolExecutor(len(opened.sessions), thread_name_prefix=f"spa-{model}-{version}")
        self._queue = RequestQueue(options.max_batch, options.queue_delay_ms / 1000)
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.TimerHandle | None = None
        self._open = 0
        """Requests without answer, and running batches (all of whose requests may have been cancelled)."""
        self._nothing_open = asyncio.Event()
        self._nothing_open.set()

    def submit(
        self, feeds: dict[str, Array], outputs: Sequence[str], deadline: float | None
    ) -> asyncio.Future[dict[str, Array]]:
        """Accept a request that fits the signature; its answer has the named outputs.

        A request whose future is cancelled, or whose `deadline` passes (on the event loop's clock), does not wait any
        more, and a run that nobody waits for is stopped.

        Raises: Overloaded if too many wait; InvalidRequest if requests are joined and its inputs disagree on the rows.
        """
        rows, key = self._joins(feeds)
        if len(self._queue) >= self.options.max_queue:
            self.statistics.fail.add(0)
            raise Overloaded(
                f"{len(self._queue)} requests already wait for version {self.version!r} of model {self.model!r}: "
                "try again later."
            )
        answer: asyncio.Future[dict[str, Array]] = self._loop.create_future()
        request = Request(feeds, tuple(outputs), rows, key, answer, self._loop.time())
        self._begin()
        answer.add_done_callback(partial(self._answered, request))
        if deadline is not None:
            request.timer = self._loop.call_at(deadline, self._too_late, request)
        self._queue.add(request)
        self._pump()
        return answer

    async def close(self) -> None:
        """Wait until every accepted request is answered, then let go of the sessions. Submit nothing any more."""
        await self._nothing_open.wait()
        self._threads.shutdown(wait=False)
        self._idle.clear()

    def _joins(self, feeds: Mapping[str, Array]) -> tuple[int, Key]:
        if self.options.max_batch == 1:
            return 1, None
        rows = same_rows(feeds)
        if not 0 < rows < self.options.max_batch:
            return rows, None
        return rows, tuple((spec.name, feeds[spec.name].shape[1:]) for spec in self.signature.inputs)

    def _pump(self) -> None:
        """Give idle sessions what is due, and come back when more will be."""
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        while self._idle:
            now = self._loop.time()
            batch = self._queue.take(now)
            if not batch:
                break
            waiting = [request for request in batch if not request.answer.done()]  # not cancelled just now
            if waiting:
                self._start(waiting, now)
        due = self._queue.due()
        if self._idle and due is not None:
            self._wake = self._loop.call_at(due, self._pump)

    def _start(self, batch: list[Request], now: float) -> None:
        session = self._idle.pop()
        stop = session.ready()
        for request in batch:
            request.beside, request.stop = batch, stop
            self.statistics.queue.add(int((now - request.arrived) * 1e9))
        self._begin()
        limit = self._loop.call_later(self.options.run_seconds, self._too_long, batch)
        self._threads.submit(self._run, session, batch, limit)

    def _run(self, session: StoppableSession, batch: list[Request], limit: asyncio.TimerHandle) -> None:
        """In a thread of the pool."""
        outcomes: Sequence[Outcome | Exception]
        runs: Sequence[Ran] = ()
        try:
            outcomes, runs = execute(session, batch)
        except Exception as error:  # not foreseen: the requests must have an answer all the same
            outcomes = [error] * len(batch)
        self._loop.call_soon_threadsafe(self._finish, session, batch, limit, outcomes, runs)

    def _finish(
        self,
        session: StoppableSession,
        batch: list[Request],
        limit: asyncio.TimerHandle,
        outcomes: Sequence[Outcome | Exception],
        runs: Sequence[Ran],
    ) -> None:
        self._idle.append(session)
        limit.cancel()
        for ran in runs:
            self.statistics.ran(ran.rows, ran.requests, ran.join_ns, ran.run_ns, ran.split_ns)
        for request, outcome in zip(batch, outcomes, strict=True):
            request.beside, request.stop = (), None  # no cycle: it would keep tensors until the garbage collector comes
            if request.answer.done():  # cancelled while it ran
                continue
            if isinstance(outcome, Exception):
                request.answer.set_exception(outcome)
            else:
                request.answer.set_result(outcome)
        self._pump()
        self._end()

    def _too_late(self, request: Request) -> None:
        if not request.answer.done():
            where = "in the queue" if self._queue.remove(request) else "while it ran"
            waited = self._loop.time() - request.arrived
            request.answer.set_exception(
                TooLate(f"model {self.model!r}: the request's time was over after {waited:.3f} s, {where}.")
            )

    def _too_long(self, batch: list[Request]) -> None:
        for request in batch:
            if not request.answer.done():
                request.answer.set_exception(
                    TooLate(f"model {self.model!r}: the run was stopped after {self.options.run_seconds:g} s.")
                )

    def _answered(self, request: Request, answer: asyncio.Future[dict[str, Array]]) -> None:
        """Whatever became of a request, it is over."""
        if request.timer is not None:
            request.timer.cancel()
        self._queue.remove(request)
        if request.stop is not None and all(other.answer.done() for other in request.beside):
            request.stop()
        taken = int((self._loop.time() - request.arrived) * 1e9)
        if answer.cancelled() or answer.exception() is not None:
            self.statistics.fail.add(taken)
        else:
            self.statistics.success.add(taken)
            self.statistics.rows += request.rows
        self._end()

    def _begin(self) -> None:
        self._open += 1
        self._nothing_open.clear()

    def _end(self) -> None:
        self._open -= 1
        if self._open == 0:
            self._nothing_open.set()
