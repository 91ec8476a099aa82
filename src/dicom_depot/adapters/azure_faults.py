"""What a failed request to Azure means: which fault is transient, permanent or one instance's, what stood in the way,
and what to do. Decided here and nowhere else.

Messages are made from status, error code and the claims of our own token: what a server or a library says may hold
parts of the request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from urllib.parse import urlsplit

from azure.core.exceptions import AzureError, HttpResponseError, ServiceResponseTimeoutError
from obstore.exceptions import BaseError

from dicom_depot.adapters.managed_identity import HOW_TO_SWITCH_ON, Claims, claims_of
from dicom_depot.domain.errors import DestinationFault, FaultKind, IdentityDisabled, IdentityUnavailable, Obstacle
from dicom_depot.domain.identity import AccessToken

ERRORS = (BaseError, FileNotFoundError, AzureError)
"""What the two libraries raise."""

DEAD_PROXY = "http://127.0.0.1:0"
"""A port that never answers: where requests end that a redirect would send elsewhere (`azure_clients`)."""

STORAGE_AUDIENCE = "https://storage.azure.com"

TOKEN_MISSING = "TokenMissing"  # noqa: S105  (an error code)
"""obstore asked for a token in the midst of an upload, and there was none."""

_CONTAINER_CODES = frozenset(
    {
        "ContainerBeingDeleted",
        "ContainerNotFound",
        "ContainerDisabled",
        "AccountIsDisabled",
        "AccountBeingCreated",
    }
)
_SIGN_IN_CODES = frozenset({"AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"})
_CLOCK_TOLERANCE = timedelta(seconds=1)
_GUID = re.compile(r"[0-9a-fA-F-]{36}")


@dataclass(frozen=True, slots=True)
class Place:
    """The container that requests go to, and how they are signed in."""

    endpoint: str
    container: str
    uses_identity: bool
    is_cli_identity: bool = False

    @property
    def account(self) -> str:
        parts = urlsplit(self.endpoint)
        return parts.path.strip("/") or (parts.hostname or "").split(".", 1)[0]

    def __str__(self) -> str:
        return f"container '{self.container}' of account '{self.account}'"


def fault_of(error: BaseException, place: Place, token: AccessToken | None) -> DestinationFault:
    """The fault that a failed request was. token: of the managed identity, the one that the request began with."""
    status, code = status_and_code(error)
    obstacle = _obstacle(status, code)
    kind = _kind(status, code)
    claims = Claims() if token is None else claims_of(token.token)
    if token is not None and obstacle is Obstacle.SIGN_IN and token.expires_at <= datetime.now(UTC) + _CLOCK_TOLERANCE:
        kind = FaultKind.TRANSIENT  # it ended on its way; there is another one
    what, remedy = _explained(status, code, place, claims)
    return DestinationFault(
        code,
        what if remedy is None else f"{what} {remedy}",
        kind,
        retry_after_seconds=_retry_after(error),
        obstacle=obstacle,
        remedy=remedy,
    )


def no_token(error: IdentityUnavailable) -> DestinationFault:
    """The fault of a request that could not be signed in. An identity that was switched off does not come back."""
    is_off = isinstance(error, IdentityDisabled)
    return DestinationFault(
        error.code,
        error.message,
        FaultKind.PERMANENT if is_off else FaultKind.TRANSIENT,
        obstacle=Obstacle.SIGN_IN,
        remedy=HOW_TO_SWITCH_ON if is_off else None,
    )


def role_assignment(place: Place, principal_id: str) -> str:
    """The command that grants the identity what an export needs, on this container."""
    principal = principal_id if _GUID.fullmatch(principal_id) else "<principal id>"
    # Whoever signed in to the Azure CLI may be a user or a principal; az then finds out by itself.
    kind = "" if place.is_cli_identity else " --assignee-principal-type ServicePrincipal"
    return (
        f"az role assignment create --assignee-object-id {principal}{kind} "
        '--role "Storage Blob Data Contributor" '
        f'--scope "$(az storage account show --name {place.account} --query id --output tsv)'
        f'/blobServices/default/containers/{place.container}"'
    )


def status_and_code(error: BaseException) -> tuple[int | None, str]:
    """HTTP status (None: no answer) and error code. The text of obstore's errors is the only place that has them."""
    if isinstance(error, HttpResponseError) and error.status_code is not None:
        if 300 <= error.status_code < 400:
            return error.status_code, "RedirectRefused"
        code = getattr(error, "error_code", None)
        named = re.fullmatch(r"\w{1,64}", str(code.value if isinstance(code, Enum) else code or ""))
        return error.status_code, named[0] if named else f"Status{error.status_code}"
    if isinstance(error, AzureError):
        return None, "TimedOut" if isinstance(error, ServiceResponseTimeoutError) else "ConnectionFailed"
    text = str(error)
    if "External Azure credential provider" in text:
        return None, TOKEN_MISSING
    if re.search(r"status code: 3\d\d|BareRedirect|\b127\.0\.0\.1:0\b", text):
        return 302, "RedirectRefused"
    found = re.search(r"status code: (\d{3})", text)
    if found is not None:
        status = int(found[1])
        code = re.search(r"<Code>(\w{1,64})</Code>", text)
        return status, code[1] if code else f"Status{status}"
    if "dns error" in text:
        return None, "NameNotResolved"
    kind = re.search(r"HttpError \{\s+kind: (\w+)", text)
    names = {"Connect": "ConnectionFailed", "Interrupted": "ConnectionReset", "Timeout": "TimedOut"}
    return None, names.get(kind[1] if kind else "", "RequestFailed")


