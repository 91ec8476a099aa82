"""What commands share: settings from flags, exit codes, output for people and for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from dicom_depot import config
from dicom_depot.cli.client import TOKEN_VARIABLE
from dicom_depot.config import Settings, Source
from dicom_depot.domain.errors import DepotError

out = Console()
err = Console(stderr=True)


class ExitCode(IntEnum):
    """What a command's exit status says."""

    OK = 0
    USAGE = 2
    SOME_SKIPPED = 3
    FAILED = 4
    CANCELED = 5
    INTERRUPTED = 130


def fail(message: str, code: ExitCode) -> NoReturn:
    """Say what went wrong on stderr and end the command."""
    err.print(f"[bold red]error:[/] {_escaped(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(int(code))


ServiceOption = Annotated[
    str | None,
    typer.Option(
        "--service", metavar="URL", help="The running service. Default: the public URL or host and port of settings."
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar=TOKEN_VARIABLE,
        help="Access token, where the service asks for one; better in the environment than in the shell's history.",
    ),
]


@contextmanager
def explained_errors(code: ExitCode = ExitCode.FAILED) -> Iterator[None]:
    """Turn errors of the service into one clear message and an exit code."""
    try:
        yield
    except DepotError as error:
        fail(error.message, code)


def load_settings(context: typer.Context) -> Settings:
    """The settings of this command: flags, environment, file, defaults. Ends with code 2 on a bad one."""
    return load_with_sources(context)[0]


def load_with_sources(context: typer.Context) -> tuple[Settings, dict[str, Source]]:
    flags: dict[str, Any] = dict(context.find_root().obj or {})
    file = flags.pop("config", None)
    with explained_errors(ExitCode.USAGE):
        return config.load(flags, Path(file) if file else None)


def print_json(value: Any) -> None:
    """One JSON document on stdout, for machines."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
