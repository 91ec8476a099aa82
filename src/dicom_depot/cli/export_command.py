"""`dicom-depot export`: starts an export in a running service or in this process, and may wait for its end.

A destination often holds a secret. Nothing here prints one: not in messages, not in progress, not in JSON.
"""

from __future__ import annotations

import getpass
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer
from rich.filesize import decimal

from dicom_depot import wiring
from dicom_depot.cli.client import OperationReference, OperationReport, ServiceClient, service_url
from dicom_depot.cli.common import ExitCode, ServiceOption, TokenOption, err, fail, load_settings, print_json
from dicom_depot.cli.export_source import STDIN, Asked, read_source
from dicom_depot.cli.progress import OperationProgress, explained_answers, tell_end
from dicom_depot.config import PREFIX, Settings
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.export import ExportSpecification
from dicom_depot.domain.operation import OperationId
from dicom_depot.domain.search import Level
from dicom_depot.telemetry import set_up_logging
from dicom_depot.web import bodies
from dicom_depot.web.models import dry_run_result, operation_state

DESTINATION_VARIABLE = PREFIX + "EXPORT_TO"

_FOLDER_SCHEME = "file:"
_LOCAL_PAUSE_SECONDS = 0.25
_UNMATCHED_SHOWN = 10
_FORMS = "https://ACCOUNT.blob.core.windows.net/CONTAINER?SAS, a connection string with --container, or file:FOLDER"


