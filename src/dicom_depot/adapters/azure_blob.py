"""Azure Blob Storage as a destination: reading a caller's settings, and writing through obstore.

Which fault is transient, permanent or one instance's is decided here, in `_kind`, and nowhere else. Messages are made
from status and error code only: what a server or a library says may hold parts of the request.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qs, urlsplit

import obstore
from azure.core.exceptions import AzureError, HttpResponseError, ServiceResponseTimeoutError
from azure.storage.blob import BlobBlock, ContainerClient, ContentSettings
from obstore.exceptions import BaseError
from obstore.store import AzureStore

from dicom_depot.domain.errors import DestinationFault, DestinationRefused, FaultKind
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.ports import LogOutdated

if TYPE_CHECKING:
    from obstore.store import ClientConfig  # exists for type checkers only

TYPE = "azureBlob"
CONTENT_TYPE = "application/dicom"
LOG_CONTENT_TYPE = "application/x-ndjson"

CLOUD_SUFFIXES = (
    ".blob.core.windows.net",
    ".blob.storage.azure.net",
    ".blob.core.usgovcloudapi.net",
    ".blob.core.chinacloudapi.cn",
)
EMULATOR_ACCOUNT = "devstoreaccount1"
EMULATOR_ENDPOINT = f"http://127.0.0.1:10000/{EMULATOR_ACCOUNT}"
EMULATOR_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account key that every emulator has: published, no secret."""

_PROBE_SECONDS = 10.0
_CONNECT_SECONDS = 5.0
_REMOVE_SECONDS = 5.0
_STREAM_PART_BYTES = 8 * 1024 * 1024
_STREAM_PARTS_AT_ONCE = 2
_SMALL_LOG_BYTES = 16 * 1024 * 1024

_CONTAINER_NAME = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){2,62}")
_CONTAINER_CODES = frozenset(
    {
        "ContainerBeingDeleted",
        "ContainerNotFound",
        "ContainerDisabled",
        "AccountIsDisabled",
        "AccountBeingCreated",
    }
)


def parse_settings(
    settings: Mapping[str, Any], allowed_endpoints: Sequence[str], *, allow_anonymous: bool
) -> DestinationSpec:
    """Read `destination.settings` of an export request (members in camelCase). Raises DestinationRefused."""
    uri = str(settings.get("blobContainerUri") or "").strip()
    connection_string = str(settings.get("connectionString") or "").strip()
    container = str(settings.get("blobContainerName") or "").strip()
    use_identity = bool(settings.get("useManagedIdentity", False))
    if uri:
        if connection_string or container:
            raise _refused(
                "ConflictingSettings",
                "Give either blobContainerUri, or connectionString with blobContainerName, not both.",
                "blobContainerUri",
            )
        endpoint, container, secret = _parse_uri(uri, use_identity=use_identity)
        place = "blobContainerUri"
    elif connection_string and container:
        if use_identity:
            raise _refused(
                "ConflictingSettings",
                "A managed identity needs blobContainerUri; a connection string brings its own sign-in.",
                "useManagedIdentity",
            )
        endpoint, secret = _parse_connection_string(connection_string)
        place = "connectionString"
    else:
        raise _refused(
            "MissingSettings",
            "Give blobContainerUri, or both connectionString and blobContainerName.",
            "blobContainerUri",
        )
    _check_endpoint(endpoint, allowed_endpoints, place)
    _check_container(container, "blobContainerUri" if uri else "blobContainerName")
    if use_identity:
        raise _refused(
            "ManagedIdentityUnavailable",
            "This service has no managed identity. Give a URI with a SAS instead, and leave useManagedIdentity false.",
            "useManagedIdentity",
        )
    if secret is None and not allow_anonymous:
        raise _refused(
            "AnonymousAccessDisabled",
            "The destination names no sign-in. Add a SAS with create and write rights, "
            "or set DICOM_DEPOT_EXPORT_ALLOW_ANONYMOUS=true for a container that anybody may write to.",
            place,
        )
    public = {"endpoint": endpoint, "container": container}
    return DestinationSpec(TYPE, public, None if secret is None else json.dumps(secret))


def log_href(spec: DestinationSpec, key: str) -> str:
    return f"{spec.public['endpoint']}/{spec.public['container']}/{key}"


