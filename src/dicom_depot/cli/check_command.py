"""`dicom-depot check`: compares the index with the store. Shows; the rules are in `services.check`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from dicom_depot import wiring
from dicom_depot.cli.common import ExitCode, explained_errors, fail, load_settings, print_json
from dicom_depot.services.check import (
    REPAIRABLE,
    YOUNG_SECONDS,
    Check,
    CheckProblem,
    CheckSummary,
    Phase,
    ProblemKind,
)

PLAIN_LINE_SECONDS = 5.0
"""How often a line of progress is written where no terminal is."""

_SHOWN_OF_A_KIND = 20
_LISTED_IN_JSON = 1000


def check(
    context: typer.Context,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Remove orphans and leftovers. Needs the service to be stopped; an import may run."
        ),
    ] = False,
    checksums: Annotated[
        bool, typer.Option("--checksums/--no-checksums", help="Read every object and compare its SHA-256, or not.")
    ] = True,
    older_than: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Objects that changed later are never taken for orphans: an import may be about to add them.",
        ),
    ] = YOUNG_SECONDS,
    errors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one JSON line for each problem, as it is found.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Compare the index with the store: missing and damaged objects, orphans, leftovers of interrupted writes.

    Without --repair nothing is changed, and the service may run meanwhile.

    Missing and damaged objects are reported and never repaired: restore them from a backup.

    Exit status:
    0 all is fine, or was repaired
    2 wrong usage
    3 problems remain
    4 the check could not be completed
    """
    settings = load_settings(context)
    try:
        errors_file = errors.open("w", encoding="utf-8", buffering=1) if errors else None
    except OSError as error:
        fail(f"{errors} cannot be written: {error.strerror}", ExitCode.USAGE)
    problems = _Problems(errors_file, is_shown=not as_json)
    started = time.monotonic()
    try:
        with (
            errors_file or nullcontext(),
            explained_errors(),
            wiring.open_for_check(settings, exclusive=repair) as (store, index),
            _shown_progress(reads_objects=checksums) as progress,
        ):
            summary = Check(
                index=index,
                store=store,
                scratch=settings.data_dir,
                checksums=checksums,
                repair=repair,
                older_than_seconds=older_than,
                on_problem=problems.add,
                on_progress=progress,
            ).run()
    except OSError as error:  # a scratch file or the errors file
        fail(f"The check could not be completed: {error.strerror}.", ExitCode.FAILED)
    seconds = time.monotonic() - started
    if as_json:
        print_json(_as_json(summary, problems, seconds))
    else:
        _tell(summary, problems, seconds, reads_objects=checksums)
    raise typer.Exit(ExitCode.SOME_SKIPPED if summary.remaining else ExitCode.OK)


class _Problems:
    """Writes problems to the errors file as they are found, and keeps the first ones."""

    def __init__(self, file: TextIO | None, *, is_shown: bool) -> None:
        self._file = file
        self._is_shown = is_shown
        self._shown: dict[ProblemKind, int] = {}
        self.listed: list[CheckProblem] = []

    def add(self, problem: CheckProblem) -> None:
        if self._file is not None:
            self._file.write(json.dumps(problem_json(problem)) + "\n")
        if len(self.listed) < _LISTED_IN_JSON:
            self.listed.append(problem)
        count = self._shown[problem.kind] = self._shown.get(problem.kind, 0) + 1
        if self._is_shown and count <= _SHOWN_OF_A_KIND:
            repaired = ", removed" if problem.is_repaired else ""
            identifier = f"\n  instance {problem.identifier}" if problem.identifier else ""
            typer.echo(f"{problem.kind}: {problem.store_key}: {problem.explanation}{repaired}{identifier}")


def problem_json(problem: CheckProblem) -> dict[str, Any]:
    """A problem for machines."""
    return {
        "kind": problem.kind,
        "storeKey": problem.store_key,
        "identifier": problem.identifier,
        "explanation": problem.explanation,
        "isRepaired": problem.is_repaired,
    }


def _as_json(summary: CheckSummary, problems: _Problems, seconds: float) -> dict[str, Any]:
    return {
        "instances": summary.instances,
        "objects": summary.objects,
        "bytes": summary.bytes_total,
        "young": summary.young,
        "found": {kind.value: summary.found[kind] for kind in ProblemKind},
        "repaired": {kind.value: summary.repaired[kind] for kind in sorted(REPAIRABLE)},
        "remaining": summary.remaining,
        "problems": [problem_json(problem) for problem in problems.listed],
        "problemsNotListed": summary.found.total() - len(problems.listed),
        "seconds": round(seconds, 3),
    }


def _tell(summary: CheckSummary, problems: _Problems, seconds: float, *, reads_objects: bool) -> None:
    for kind, count in summary.found.items():
        if count > _SHOWN_OF_A_KIND:
            typer.echo(f"{kind}: {count - _SHOWN_OF_A_KIND:,} more; --errors FILE lists all")
    read = "all read and compared" if reads_objects else "sizes compared, not read"
    typer.echo(
        f"{summary.instances:,} instances, {decimal(summary.bytes_total)}, {read}; {summary.objects:,} objects; "
        f"{seconds:,.1f} s"
    )
    if summary.young:
        typer.echo(f"Young objects without an instance, left alone as an import may be at work: {summary.young:,}.")
    if not summary.found:
        typer.echo("Index and store agree.")
        return
    lost = sum(count for kind, count in summary.found.items() if kind not in REPAIRABLE)
    orphans = summary.remaining - lost
    if removed := summary.repaired.total():
        typer.echo(f"Removed objects that no instance points at: {removed:,}.")
    if orphans:
        typer.echo(f"Objects that no instance points at: {orphans:,}. --repair removes them.")
    if lost:
        typer.echo(
            f"Instances that cannot be read as they were imported: {lost:,}. Restore their objects from a backup of "
            "the store, to the same keys, then check again. Exports skip them and name them in errors.log."
        )


@contextmanager
def _shown_progress(*, reads_objects: bool) -> Iterator[Callable[[CheckSummary], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; both on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last_line = time.monotonic()

        def write_line(summary: CheckSummary) -> None:
            nonlocal last_line
            if time.monotonic() - last_line >= PLAIN_LINE_SECONDS:
                last_line = time.monotonic()
                console.print(_progress_text(summary, reads_objects=reads_objects), highlight=False, soft_wrap=True)

        yield write_line
        return
    columns = (SpinnerColumn(), BarColumn(bar_width=16), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, text="")

        def move(summary: CheckSummary) -> None:
            is_counted = summary.phase is Phase.OBJECTS
            total, done = (
                (summary.bytes_total, summary.bytes_checked) if reads_objects else (summary.instances, summary.checked)
            )
            bar.update(
                task,
                total=total if is_counted else None,
                completed=done if is_counted else 0,
                text=_progress_text(summary, reads_objects=reads_objects),
            )

        yield move


def _progress_text(summary: CheckSummary, *, reads_objects: bool) -> str:
    match summary.phase:
        case Phase.STORE:
            text = f"{summary.phase}  {summary.objects:,} objects"
        case Phase.INDEX:
            text = f"{summary.phase}  {summary.instances:,} instances"
        case Phase.OBJECTS:
            text = f"{summary.phase}  {summary.checked:,} of {summary.instances:,}"
            if reads_objects:
                text += f"  {decimal(summary.bytes_checked)} of {decimal(summary.bytes_total)}"
    found = summary.found.total()
    return f"{text}  {found:,} problems" if found else text