def export(
    context: typer.Context,
    identifiers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IDENTIFIER", help=r"STUDY\[/SERIES\[/INSTANCE]], by UID; `-` reads a list from standard input."
        ),
    ] = None,
    list_file: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FILE", help="Read identifiers from a file, one a line; `#` begins a comment; `-`: stdin."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Export all that is stored.")] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Export what a search finds now: an attribute and what it must match, e.g. Modality=CT or "
            "StudyDate=20240101-20241231. Repeat it for more; all must match.",
        ),
    ] = None,
    level: Annotated[
        Level | None,
        typer.Option(
            metavar="LEVEL",
            case_sensitive=False,
            help="With --where: what must match and is exported whole: study, series or instance. Default: series, or "
            "instance where an attribute needs it.",
        ),
    ] = None,
    fuzzy: Annotated[
        bool, typer.Option("--fuzzy", help="With --where: match the words of names by their beginnings.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar=DESTINATION_VARIABLE,
            help="Destination: a container's URL with its SAS (quote it), a connection string with --container, or "
            "file:FOLDER below the service's export root. `-` reads it from standard input, so that a secret need not "
            "stand in the shell's history.",
        ),
    ] = None,
    container: Annotated[
        str | None, typer.Option(metavar="NAME", help="Container, when --to is a connection string.")
    ] = None,
    managed_identity: Annotated[
        bool,
        typer.Option(
            "--managed-identity", help="Sign in to the container of --to as the service: no secret is needed."
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the export has ended.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be copied; write nothing.")] = False,
    in_process: Annotated[
        bool, typer.Option("--local", help="Run the export in this process, without a service; waits for its end.")
    ] = False,
    service: ServiceOption = None,
    token: TokenOption = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The same key with the same export starts it once, however often it is sent."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Copy studies, series or instances as .dcm files to a cloud container or a folder.

    Exit status:
    0 all was copied, or the export was started (without --wait)
    2 wrong usage, or the service refused the export
    3 some were skipped, see errors.log; of a dry run: some identifiers match nothing
    4 failed, or the service cannot be reached
    5 canceled
    130 interrupted; the export goes on
    """
    settings = load_settings(context)
    try:
        body = export_body(
            read_source(
                Asked(identifiers or (), list_file, everything, where or (), level, fuzzy), is_stdin_taken=to == STDIN
            ),
            parse_destination(read_destination(to), container, managed_identity=managed_identity),
        )
        if in_process and service is not None:
            raise InvalidRequest("Give either --local or --service, not both.")
    except InvalidRequest as error:
        fail(error.message, ExitCode.USAGE)
    with explained_answers(as_json=as_json), _opened(settings, service, token, in_process=in_process) as exports:
        if dry_run:
            raise typer.Exit(_tell_dry_run(exports.dry_run(body), as_json=as_json))
        operation = exports.start(body, idempotency_key)
        if wait or in_process:
            raise typer.Exit(wait_for_end(exports, operation.id, as_json=as_json, is_local=in_process))
        if as_json:
            print_json(operation._asdict())
            return
        typer.echo(f"operation  {operation.id}\nstate      {operation.href}")
        err.print(f"Follow it with: dicom-depot operations watch {operation.id}", highlight=False, soft_wrap=True)


class Exports(Protocol):
    """What this command needs of a service, be it far away or in this process."""

    def start(self, body: Mapping[str, Any], idempotency_key: str | None) -> OperationReference: ...

    def dry_run(self, body: Mapping[str, Any]) -> dict[str, Any]: ...

    def watch(
        self, operation_id: str, on_report: Callable[[OperationReport], None], say: Callable[[str], None]
    ) -> OperationReport: ...


def wait_for_end(exports: Exports, operation_id: str, *, as_json: bool, is_local: bool = False) -> ExitCode:
    """Show the progress of an operation until it has ended; Ctrl-C ends only the watching."""
    try:
        with OperationProgress() as progress:
            report = exports.watch(operation_id, progress.show, progress.say)
    except KeyboardInterrupt:
        goes_on = (
            "The next `dicom-depot serve` or `dicom-depot export --local` on this data folder goes on with it."
            if is_local
            else f"It goes on in the service. Follow it: dicom-depot operations watch {operation_id}; "
            f"stop it: dicom-depot operations cancel {operation_id}"
        )
        err.print(f"Interrupted; operation {operation_id} is not. {goes_on}", highlight=False, soft_wrap=True)
        return ExitCode.INTERRUPTED
    return tell_end(report, as_json=as_json)


def export_body(source: Mapping[str, Any] | None, destination: Mapping[str, Any]) -> dict[str, Any]:
    """The request as the API takes it. None: everything."""
    return {"destination": destination} if source is None else {"source": source, "destination": destination}


def parse_destination(text: str, container: str | None, *, managed_identity: bool = False) -> dict[str, Any]:
    """`--to` as the API's `destination`. Raises InvalidRequest, which never holds the text: it may be a secret."""
    is_url = text.lower().startswith(("http://", "https://"))
    is_folder = text.lower().startswith(_FOLDER_SCHEME)
    if container is not None and (is_url or is_folder):
        raise InvalidRequest("--container belongs to a connection string; a URL names its container itself.")
    if managed_identity and not is_url:
        raise InvalidRequest("--managed-identity goes with a container's URL: --to https://ACCOUNT.blob.../CONTAINER")
    if is_url:
        signed_in = {"useManagedIdentity": True} if managed_identity else {}
        return {"type": "azureBlob", "settings": {"blobContainerUri": text, **signed_in}}
    if is_folder:
        folder = text[len(_FOLDER_SCHEME) :]
        if folder.startswith("/"):
            raise InvalidRequest(
                f"A folder destination lies below the service's export root ({PREFIX}EXPORT_ROOT), so it is relative: "
                "--to file:research/2024"
            )
        return {"type": "file", "settings": {"folder": folder}}
    if "=" not in text:
        raise InvalidRequest(f"The destination is none of these: {_FORMS}.")
    if container is None:
        raise InvalidRequest("A connection string does not name a container: add --container NAME.")
    return {"type": "azureBlob", "settings": {"connectionString": text, "blobContainerName": container}}


def read_destination(to: str | None) -> str:
    if to == STDIN:
        # A terminal must not show it; a pipe has it in its first line.
        to = getpass.getpass("Destination (not shown): ") if sys.stdin.isatty() else sys.stdin.readline()
    if to is None or not to.strip():
        raise InvalidRequest(f"Name the destination with --to or {DESTINATION_VARIABLE}: {_FORMS}.")
    return to.strip()


def _tell_dry_run(counted: dict[str, Any], *, as_json: bool) -> ExitCode:
    unmatched = counted["unmatched"]
    if as_json:
        print_json(counted)
    else:
        typer.echo(f"This would copy {counted['count']:,} instances, {decimal(counted['bytes'])}.")
        if not counted["count"] and not unmatched:
            typer.echo("Nothing that is stored matches.")
        if unmatched:
            typer.echo(f"Identifiers that match nothing and would be skipped: {len(unmatched):,}")
            for text in unmatched[:_UNMATCHED_SHOWN]:
                typer.echo(f"  {text}")
            if len(unmatched) > _UNMATCHED_SHOWN:
                typer.echo(f"  and {len(unmatched) - _UNMATCHED_SHOWN:,} more; --json lists all")
    return ExitCode.SOME_SKIPPED if unmatched else ExitCode.OK


@contextmanager
def _opened(settings: Settings, url: str | None, token: str | None, *, in_process: bool) -> Iterator[Exports]:
    if in_process:
        set_up_logging("ERROR" if settings.log_level == "ERROR" else "WARNING")  # progress tells the rest
        opened = wiring.open_service(settings)
        try:
            yield _LocalExports(opened)
        finally:
            opened.close()
        return
    client = ServiceClient(service_url(url, settings), token=token)
    try:
        yield client
    finally:
        client.close()


class _LocalExports:
    """`Exports` on a service that was opened in this process: the same answers, without HTTP."""

    def __init__(self, service: wiring.Service) -> None:
        self._service = service

    def start(self, body: Mapping[str, Any], idempotency_key: str | None) -> OperationReference:
        operation = self._service.exports.start(self._specification(body), idempotency_key)
        return OperationReference(operation.id, "")

    def dry_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return dry_run_result(self._service.exports.dry_run(self._specification(body))).to_json()

    def watch(
        self, operation_id: str, on_report: Callable[[OperationReport], None], say: Callable[[str], None]
    ) -> OperationReport:
        while True:
            operation = self._service.exports.get(OperationId(operation_id))
            report = OperationReport.parse(operation_state(operation, 2, "").to_json())
            on_report(report)
            if report.is_ended:
                return report
            time.sleep(_LOCAL_PAUSE_SECONDS)

    def _specification(self, body: Mapping[str, Any]) -> ExportSpecification:
        content = bodies.parse_json(json.dumps(body).encode())
        service = self._service
        source = bodies.parse_source(content, service.settings.max_identifiers, service.searches.extended)
        return ExportSpecification(source, bodies.parse_destination(content, service.exports.destinations))