def _parse_uri(uri: str, *, use_identity: bool) -> tuple[str, str, dict[str, str] | None]:
    place = "blobContainerUri"
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:
        raise _refused("InvalidUri", "blobContainerUri is not a URL.", place) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _refused("InvalidUri", "blobContainerUri must be a complete https:// URL of a container.", place)
    if parts.username is not None or parts.password is not None or parts.fragment or "\\" in uri:
        raise _refused("InvalidUri", "blobContainerUri must not hold a user, a password or a fragment.", place)
    *account_path, container = [part for part in parts.path.split("/") if part] or [""]
    if not container or len(account_path) > 1:
        raise _refused(
            "InvalidUri",
            "blobContainerUri must name one container: https://<account>.blob.../<container>.",
            place,
        )
    is_signed = "sig" in {name.lower() for name in parse_qs(parts.query, keep_blank_values=True)}
    if parts.query and not is_signed:
        raise _refused("InvalidUri", "The query of blobContainerUri is not a SAS: it has no sig.", place)
    if is_signed and use_identity:
        raise _refused(
            "ConflictingSettings",
            "blobContainerUri brings a SAS; leave it out, or set useManagedIdentity to false.",
            "useManagedIdentity",
        )
    endpoint = "/".join([_address(parts), *account_path])
    return endpoint, container, {"sas": parts.query} if is_signed else None


def _parse_connection_string(text: str) -> tuple[str, dict[str, str] | None]:
    place = "connectionString"
    if text.lower().rstrip(";") == "usedevelopmentstorage=true":
        return EMULATOR_ENDPOINT, {"account_key": EMULATOR_KEY}
    values: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, separator, value = part.partition("=")
        if not separator or not value:
            raise _refused(
                "InvalidConnectionString",
                "connectionString must consist of Name=Value pairs split by ';'.",
                place,
            )
        values[name.strip().lower()] = value.strip()
    account = values.get("accountname", "")
    is_emulator = account == EMULATOR_ACCOUNT and not _is_of_the_cloud(values.get("blobendpoint", ""))
    if "accountkey" in values and not is_emulator:
        raise _refused(
            "AccountKeyRefused",
            "Account keys are not supported: they open the whole account. Use a SAS for the container.",
            place,
        )
    endpoint = values.get("blobendpoint", "").rstrip("/")
    if not endpoint and is_emulator:
        endpoint = EMULATOR_ENDPOINT
    if not endpoint and re.fullmatch(r"[a-z0-9]{3,24}", account):
        suffix = values.get("endpointsuffix", "core.windows.net")
        endpoint = f"{values.get('defaultendpointsprotocol', 'https')}://{account}.blob.{suffix}"
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.username is not None
        or any(character in endpoint for character in "?#\\")
    ):
        raise _refused(
            "InvalidConnectionString", "connectionString needs a BlobEndpoint, or a valid AccountName.", place
        )
    endpoint = "/".join([_address(parts), *(part for part in parts.path.split("/") if part)])
    sas = values.get("sharedaccesssignature", "").removeprefix("?")
    if sas:
        return endpoint, {"sas": sas}
    return endpoint, {"account_key": values["accountkey"]} if "accountkey" in values else None


def _address(parts: SplitResult) -> str:
    """Scheme, host and port in their usual spelling: what is compared with the operator's list."""
    host = parts.hostname or ""
    address = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{address}" if parts.port is None else f"{parts.scheme}://{address}:{parts.port}"


def _is_of_the_cloud(endpoint: str) -> bool:
    return any(suffix in endpoint.lower() for suffix in CLOUD_SUFFIXES)


def _check_endpoint(endpoint: str, allowed: Sequence[str], place: str) -> None:
    """Only the cloud's own names over HTTPS, or what the operator listed to the letter."""
    if endpoint in allowed:
        return
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    account = host.split(".", 1)[0]
    is_cloud = (
        parts.scheme == "https"
        and parts.port in (None, 443)
        and parts.path == ""
        and host.endswith(CLOUD_SUFFIXES)
        and re.fullmatch(r"[a-z0-9-]{3,40}", account) is not None
    )
    if not is_cloud:
        raise _refused(
            "EndpointNotAllowed",
            "The service may not send data to this endpoint. An operator can allow it by adding its "
            "scheme://host[:port][/account] to DICOM_DEPOT_EXPORT_ALLOWED_ENDPOINTS.",
            place,
        )


def _check_container(name: str, place: str) -> None:
    if not _CONTAINER_NAME.fullmatch(name):
        raise _refused(
            "InvalidContainerName",
            "The container's name must have 3 to 63 lower-case letters, digits and single hyphens, "
            "and begin and end with a letter or digit.",
            place,
        )


