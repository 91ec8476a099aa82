"""The bulk import: files in, one durable index row for each instance, one outcome for each file.

The work is cut into batches in path order and spread over processes. For a batch a worker

1. reads the headers and hashes the exact bytes (SHA-256 and XXH3);
2. asks the index once which instances it has, so that nothing is written in vain;
3. writes the new objects under fresh keys and makes them durable together;
4. adds the rows in one transaction, and deletes the objects whose rows were not taken.

Bytes are durable before their row: a crash leaves at most objects without rows, which `check --repair` removes, and
never a row without bytes. A run that was stopped is continued by running it again: what is there is skipped.

Of files with the same identifiers and different bytes the first stays: by path order within a batch; between batches
that run at the same time, the first commit. Within one process (`processes` 0 or 1) path order holds throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dicom_depot.domain.errors import DepotError, StorageFull
from dicom_depot.services.import_sources import Candidate, find_files
from dicom_depot.services.ingest_batch import (
    BATCH_FILES_MAX,
    BatchReport,
    BatchWorker,
    IngestProblem,
    OpenStores,
    ProblemKind,
    StopSignal,
)
from dicom_depot.services.ingest_pool import run_in_processes

__all__ = ["Candidate", "IngestProblem", "IngestSummary", "OpenStores", "ProblemKind", "find_files", "ingest"]

BATCH_BYTES_MAX = 64 << 20


@dataclass(slots=True)
class IngestSummary:
    """What became of the files so far. `bytes_seen` and `bytes_stored` are in bytes.

    `failure`: the import had to stop, and why. `is_interrupted`: it was told to. What was counted is done either way.
    """

    files_seen: int = 0
    bytes_seen: int = 0
    stored: int = 0
    bytes_stored: int = 0
    already_there: int = 0
    conflicting: int = 0
    not_dicom: int = 0
    broken: int = 0
    is_interrupted: bool = False
    failure: DepotError | None = None


def batches(candidates: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Cut candidates, in order, into batches of at most BATCH_FILES_MAX files and about BATCH_BYTES_MAX bytes."""
    batch: list[Candidate] = []
    batch_bytes = 0
    for candidate in candidates:
        if batch and (len(batch) >= BATCH_FILES_MAX or batch_bytes + candidate.size > BATCH_BYTES_MAX):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(candidate)
        batch_bytes += candidate.size
    if batch:
        yield batch


def ingest(
    candidates: Iterable[Candidate],
    open_stores: OpenStores,
    *,
    processes: int,
    on_progress: Callable[[IngestSummary], None] | None = None,
    on_problem: Callable[[IngestProblem], None] | None = None,
    stop: StopSignal | None = None,
) -> IngestSummary:
    """Import every candidate and return what became of them.

    `processes` workers run at once; 0 works in this process. `open_stores` is called once in each worker and must be
    picklable. `on_problem` is called as problems become known, in the candidates' order, and problems are not kept;
    `on_progress` after each batch. Once `stop` is set, batches in flight are finished or given up without a trace.

    Never raises what a file or a store does: a file's failure is a problem; a full disk, a store that is away or a
    worker that died ends the import, and the summary's `failure` says why.
    """
    summary = IngestSummary()

    def fold(report: BatchReport) -> None:
        _fold(summary, report)
        for problem in report.problems:
            if on_problem is not None:
                on_problem(problem)
        if on_progress is not None:
            on_progress(summary)

    if processes:
        run_in_processes(batches(candidates), open_stores, processes=processes, fold=fold, ending=summary, stop=stop)
        return summary
    worker = BatchWorker(open_stores, stop)
    try:
        for batch in batches(candidates):
            if stop is not None and stop.is_set():
                summary.is_interrupted = True
                break
            fold(worker.run(batch))
            if summary.failure is not None or summary.is_interrupted:
                break
    except KeyboardInterrupt:
        summary.is_interrupted = True
    finally:
        worker.close()
    return summary


def _fold(summary: IngestSummary, report: BatchReport) -> None:
    summary.files_seen += report.files
    summary.bytes_seen += report.bytes_seen
    summary.stored += report.stored
    summary.bytes_stored += report.bytes_stored
    summary.already_there += report.already_there
    for problem in report.problems:
        match problem.kind:
            case ProblemKind.CONFLICTING:
                summary.conflicting += 1
            case ProblemKind.NOT_DICOM:
                summary.not_dicom += 1
            case ProblemKind.BROKEN:
                summary.broken += 1
    summary.is_interrupted |= report.is_abandoned
    if report.stopped is not None and summary.failure is None:
        kind = StorageFull if report.stopped.is_storage_full else DepotError
        summary.failure = kind(report.stopped.message)
