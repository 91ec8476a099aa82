"""The import's worker processes: a bounded window of batches, reports in order, an end that leaves nothing behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.synchronize import Event, Lock
from typing import Protocol

from dicom_depot.domain.errors import DepotError, ServiceUnavailable
from dicom_depot.services.import_sources import Candidate
from dicom_depot.services.ingest_batch import BatchReport, BatchWorker, OpenStores, StopSignal

_BATCHES_A_PROCESS = 2
"""Batches handed out at the same time: one at work, one waiting."""
_REPORTS_HELD_MAX = 256
"""Finished reports that may wait for an earlier, slower batch, so that problems come in order."""
_POLL_SECONDS = 0.2

_worker: BatchWorker | None = None


class _Ending(Protocol):
    """The part of an IngestSummary that says whether to go on."""

    is_interrupted: bool
    failure: DepotError | None


def run_in_processes(
    batches: Iterator[list[Candidate]],
    open_stores: OpenStores,
    *,
    processes: int,
    fold: Callable[[BatchReport], None],
    ending: _Ending,
    stop: StopSignal | None,
) -> None:
    """Run batches on worker processes; `fold` gets each report, in the batches' order, in this thread.

    Ends early when `ending` has a failure, when `stop` is set, or on KeyboardInterrupt; batches in flight are then
    waited for, and what they did is still folded.
    """
    # A fork of this process could inherit locks that another thread holds.
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the process that all workers are forked from, instead of once in each of them.
    context.set_forkserver_preload([__name__, _module_of(open_stores)])
    give_up = context.Event()
    executor = ProcessPoolExecutor(
        processes, context, initializer=_start_worker, initargs=(open_stores, give_up, context.Lock())
    )
    window: deque[Future[BatchReport]] = deque()
    try:
        try:
            _feed(executor, batches, window, processes=processes, fold=fold, ending=ending, stop=stop)
        except KeyboardInterrupt:
            ending.is_interrupted = True
        if ending.failure is not None or ending.is_interrupted:
            give_up.set()
        while window:
            fold(window.popleft().result())
    except BrokenProcessPool:
        ending.failure = ServiceUnavailable(
            "A worker process of the import died (killed, or out of memory). What was counted is stored; "
            "run the import again and it goes on."
        )
        for future in window:
            if future.done() and not future.cancelled() and future.exception() is None:
                fold(future.result())
    finally:
        give_up.set()
        executor.shutdown(wait=True, cancel_futures=True)


def _module_of(open_stores: OpenStores) -> str:
    function = open_stores.func if isinstance(open_stores, functools.partial) else open_stores
    return str(function.__module__)


def _feed(
    executor: ProcessPoolExecutor,
    batches: Iterator[list[Candidate]],
    window: deque[Future[BatchReport]],
    *,
    processes: int,
    fold: Callable[[BatchReport], None],
    ending: _Ending,
    stop: StopSignal | None,
) -> None:
    """Keep the workers supplied until the batches end or there is a reason to stop."""
    running: set[Future[BatchReport]] = set()
    is_exhausted = False
    while not is_exhausted or running:
        if stop is not None and stop.is_set():
            ending.is_interrupted = True
        if ending.is_interrupted or ending.failure is not None:
            return
        while not is_exhausted and len(running) < processes * _BATCHES_A_PROCESS and len(window) < _REPORTS_HELD_MAX:
            batch = next(batches, None)
            if batch is None:
                is_exhausted = True
                break
            future = executor.submit(_run_batch, batch)
            running.add(future)
            window.append(future)
        _, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        while window and window[0].done():
            fold(window.popleft().result())


def _start_worker(open_stores: OpenStores, give_up: Event, commit_turn: Lock) -> None:
    """In a new worker: leave Ctrl-C to the parent, and end with it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    _worker = BatchWorker(open_stores, give_up, commit_turn)


def _run_batch(batch: list[Candidate]) -> BatchReport:
    assert _worker is not None
    return _worker.run(batch)


def _end_with_parent() -> None:
    """A killed parent closes no queue: without this its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        with suppress(OSError):
            connection.wait([parent.sentinel])
        os._exit(1)