def _refused(code: str, message: str, member: str) -> DestinationRefused:
    return DestinationRefused(message, code=code, target=f"destination.settings.{member}")


class AzureDestination:
    """`ports.Destination` on one container."""

    def __init__(self, spec: DestinationSpec, *, request_seconds: float, content_md5: bool) -> None:
        self._container = spec.public["container"]
        self._account = _account(spec.public["endpoint"])
        try:
            self._probe = _store(spec, min(_PROBE_SECONDS, request_seconds))
            self._remover = _store(spec, min(_REMOVE_SECONDS, request_seconds))
            self._store = _store(spec, request_seconds)
            self._md5 = _Md5Writer(spec, request_seconds) if content_md5 else None
        except (BaseError, AzureError, ValueError):  # the libraries say no more; their text may hold the secret
            raise DestinationRefused(
                f"The sign-in for container '{self._container}' of account '{self._account}' cannot be read. "
                "Use the SAS as the portal shows it.",
                code="InvalidSignIn",
                target="destination.settings",
            ) from None

    def put(self, key: str, content: bytes) -> None:
        try:
            if self._md5 is not None:
                self._md5.put(key, content)
            else:
                obstore.put(self._store, key, content, attributes=_ATTRIBUTES, use_multipart=False)
        except _ERRORS as error:
            raise self._fault(error) from None

    def put_stream(self, key: str, blocks: Iterator[bytes], size: int) -> None:
        try:
            if self._md5 is not None:
                self._md5.put_stream(key, blocks)
            else:
                obstore.put(
                    self._store,
                    key,
                    blocks,
                    attributes=_ATTRIBUTES,
                    use_multipart=True,
                    # Azure takes at most 50,000 blocks.
                    chunk_size=max(_STREAM_PART_BYTES, -(-size // 40_000)),
                    max_concurrency=_STREAM_PARTS_AT_ONCE,
                )
        except _ERRORS as error:
            raise self._fault(error) from None

    def flush(self, keys: Iterable[str]) -> None:
        """The service acknowledges only what is durable."""

    def create_log(self, key: str) -> str | None:
        try:
            return obstore.put(self._probe, key, b"", attributes=_LOG_ATTRIBUTES, mode="create", use_multipart=False)[
                "e_tag"
            ]
        except _ERRORS as error:
            raise self._fault(error) from None

    def write_log(self, key: str, blocks: Iterable[bytes], *, if_match: str | None) -> str | None:
        first, rest = _split(blocks, _SMALL_LOG_BYTES)
        store = self._store if first else self._probe
        try:
            etag = obstore.put(
                store,
                key,
                first,
                attributes=_LOG_ATTRIBUTES,
                mode="overwrite" if if_match is None else {"e_tag": if_match},
                use_multipart=False,
            )["e_tag"]
            if rest is None:
                return etag
            # A log too large for one request. That the conditional write of its beginning succeeded shows that this
            # is still the one who may write it.
            return obstore.put(
                store,
                key,
                rest,
                attributes=_LOG_ATTRIBUTES,
                use_multipart=True,
                chunk_size=_STREAM_PART_BYTES,
                max_concurrency=_STREAM_PARTS_AT_ONCE,
            )["e_tag"]
        except _ERRORS as error:
            status, code = _status_and_code(error)
            if status == 412 or code == "ConditionNotMet":
                raise LogOutdated from None
            raise self._fault(error) from None

    def remove_log(self, key: str) -> None:
        try:
            obstore.delete(self._remover, key)
        except _ERRORS:
            return

    def close(self) -> None:
        if self._md5 is not None:
            self._md5.close()

    def _fault(self, error: BaseException) -> DestinationFault:
        status, code = _status_and_code(error)
        kind = _kind(status, code)
        return DestinationFault(code, self._message(status, code), kind, retry_after_seconds=_retry_after(error))

    def _message(self, status: int | None, code: str) -> str:
        where = f"container '{self._container}' of account '{self._account}'"
        match status:
            case 401 | 403:
                return (
                    f"the {where} refused the write ({status} {code}). The SAS must be valid now and grant create and "
                    "write on this container; make a new one and start the export again."
                )
            case 404:
                return f"the {where} does not exist ({status} {code}). Create it, or correct its name."
            case None:
                return f"the {where} could not be reached ({code}). Check the name, the network and the port."
            case _:
                return f"the {where} answered {status} {code}."


_ATTRIBUTES = {"Content-Type": CONTENT_TYPE}
_LOG_ATTRIBUTES = {"Content-Type": LOG_CONTENT_TYPE}
_ERRORS = (BaseError, FileNotFoundError, AzureError)


def _store(spec: DestinationSpec, request_seconds: float) -> AzureStore:
    secret: dict[str, str] = {} if spec.secret is None else json.loads(spec.secret)
    endpoint = spec.public["endpoint"]
    options: dict[str, Any] = {"skip_signature": True}
    if "sas" in secret:
        options = {"sas_key": secret["sas"]}
    elif "account_key" in secret:
        options = {"account_key": secret["account_key"]}
    client: ClientConfig = {
        "allow_http": endpoint.startswith("http:"),
        "timeout": timedelta(seconds=request_seconds),
        "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, request_seconds)),
        "pool_max_idle_per_host": "1024",
    }
    return AzureStore(
        spec.public["container"],
        account_name=_account(endpoint),
        endpoint=endpoint,
        client_options=client,
        retry_config={"max_retries": 0},
        **options,
    )


def _account(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return parts.path.strip("/") or (parts.hostname or "").split(".", 1)[0]


def _status_and_code(error: BaseException) -> tuple[int | None, str]:
    """HTTP status (None: no answer) and error code. The text of obstore's errors is the only place that has them."""
    if isinstance(error, HttpResponseError) and error.status_code is not None:
        named = re.fullmatch(r"\w{1,64}", str(getattr(error, "error_code", None) or ""))
        return error.status_code, named[0] if named else f"Status{error.status_code}"
    if isinstance(error, AzureError):
        return None, "TimedOut" if isinstance(error, ServiceResponseTimeoutError) else "ConnectionFailed"
    text = str(error)
    found = re.search(r"status code: (\d{3})", text)
    if found is not None:
        status = int(found[1])
        code = re.search(r"<Code>(\w{1,64})</Code>", text)
        return status, code[1] if code else f"Status{status}"
    if "BareRedirect" in text:
        return 302, "RedirectRefused"
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


def _retry_after(error: BaseException) -> float | None:
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if re.fullmatch(r"\d{1,6}", text) else None


def _split(blocks: Iterable[bytes], limit: int) -> tuple[bytes, Iterator[bytes] | None]:
    """The first `limit` bytes or all; and, when there is more, an iterator over everything from the start."""
    iterator = iter(blocks)
    held: list[bytes] = []
    size = 0
    for block in iterator:
        held.append(block)
        size += len(block)
        if size > limit:
            return b"".join(held), _chained(held, iterator)
    return b"".join(held), None


def _chained(held: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from held
    yield from rest


class _Md5Writer:
    """Writes with Content-MD5 through Azure's own library: obstore cannot send that header."""

    def __init__(self, spec: DestinationSpec, request_seconds: float) -> None:
        secret: dict[str, str] = {} if spec.secret is None else json.loads(spec.secret)
        url = f"{spec.public['endpoint']}/{spec.public['container']}"
        self._client = ContainerClient.from_container_url(
            f"{url}?{secret['sas']}" if "sas" in secret else url,
            credential=secret.get("account_key"),
            retry_total=0,
            connection_timeout=_CONNECT_SECONDS,
            read_timeout=request_seconds,
            permit_redirects=False,
        )

    def put(self, key: str, content: bytes) -> None:
        self._client.get_blob_client(key).upload_blob(
            content,
            overwrite=True,
            validate_content=True,
            content_settings=_settings(hashlib.md5(content, usedforsecurity=False).digest()),
        )

    def put_stream(self, key: str, blocks: Iterator[bytes]) -> None:
        blob = self._client.get_blob_client(key)
        digest = hashlib.md5(usedforsecurity=False)
        staged: list[BlobBlock] = []
        for number, block in enumerate(blocks):
            digest.update(block)
            block_id = f"{number:08d}"
            blob.stage_block(block_id, block, len(block), validate_content=True)
            staged.append(BlobBlock(block_id))
        blob.commit_block_list(staged, content_settings=_settings(digest.digest()))

    def close(self) -> None:
        self._client.close()


def _settings(md5: bytes) -> ContentSettings:
    return ContentSettings(content_type=CONTENT_TYPE, content_md5=bytearray(md5))