def _kind(status: int | None, code: str) -> FaultKind:
    if status is None or status >= 500 or status in (408, 429):
        return FaultKind.TRANSIENT
    if status < 400 or status in (401, 403, 404) or code in _CONTAINER_CODES:
        return FaultKind.PERMANENT
    return FaultKind.INSTANCE


def _obstacle(status: int | None, code: str) -> Obstacle:
    if status is None or _kind(status, code) is FaultKind.TRANSIENT or status < 400:
        return Obstacle.REACH
    if status == 401 or code in _SIGN_IN_CODES:
        return Obstacle.SIGN_IN
    if status == 404 or code in _CONTAINER_CODES:
        return Obstacle.CONTAINER
    return Obstacle.WRITE


def _explained(status: int | None, code: str, place: Place, claims: Claims) -> tuple[str, str | None]:
    """What is wrong, and what to do about it."""
    answer = f"({status} {code})"
    match status:
        case 401 | 403 if place.uses_identity and _obstacle(status, code) is Obstacle.SIGN_IN:
            return f"the {place} did not accept the managed identity's token {answer}.", _token_remedy(claims)
        case 401 | 403 if place.uses_identity:
            what = (
                f"the {place} refused the write of the managed identity {answer}: it needs the role Storage Blob Data "
                "Contributor there."
            )
            return what, _role_remedy(code, place, claims)
        case 401 | 403:
            remedy = (
                "The SAS must be valid now and grant create and write on this container; make a new one and start the "
                "export again."
            )
            return f"the {place} refused the write {answer}.", remedy
        case 404:
            return f"the {place} does not exist {answer}.", "Create it, or correct its name."
        case None:
            return f"the {place} could not be reached ({code}).", "Check the name, the network and the port."
        case _ if status < 400:
            return (
                f"the {place} answered with a redirect {answer}, and redirects are never followed.",
                "Give the endpoint's own URL.",
            )
        case _:
            return f"the {place} answered {status} {code}.", None


def _role_remedy(code: str, place: Place, claims: Claims) -> str:
    firewall = "Or the account's firewall keeps this service out: allow its network under Networking. "
    return (
        f"Grant it with: {role_assignment(place, claims.principal_id)} - a new assignment takes a few minutes, at "
        f"times ten, to work. {firewall if code == 'AuthorizationFailure' else ''}Then try again."
    )


def _token_remedy(claims: Claims) -> str:
    now = datetime.now(UTC)
    if claims.audience and claims.audience.rstrip("/") != STORAGE_AUDIENCE:
        return (
            f"The token is for the audience '{_plain(claims.audience)}' instead of {STORAGE_AUDIENCE}: whatever gives "
            "this host its tokens ignores what it was asked for. Correct that, then try again."
        )
    if claims.expires_at is not None and claims.expires_at <= now:
        return (
            f"The token expired at {claims.expires_at:%Y-%m-%dT%H:%M:%SZ}. Check this machine's clock, and try again."
        )
    return (
        f"The account must belong to the identity's tenant ({_plain(claims.tenant_id) or 'not named by the token'}), "
        "and the clock of this machine must be right; then try again."
    )


def _plain(text: str) -> str:
    return re.sub(r"[^\w./:-]", "", text)[:100]


def _retry_after(error: BaseException) -> float | None:
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if re.fullmatch(r"\d{1,6}", text) else None
