"""Threads of their own for what waits for others: destinations, the cloud's identity service, the audit trail's disk,
the store's disk, the processes that transcode.

The threads that all other requests share are few. If slow destinations could take them all, status, health and sign-in
would stand still with them.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

_P = ParamSpec("_P")
_T = TypeVar("_T")

WAITING_MAX = 16
STORING_MAX = 16
RETRIEVING_MAX = 32
STORES_MAX = 64
"""Requests to store that are read at the same time; each holds up to 2 MiB. Further ones wait unread."""
_limiter = CapacityLimiter(WAITING_MAX)
_AUDIT_LINES_MAX = 10_000
_store_limiter = CapacityLimiter(STORING_MAX)
_retrieve_limiter = CapacityLimiter(RETRIEVING_MAX)
_store_places = asyncio.Semaphore(STORES_MAX)


def store_place() -> asyncio.Semaphore:
    """To be held, by `async with`, while a request to store is read."""
    return _store_places


async def run_waiting(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Run in a thread what may wait long for somebody else. Further calls wait for their turn."""
    return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=_limiter)


class AuditQueue:
    """Writes audit lines on a thread of its own, one after the other: they keep their order, and no request waits on
    the disk, unless very many lines do.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[tuple[contextvars.Context, Callable[[], None]] | None] = queue.Queue(_AUDIT_LINES_MAX)
        self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
        self._thread.start()

    async def put(self, write: Callable[[], None]) -> None:
        """Have `write` called, in the present context."""
        line = (contextvars.copy_context(), write)
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            await to_thread.run_sync(self._lines.put, line)

    def close(self) -> None:
        """Return when all lines are written."""
        self._lines.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            context, write = line
            context.run(write)


async def run_storing(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Run in a thread what reads, writes and commits instances."""
    return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=_store_limiter)


async def run_retrieving(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Run in a thread what reads the store, or waits for a transcoding process."""
    return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=_retrieve_limiter)


async def iterate_retrieving(blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The blocks of an answer, each made as by `run_retrieving`."""
    while (block := await run_retrieving(next, blocks, None)) is not None:
        yield block


async def uncancelled(future: Future[_T]) -> _T:
    """The result of work on another thread, once it has come to an end: also when this task is cancelled meanwhile, so
    that nobody cleans up behind work that still runs. What has not begun is cancelled with the task.
    """
    waiting = asyncio.wrap_future(future)
    is_cancelled = False
    while True:
        try:
            result = await asyncio.shield(waiting)
            break
        except asyncio.CancelledError:
            if waiting.cancelled() or future.cancel():
                raise
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
    return result
