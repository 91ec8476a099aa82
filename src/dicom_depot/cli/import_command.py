"""`dicom-depot import PATH...`: stores folders, files and zip archives. Shows; the rules are in `services.ingest`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Protocol, TextIO

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from dicom_depot import wiring
from dicom_depot.cli.common import ExitCode, fail, load_settings
from dicom_depot.domain.errors import DepotError, InvalidRequest
from dicom_depot.services.ingest import IngestProblem, IngestSummary, OpenStores, find_files, ingest

PLAIN_LINE_SECONDS = 5.0
"""How often a line of progress is written where no terminal is."""

_REASONS_SHOWN = 5
_REASONS_COUNTED_MAX = 1000


def import_files(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Folders, files and zip archives to import.")],
    errors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one JSON line for each file that was not stored, as it occurs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Worker processes. Default: one for each core.")
    ] = None,
) -> None:
    """Store DICOM files in bulk. What is stored already is skipped, so an import that was stopped is simply run again.

    DICOM is recognised by content, never by name. Files that are not DICOM are counted and passed over. Of files with
    the same identifiers and different bytes the first stays; the others are reported as conflicting.

    Exit status: 0 all fine, 2 wrong usage, 3 some files were broken or conflicting, 4 stopped early (disk full, a
    store that is away), 130 interrupted.
    """
    try:
        candidates = find_files(paths)
        open_stores = _prepare(context)
    except InvalidRequest as error:
        fail(error.message, ExitCode.USAGE)
    except DepotError as error:
        fail(error.message, ExitCode.FAILED)
    try:
        errors_file = errors.open("w", encoding="utf-8", buffering=1) if errors else None
    except OSError as error:
        fail(f"{errors} cannot be written: {error.strerror}", ExitCode.USAGE)

    problems = _Problems(errors_file)
    started = time.monotonic()
    with errors_file or nullcontext(), _stop_on_signals() as stop, _shown_progress(paths) as show:
        try:
            summary = ingest(
                candidates,
                open_stores,
                processes=processes or len(os.sched_getaffinity(0)),
                on_progress=show,
                on_problem=problems.add,
                stop=stop,
            )
        except OSError as error:  # only the errors file is written here
            fail(f"The errors file cannot be written: {error.strerror}", ExitCode.FAILED)
    seconds = time.monotonic() - started
    if as_json:
        typer.echo(json.dumps(_as_json(summary, seconds)))
    else:
        Console().print(_as_table(summary, problems, seconds))
    if summary.failure is not None:
        message = (
            f"Stopped: {summary.failure.message} What is counted as stored is safe; run the import again to go on."
        )
        fail(message, ExitCode.FAILED)
    if summary.is_interrupted:
        fail(
            "Interrupted. What is counted as stored is safe; run the import again to go on.",
            ExitCode.INTERRUPTED,
        )
    if summary.broken or summary.conflicting:
        raise typer.Exit(ExitCode.SOME_SKIPPED)


def _prepare(context: typer.Context) -> OpenStores:
    """The one seam to the settings: a picklable function that opens the store and the index in each worker."""
    return wiring.prepare_import(load_settings(context))


class _Problems:
    """Writes problems to the errors file as they occur, and counts their reasons."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        self.reasons: Counter[tuple[str, str]] = Counter()

    def add(self, problem: IngestProblem) -> None:
        if self._file is not None:
            # ASCII: a path that is not UTF-8 is still a valid line.
            self._file.write(json.dumps(problem._asdict()) + "\n")
        reason = ": ".join(problem.reason.split(": ")[:2])  # without the value that follows
        key = (problem.kind.value, reason)
        if key in self.reasons or len(self.reasons) < _REASONS_COUNTED_MAX:
            self.reasons[key] += 1


class _Settable(Protocol):
    def is_set(self) -> bool: ...


