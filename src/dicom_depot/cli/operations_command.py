"""`dicom-depot operations`: list, show, watch, cancel and resume the exports of a running service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from dicom_depot.cli.client import OperationReport, ServiceClient, service_url
from dicom_depot.cli.common import ServiceOption, TokenOption, load_settings, print_json
from dicom_depot.cli.export_command import parse_destination, read_destination, wait_for_end
from dicom_depot.cli.progress import explained_answers, summary_text
from dicom_depot.cli.settings_command import with_setting_flags
from dicom_depot.domain.errors import InvalidRequest

app = typer.Typer(help="List, show, watch, cancel and resume exports of a running service.", no_args_is_help=True)

_OperationArgument = Annotated[str, typer.Argument(metavar="ID", help="The operation's id.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, as the API answers.")]


def list_operations(
    context: typer.Context,
    status: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS", help="Only these, comma separated: notStarted, running, succeeded, failed, canceled."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="How many, at most.")] = 20,
    service: ServiceOption = None,
    token: TokenOption = None,
    as_json: _JsonOption = False,
) -> None:
    """List operations, newest first."""
    with _client(context, service, token, as_json=as_json) as client:
        reports = client.page(status, limit)
    if as_json:
        print_json({"operations": [report.body for report in reports]})
        return
    typer.echo(f"{'operation':32}  {'created (UTC)':16}  {'status':10}  {'exported':>11}  {'skipped':>9}  {'bytes':>9}")
    for report in reports:
        typer.echo(_row(report))


def show_operation(
    context: typer.Context,
    operation_id: _OperationArgument,
    service: ServiceOption = None,
    token: TokenOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Show the state of one operation."""
    with _client(context, service, token, as_json=as_json) as client:
        _show(client.get(operation_id), as_json=as_json)


def watch_operation(
    context: typer.Context,
    operation_id: _OperationArgument,
    service: ServiceOption = None,
    token: TokenOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Show the progress of an operation until it has ended. Ctrl-C ends the watching, not the operation.

    Exit status:
    0 all was copied
    2 wrong usage, or an unknown id
    3 some were skipped, see errors.log
    4 failed, or the service cannot be reached
    5 canceled
    130 interrupted; the export goes on
    """
    with _client(context, service, token, as_json=as_json) as client:
        raise typer.Exit(wait_for_end(client, operation_id, as_json=as_json))


def cancel_operation(
    context: typer.Context,
    operation_id: _OperationArgument,
    service: ServiceOption = None,
    token: TokenOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Stop an operation. What it copied stays; an operation that has ended cannot be stopped (exit status 2)."""
    with _client(context, service, token, as_json=as_json) as client:
        report = client.cancel(operation_id)
        if as_json:
            print_json(report.body)
        elif report.is_ended:
            typer.echo(f"Operation {report.id} was canceled already.")
        else:
            typer.echo(f"Operation {report.id} is being canceled: it ends once what is being copied has been let go.")


def resume_operation(
    context: typer.Context,
    operation_id: _OperationArgument,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The operation's destination with a fresh secret, needed where the former one was erased: a "
            "container's URL with its SAS, or a connection string with --container. `-` reads it from standard input.",
        ),
    ] = None,
    container: Annotated[
        str | None, typer.Option(metavar="NAME", help="Container, when --to is a connection string.")
    ] = None,
    managed_identity: Annotated[
        bool,
        typer.Option("--managed-identity", help="Sign in to the container of --to as the service, as the export did."),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the operation has ended.")] = False,
    service: ServiceOption = None,
    token: TokenOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Let an operation that failed or was canceled go on where it stopped: same id, folder, counts and log.

    Exit status: as of `watch` with --wait; else 0, or 2 when the service refused it.
    """
    with _client(context, service, token, as_json=as_json) as client:
        destination = _destination(to, container, managed_identity=managed_identity)
        report = client.resume(operation_id, destination)
        if wait:
            raise typer.Exit(wait_for_end(client, operation_id, as_json=as_json))
        if as_json:
            print_json(report.body)
        else:
            typer.echo(f"Operation {report.id} goes on. Follow it with: dicom-depot operations watch {report.id}")


for _name, _command in (
    ("list", list_operations),
    ("show", show_operation),
    ("watch", watch_operation),
    ("cancel", cancel_operation),
    ("resume", resume_operation),
):
    app.command(_name)(with_setting_flags(_command))


@contextmanager
def _client(
    context: typer.Context, service: str | None, token: str | None, *, as_json: bool
) -> Iterator[ServiceClient]:
    settings = load_settings(context)
    with explained_answers(as_json=as_json):
        client = ServiceClient(service_url(service, settings), token=token)
        try:
            yield client
        finally:
            client.close()


def _destination(to: str | None, container: str | None, *, managed_identity: bool) -> dict[str, Any] | None:
    if to is not None:
        return parse_destination(read_destination(to), container, managed_identity=managed_identity)
    if container is not None or managed_identity:
        raise InvalidRequest("--container and --managed-identity go with --to, which names the destination.")
    return None


def _show(report: OperationReport, *, as_json: bool) -> None:
    if as_json:
        print_json(report.body)
        return
    typer.echo(summary_text(report))
    if report.error is not None:
        typer.echo(f"error      {report.error.message} ({report.error.code})")


def _row(report: OperationReport) -> str:
    percent = "" if report.is_ended or not report.percent_complete else f" {report.percent_complete}%"
    return (
        f"{report.id:32}  {report.created_at:%Y-%m-%d %H:%M}  {report.status + percent:10}  {report.exported:>11,}"
        f"  {report.skipped:>9,}  {decimal(report.bytes_exported):>9}"
    )
