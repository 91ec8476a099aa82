"""The service's managed identity: which kind of host gives it, a token through azure-identity, and what to do when
there is none.

azure-identity finds the host by the variables that Azure sets; they are looked at here, too, to name the host and to
say what it lacks. Its own caches are not used: they hand out tokens that are about to end. Tokens are never logged or
shown.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from azure.core.exceptions import ServiceRequestError, ServiceResponseError
from azure.identity import AzureCliCredential, ManagedIdentityCredential, WorkloadIdentityCredential

from dicom_depot.adapters.switches_sql import SqlSwitches
from dicom_depot.adapters.token_cache import TokenCache
from dicom_depot.domain.errors import IdentityDisabled, IdentityUnavailable
from dicom_depot.domain.identity import AccessToken, IdentityDescription

SWITCH = "managed_identity"
SCOPE = "https://storage.azure.com/.default"

HOW_TO_SWITCH_ON = (
    'Switch it on with PUT /v1/identity {"status": "On"} or `dicom-depot identity enable`, and grant its principal '
    "the role Storage Blob Data Contributor."
)

_SWITCH_SECONDS = 2.0
"""How long the switch's position is believed before it is read again."""
_CLI_SECONDS = 10
_BOUNDS: Mapping[str, Any] = {
    "connection_timeout": 2,
    "read_timeout": 4,
    "timeout": 5,
    "retry_total": 2,
    "retry_connect": 0,
    "retry_read": 0,
    "retry_status": 2,
    "retry_backoff_factor": 0.2,
    "retry_backoff_max": 1,
}
"""A host without an identity endpoint is told apart within seconds; a status that may pass is asked again twice."""
_REASON_LENGTH_MAX = 300
_LOOKS_SECRET = re.compile(r"[A-Za-z0-9_.~+/=-]{48,}")

Source = Literal["auto", "managed", "workload", "cli"]


class HostKind(StrEnum):
    """What gives the service its identity, in the words that an operator sees."""

    APP_SERVICE = "App Service"
    ARC = "Azure Arc"
    WORKLOAD = "AKS workload identity"
    VIRTUAL_MACHINE = "virtual machine"
    CLI = "Azure CLI"


class Claims(NamedTuple):
    """What a token says of itself, unverified: it is for the storage service to judge. Empty where it says nothing."""

    principal_id: str = ""
    tenant_id: str = ""
    client_id: str = ""
    audience: str = ""
    expires_at: datetime | None = None