@contextmanager
def _stop_on_signals() -> Iterator[_Settable]:
    """The first SIGINT or SIGTERM asks the import to end in order, a second one ends it at once."""
    stop = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        stop.set()

    previous: dict[int, Any] = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Total:
    """How much there is to do, counted beside the import, so that the time left can be told."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._files = self._bytes = 0
        self._is_counted = self._is_ended = False
        threading.Thread(target=self._count, name="count-files", daemon=True).start()

    def _count(self) -> None:
        try:
            for candidate in find_files(self._paths):
                if self._is_ended:
                    return
                self._files += 1
                self._bytes += candidate.size
        except (OSError, DepotError):
            return  # The import itself reports what it finds; without a total there is only no estimate.
        self._is_counted = True

    @property
    def files(self) -> int | None:
        return self._files if self._is_counted else None

    @property
    def bytes(self) -> int | None:
        return self._bytes if self._is_counted else None

    def end(self) -> None:
        self._is_ended = True


@contextmanager
def _shown_progress(paths: Sequence[Path]) -> Iterator[Callable[[IngestSummary], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; both on standard error."""
    total = _Total(paths)
    console = Console(stderr=True)
    try:
        if console.is_terminal:
            with _bar(console) as progress:
                task = progress.add_task("", total=None, count="0 files", rate="")

                def move(summary: IngestSummary) -> None:
                    elapsed = max(progress.tasks[0].elapsed or 0.0, 0.001)
                    progress.update(
                        task,
                        completed=summary.bytes_seen,
                        total=total.bytes,
                        count=f"{summary.files_seen:,}{f' of {total.files:,}' if total.files else ''} files",
                        rate=f"{summary.files_seen / elapsed:,.0f}/s",
                    )

                yield move
        else:
            yield _PlainLines(total, sys.stderr)
    finally:
        total.end()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[count]}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class _PlainLines:
    """Progress for logs and pipes."""

    def __init__(self, total: _Total, output: TextIO) -> None:
        self._total, self._output = total, output
        self._started = self._last = time.monotonic()

    def __call__(self, summary: IngestSummary) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_LINE_SECONDS:
            return
        self._last = now
        of_files = f" of {self._total.files:,}" if self._total.files else ""
        left = ""
        if self._total.bytes and summary.bytes_seen:
            seconds = (now - self._started) * (self._total.bytes / summary.bytes_seen - 1)
            left = f", about {max(0, seconds):,.0f} s left"
        rate = summary.files_seen / (now - self._started)
        seen = f"{summary.files_seen:,}{of_files} files, {decimal(summary.bytes_seen)}"
        print(f"{seen}, {rate:,.0f} files/s{left}", file=self._output, flush=True)


def _as_json(summary: IngestSummary, seconds: float) -> dict[str, object]:
    values: dict[str, object] = {
        field.name: getattr(summary, field.name) for field in dataclasses.fields(summary) if field.name != "failure"
    }
    failure = summary.failure
    values["error"] = failure and {"code": failure.code, "message": failure.message}
    values["seconds"] = round(seconds, 3)
    return values


def _as_table(summary: IngestSummary, problems: _Problems, seconds: float) -> Table:
    rate = summary.files_seen / max(seconds, 0.001)
    table = Table(
        title=f"{summary.files_seen:,} files, {decimal(summary.bytes_seen)} in {seconds:,.1f} s ({rate:,.0f} files/s)",
        title_justify="left",
    )
    table.add_column("outcome")
    table.add_column("files", justify="right")
    table.add_column("reasons")
    for kind, name, count in (
        ("", "stored", summary.stored),
        ("", "already there", summary.already_there),
        ("conflicting", "conflicting", summary.conflicting),
        ("not_dicom", "not DICOM", summary.not_dicom),
        ("broken", "broken", summary.broken),
    ):
        reasons = [(seen, reason) for (of, reason), seen in problems.reasons.items() if of == kind]
        reasons.sort(key=lambda entry: (-entry[0], entry[1]))
        lines = [f"{seen:,} x {reason}" for seen, reason in reasons[:_REASONS_SHOWN]]
        if len(reasons) > _REASONS_SHOWN:
            lines.append(f"and {len(reasons) - _REASONS_SHOWN} more kinds")
        note = decimal(summary.bytes_stored) if name == "stored" else "\n".join(lines)
        table.add_row(name, f"{count:,}", note)
    return table
