"""How a running export looks: a bar on a terminal, a line now and then elsewhere; and how its end is told.

Everything live goes to standard error, so that standard output holds results only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Self

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from dicom_depot.cli.client import OperationReport, RequestRefused, ServiceUnreachable
from dicom_depot.cli.common import ExitCode, fail, print_json
from dicom_depot.config import PREFIX
from dicom_depot.domain.errors import DepotError
from dicom_depot.domain.export import LOG_NAME
from dicom_depot.web.errors import status_of

PLAIN_LINE_SECONDS = 5.0
"""How often a line of progress is written where no terminal is."""

_RATE_WINDOW_SECONDS = 60.0
_BAR_NEEDS_COLUMNS = 110
"""On narrower terminals the numbers alone fill the line."""


class Rates(NamedTuple):
    """Speed of late, and the time left; None while that is not known."""

    instances_per_second: float
    bytes_per_second: float
    seconds_left: float | None


class RateMeter:
    """Measures over the last minute: counters move a chunk at a time, so shorter windows would show jumps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int, int]] = deque()

    def measure(self, report: OperationReport) -> Rates:
        now = self._clock()
        done = report.exported + report.skipped
        self._seen.append((now, done, report.bytes_exported))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_WINDOW_SECONDS:
            self._seen.popleft()
        then, done_then, bytes_then = self._seen[0]
        seconds = max(now - then, 0.001)
        per_second = (done - done_then) / seconds
        # The total is final once planning is complete; the API says so by a percentage that is not 0.
        is_total_known = report.percent_complete > 0
        left = (report.total - done) / per_second if is_total_known and per_second > 0 else None
        return Rates(per_second, (report.bytes_exported - bytes_then) / seconds, left)


class OperationProgress:
    """Shows the reports of one operation while the block runs."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._meter = RateMeter()
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            text = TextColumn("{task.fields[text]}")
            has_room = self._console.width >= _BAR_NEEDS_COLUMNS
            columns = (SpinnerColumn(), BarColumn(bar_width=16), text) if has_room else (SpinnerColumn(), text)
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=None, text="waiting for the service")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, report: OperationReport) -> None:
        """Take in a new report."""
        text = progress_text(report, self._meter.measure(report))
        if self._bar is not None:
            total = report.total if report.percent_complete else None
            self._bar.update(self._task, text=text, total=total, completed=report.exported + report.skipped)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_SECONDS and not report.is_ended:
            self._last_line = now
            self.say(text)

    def say(self, text: str) -> None:
        """A sentence beside the progress, for what must not be overlooked."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)


def progress_text(report: OperationReport, rates: Rates) -> str:
    """One line: instances, bytes, rates, time left, skipped."""
    of_total = f" of {report.total:,}" if report.percent_complete else ""
    parts = [
        f"{report.exported:,}{of_total} instances",
        decimal(report.bytes_exported),
        f"{rates.instances_per_second:,.0f}/s",
        f"{rates.bytes_per_second / 1e6:,.1f} MB/s",
    ]
    if rates.seconds_left is not None:
        parts.append(f"{_clock_text(rates.seconds_left)} left")
    if report.skipped:
        parts.append(f"{report.skipped:,} skipped")
    return "  ".join(parts)


def tell_end(report: OperationReport, *, as_json: bool) -> ExitCode:
    """Tell how an operation ended, on standard output, and return the exit code that says the same."""
    code = exit_code_of(report)
    if as_json:
        print_json(report.body)
    else:
        typer.echo(summary_text(report))
        if report.status == "succeeded" and report.total == 0 and report.log_href:
            typer.echo("Nothing that was stored when the export began matches.")
    if code is ExitCode.FAILED:
        reason = report.error
        fail("The export failed." if reason is None else f"{reason.message} ({reason.code})", code)
    return code


def exit_code_of(report: OperationReport) -> ExitCode:
    """3 when something was skipped, 4 failed, 5 canceled, otherwise 0."""
    match report.status:
        case "failed":
            return ExitCode.FAILED
        case "canceled":
            return ExitCode.CANCELED
        case _:
            return ExitCode.SOME_SKIPPED if report.skipped else ExitCode.OK


def summary_text(report: OperationReport) -> str:
    """Some lines about an operation for people."""
    seconds = max((report.updated_at - report.created_at).total_seconds(), 0.001)
    rate = f"{report.exported / seconds:,.0f}/s, {report.bytes_exported / seconds / 1e6:,.1f} MB/s"
    counts = f"{report.exported:,} instances, {decimal(report.bytes_exported)} in {seconds:,.1f} s ({rate})"
    percent = "" if report.is_ended else f" {report.percent_complete} %"
    is_below_root = "://" not in report.log_href
    below = f"  (below the service's {PREFIX}EXPORT_ROOT)" if is_below_root else ""
    lines = [
        f"operation  {report.id}",
        f"status     {report.status}{percent}",
        f"exported   {counts}",
        f"skipped    {report.skipped:,}" + (f", one line each in {LOG_NAME}" if report.skipped else ""),
        f"results    {report.log_href.removesuffix(LOG_NAME)}results/{below}",
        f"error log  {report.log_href}{below}",
    ]
    return "\n".join(lines)


@contextmanager
def explained_answers(*, as_json: bool, failures: Container[str] = ()) -> Iterator[None]:
    """Turn what the service refused, or that it is away, into one message and an exit code; the body with `--json`.

    failures: codes that say that something failed, although the service calls it a refused request.
    """
    try:
        yield
    except DepotError as error:
        status = error.status if isinstance(error, RequestRefused) else status_of(error)
        if as_json:
            print_json({"error": {"code": error.code, "message": error.message, "target": error.target}})
        shown = error.message if isinstance(error, ServiceUnreachable) else f"{error.message} ({error.code})"
        fail(shown, ExitCode.USAGE if status < 500 and error.code not in failures else ExitCode.FAILED)


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