class AzureManagedIdentity:
    """`ports.ManagedIdentity` by azure-identity."""

    def __init__(
        self,
        switches: SqlSwitches,
        *,
        source: Source,
        client_id: str | None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """client_id: of a user-assigned identity. environment: where Azure says what kind of host this is."""
        self._switches = switches
        self._source: Source = source
        self._client_id = client_id
        self._environment = environment
        self._cache = TokenCache(self._ask)
        self._switch_seen: tuple[bool, float] = (False, float("-inf"))

    def is_enabled(self) -> bool:
        is_on = self._switches.is_on(SWITCH)
        self._switch_seen = (is_on, time.monotonic())
        if not is_on:
            self._cache.clear()
        return is_on

    def set_enabled(self, *, on: bool) -> None:
        if on:
            self._cache.renew()
        self._switches.set(SWITCH, is_on=on)
        self.is_enabled()

    def describe(self) -> IdentityDescription:
        token = self.token()
        claims = claims_of(token.token)
        return IdentityDescription(
            principal_id=claims.principal_id,
            tenant_id=claims.tenant_id,
            client_id=claims.client_id,
            host=str(self.host),
            expires_at=token.expires_at,
        )

    def token(self) -> AccessToken:
        is_on, seen_at = self._switch_seen
        if time.monotonic() - seen_at >= _SWITCH_SECONDS:
            is_on = self.is_enabled()
        if not is_on:
            raise IdentityDisabled(f"The managed identity of this service is switched off. {HOW_TO_SWITCH_ON}")
        return self._cache.get()

    def discard(self, token: AccessToken) -> None:
        self._cache.discard(token)

    @property
    def host(self) -> HostKind:
        """The kind of host, by azure-identity's own rules and in its order, unless the setting says it."""
        given = self._environment.get
        if self._source == "cli":
            return HostKind.CLI
        if self._source == "workload":
            return HostKind.WORKLOAD
        if given("IDENTITY_ENDPOINT") and given("IDENTITY_HEADER"):
            return HostKind.APP_SERVICE
        if given("IDENTITY_ENDPOINT") and given("IMDS_ENDPOINT"):
            return HostKind.ARC
        if self._source == "auto" and given("AZURE_FEDERATED_TOKEN_FILE"):
            return HostKind.WORKLOAD
        return HostKind.VIRTUAL_MACHINE

    def _ask(self) -> AccessToken:
        """One request for a token, or one run of the Azure CLI."""
        try:
            with closing(self._credential()) as credential:
                answer = credential.get_token(SCOPE)
        except Exception as error:  # whatever the libraries make of a missing endpoint, a refusal or a strange answer
            raise IdentityUnavailable(self._explanation(error)) from None
        claims = claims_of(answer.token)
        expires_at = datetime.fromtimestamp(answer.expires_on, UTC)
        if claims.expires_at is not None:
            expires_at = min(expires_at, claims.expires_at)
        if expires_at <= datetime.now(UTC):
            raise IdentityUnavailable(
                f"{self._named} gave a token that expired already, at {expires_at:%Y-%m-%dT%H:%M:%SZ}. "
                "Check the clock of this machine; if it is right, restart the identity endpoint or the host."
            )
        return AccessToken(answer.token, expires_at)

    def _credential(self) -> AzureCliCredential | ManagedIdentityCredential | WorkloadIdentityCredential:
        match self.host:
            case HostKind.CLI:
                return AzureCliCredential(process_timeout=_CLI_SECONDS)
            case HostKind.WORKLOAD:
                return WorkloadIdentityCredential(client_id=self._client_id, **_BOUNDS)
            case _:
                # The endpoints are the machine's own: a proxy of the environment would only see the request.
                return ManagedIdentityCredential(
                    client_id=self._client_id,
                    _exclude_workload_identity_credential=True,
                    use_env_settings=False,
                    **_BOUNDS,
                )

    @property
    def _named(self) -> str:
        """The giver of tokens as the beginning of a sentence."""
        return {
            HostKind.APP_SERVICE: "App Service",
            HostKind.ARC: "The Azure Arc agent",
            HostKind.WORKLOAD: "Microsoft Entra ID (AKS workload identity)",
            HostKind.VIRTUAL_MACHINE: "The virtual machine's identity endpoint",
            HostKind.CLI: "The Azure CLI",
        }[self.host]

    def _explanation(self, error: BaseException) -> str:
        """What the host lacks and how to get it, with the endpoint's own reason where it gave one."""
        remedy = self._remedy(is_unreachable=_is_unreachable(error))
        reason = _reason(error)
        return f"{self._named} gave no token: {remedy}" + (f" Its answer: {reason}" if reason else "")

    def _remedy(self, *, is_unreachable: bool) -> str:
        user_assigned = (
            f"the user-assigned identity with client id {self._client_id} is not assigned to it, or "
            "DICOM_DEPOT_IDENTITY_CLIENT_ID is wrong"
        )
        match self.host, is_unreachable:
            case HostKind.APP_SERVICE, True:
                return "the endpoint in IDENTITY_ENDPOINT does not answer. Restart the app."
            case HostKind.APP_SERVICE, False if self._client_id:
                return f"{user_assigned}. Assign it under Settings, Identity, User assigned, then restart the app."
            case HostKind.APP_SERVICE, False:
                return (
                    "its system-assigned identity is off. Switch it on under Settings, Identity, or with "
                    "`az webapp identity assign --name <app> --resource-group <group>`, then restart the app. For a "
                    "user-assigned identity set DICOM_DEPOT_IDENTITY_CLIENT_ID."
                )
            case HostKind.ARC, True:
                return "the endpoint in IDENTITY_ENDPOINT does not answer. See `azcmagent show`, and restart himds."
            case HostKind.ARC, False:
                return (
                    "the machine is not connected, or the service's user is not in the group himds, which may read "
                    "the agent's keys: `usermod --append --groups himds <user>`."
                )
            case HostKind.WORKLOAD, _:
                return self._workload_remedy(is_unreachable=is_unreachable)
            case HostKind.VIRTUAL_MACHINE, True:
                return (
                    "nothing answers at the instance metadata service (169.254.169.254). Either this machine is no "
                    "Azure virtual machine, or a firewall or network policy blocks that address. On App Service, Azure "
                    "Arc and AKS the variables that Azure sets (IDENTITY_ENDPOINT, AZURE_FEDERATED_TOKEN_FILE, ...) "
                    "must reach the service's process; elsewhere use a SAS, or DICOM_DEPOT_IDENTITY_SOURCE=cli with "
                    "the Azure CLI."
                )
            case HostKind.VIRTUAL_MACHINE, False if self._client_id:
                return f"{user_assigned}. Assign it with `az vm identity assign --identities <resource id>`."
            case HostKind.VIRTUAL_MACHINE, False:
                return (
                    "the machine has no system-assigned identity. Switch it on with "
                    "`az vm identity assign --name <machine> --resource-group <group>`. For a user-assigned identity "
                    "set DICOM_DEPOT_IDENTITY_CLIENT_ID."
                )
            case _:
                return "sign in with `az login`, as the user that the service runs as."

    def _workload_remedy(self, *, is_unreachable: bool) -> str:
        path = self._environment.get("AZURE_FEDERATED_TOKEN_FILE")
        needed = ("AZURE_TENANT_ID", "AZURE_FEDERATED_TOKEN_FILE")
        missing = [name for name in needed if not self._environment.get(name)]
        if not (self._client_id or self._environment.get("AZURE_CLIENT_ID")):
            missing.append("AZURE_CLIENT_ID")
        if missing:
            return (
                f'{", ".join(missing)} is not set. The pod needs the label azure.workload.identity/use: "true", and '
                "its service account the annotation azure.workload.identity/client-id."
            )
        if path is not None and not os.access(path, os.R_OK):
            return f"the service account's token, {path} (AZURE_FEDERATED_TOKEN_FILE), cannot be read."
        if is_unreachable:
            authority = self._environment.get("AZURE_AUTHORITY_HOST", "https://login.microsoftonline.com")
            return f"{authority} cannot be reached. Allow that host in the firewall or network policy."
        return (
            "the federated credential does not fit. Issuer, subject (system:serviceaccount:<namespace>:<account>), "
            "tenant and client id must be those of the identity's federated credential: "
            "`az identity federated-credential list`."
        )


def claims_of(token: str) -> Claims:
    """What a JWT's payload says; nothing is verified, and nothing of it may be missed."""
    try:
        payload = token.split(".")[1]
        content = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        expiry = content.get("exp")
        return Claims(
            principal_id=str(content.get("oid") or content.get("sub") or ""),
            tenant_id=str(content.get("tid") or ""),
            client_id=str(content.get("appid") or content.get("azp") or ""),
            audience=str(content.get("aud") or ""),
            expires_at=datetime.fromtimestamp(expiry, UTC) if isinstance(expiry, int | float) else None,
        )
    except (IndexError, ValueError, AttributeError, OverflowError, OSError, binascii.Error):
        return Claims()


def _is_unreachable(error: BaseException) -> bool:
    """Whether nobody answered; the libraries wrap that differently for each host."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ServiceRequestError | ServiceResponseError):
            return True
        link = link.__cause__ or link.__context__
    return False


def _reason(error: BaseException) -> str:
    """What the endpoint said, in one bounded line without anything that looks like a token or key."""
    text = " ".join(str(error).split())
    found = re.search(r"AADSTS\d+.*|Token request error: .*|Error: .*|Please run .*|Azure CLI not found.*", text)
    if found is None:
        return ""
    reason = _LOOKS_SECRET.sub("(left out)", found[0])
    reason = "".join(character for character in reason if character.isprintable())
    return reason if len(reason) <= _REASON_LENGTH_MAX else reason[:_REASON_LENGTH_MAX] + "..."
