"""`dicom-depot identity`: show, enable and disable the managed identity, and check whether it may write somewhere.

Asks the running service, whose surroundings decide what identity there is; `--local` asks in this process instead.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dicom_depot import wiring
from dicom_depot.cli.client import ServiceClient, service_url
from dicom_depot.cli.common import (
    ExitCode,
    ServiceOption,
    TokenOption,
    load_settings,
    out,
    print_json,
)
from dicom_depot.cli.progress import explained_answers
from dicom_depot.cli.settings_command import with_setting_flags
from dicom_depot.config import Settings
from dicom_depot.domain.errors import IdentityDisabled, IdentityUnavailable
from dicom_depot.domain.identity import IdentityDescription
from dicom_depot.export.destination_check import DestinationCheck, check_destination
from dicom_depot.ports import ManagedIdentity

app = typer.Typer(help="The managed identity that exports sign in with, and what it may do.", no_args_is_help=True)

_NO_IDENTITY = frozenset({IdentityUnavailable.code, IdentityDisabled.code})
_MARKS = {"passed": "passed", "failed": "FAILED", "notTried": "-"}

_LocalOption = Annotated[bool, typer.Option("--local", help="Work in this process, on the data folder.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, as the API answers.")]
_UriArgument = Annotated[
    str, typer.Argument(metavar="CONTAINER_URI", help="https://<account>.blob.core.windows.net/<container>")
]


def show(
    context: typer.Context,
    service: ServiceOption = None,
    token: TokenOption = None,
    local: _LocalOption = False,
    as_json: _JsonOption = False,
) -> None:
    """Show whether the managed identity is on, and whose it is."""
    settings = load_settings(context)
    with explained_answers(as_json=as_json, failures=_NO_IDENTITY):
        state = _local_state(settings) if local else _ask(settings, service, token, "GET", "/v2/identity")
    _print_state(state, as_json=as_json)


def enable(
    context: typer.Context,
    service: ServiceOption = None,
    token: TokenOption = None,
    local: _LocalOption = False,
    as_json: _JsonOption = False,
) -> None:
    """Let exports use the managed identity. It stays off where this host has none (exit status 4)."""
    _switch(load_settings(context), service, token, is_on=True, local=local, as_json=as_json)


def disable(
    context: typer.Context,
    service: ServiceOption = None,
    token: TokenOption = None,
    local: _LocalOption = False,
    as_json: _JsonOption = False,
) -> None:
    """Let exports use the managed identity no more. Those that run with it fail; they can be resumed later."""
    _switch(load_settings(context), service, token, is_on=False, local=local, as_json=as_json)


def check(
    context: typer.Context,
    container_uri: _UriArgument,
    service: ServiceOption = None,
    token: TokenOption = None,
    local: _LocalOption = False,
    as_json: _JsonOption = False,
) -> None:
    """Try, step by step, whether exports with the managed identity may write to a container (exit status 4: no)."""
    settings = load_settings(context)
    wanted: dict[str, object] = {"blobContainerUri": container_uri, "useManagedIdentity": True}
    with explained_answers(as_json=as_json, failures=_NO_IDENTITY):
        if local:
            with wiring.opened_identity(settings) as (_, destinations):
                checked = _check_body(check_destination(destinations, destinations.parse("azureBlob", wanted)))
        else:
            body = {"destination": {"type": "azureBlob", "settings": wanted}}
            checked = _ask(settings, service, token, "POST", "/v2/destinations/check", body)
    if as_json:
        print_json(checked)
    else:
        for step in checked["steps"]:
            line = f"{step['step']:<10} {_MARKS[step['outcome']]:<7} {step['message']}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        if checked["remedy"] is not None:
            out.print(f"\n{checked['remedy']}", markup=False, highlight=False, soft_wrap=True)
    if not checked["ok"]:
        raise typer.Exit(int(ExitCode.FAILED))


for _name, _command in (("show", show), ("enable", enable), ("disable", disable), ("check", check)):
    app.command(_name)(with_setting_flags(_command))


def _switch(
    settings: Settings, service: str | None, token: str | None, *, is_on: bool, local: bool, as_json: bool
) -> None:
    with explained_answers(as_json=as_json, failures=_NO_IDENTITY):
        if local:
            with wiring.opened_identity(settings) as (identity, _):
                identity.set_enabled(on=is_on)
                state = _state_body(identity)
        else:
            state = _ask(settings, service, token, "PUT", "/v2/identity", {"status": "On" if is_on else "Off"})
    _print_state(state, as_json=as_json)


def _local_state(settings: Settings) -> dict[str, Any]:
    with wiring.opened_identity(settings) as (identity, _):
        return _state_body(identity)


def _state_body(identity: ManagedIdentity) -> dict[str, Any]:
    """As the API answers."""
    if not identity.is_enabled():
        return {"status": "Off"}
    try:
        described = identity.describe()
    except IdentityUnavailable as error:
        return {"status": "On", "error": {"code": error.code, "message": error.message, "target": None}}
    return {"status": "On"} | {name: value for name, value in _described(described).items() if value}


def _described(identity: IdentityDescription) -> dict[str, str]:
    return {
        "principalId": identity.principal_id,
        "tenantId": identity.tenant_id,
        "clientId": identity.client_id,
        "host": identity.host,
        "tokenExpiresOn": f"{identity.expires_at:%Y-%m-%dT%H:%M:%SZ}",
    }


def _check_body(checked: DestinationCheck) -> dict[str, Any]:
    """As the API answers."""
    steps = [{"step": str(each.step), "outcome": str(each.outcome), "message": each.message} for each in checked.steps]
    return {"ok": checked.is_ok, "steps": steps, "remedy": checked.remedy}


def _print_state(state: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(state)
        return
    names = {
        "status": "status",
        "principalId": "object (principal) id",
        "tenantId": "tenant id",
        "clientId": "client id",
        "host": "host",
        "tokenExpiresOn": "token expires on",
    }
    for name, shown in names.items():
        if name in state:
            out.print(f"{shown:<22} {state[name]}", markup=False, highlight=False, soft_wrap=True)
    if "error" in state:
        out.print(f"{'no token':<22} {state['error']['message']}", markup=False, highlight=False, soft_wrap=True)


def _ask(
    settings: Settings, service: str | None, token: str | None, method: str, path: str, body: object = None
) -> dict[str, Any]:
    client = ServiceClient(service_url(service, settings), token=token)
    try:
        return client.ask(method, path, body)
    finally:
        client.close()
