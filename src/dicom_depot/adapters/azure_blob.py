"""Azure Blob Storage as a destination: writing through obstore, and through Azure's own library where that can do more.

How a caller's settings are read stands in `azure_settings`, how clients are made in `azure_clients`, and what a failed
request means in `azure_faults`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import obstore
from azure.core.exceptions import AzureError
from azure.storage.blob import BlobBlock, ContainerClient, ContentSettings
from obstore.exceptions import BaseError

from dicom_depot.adapters.azure_clients import IdentitySignIn, open_container_client, open_store
from dicom_depot.adapters.azure_faults import ERRORS, TOKEN_MISSING, Place, fault_of, no_token, status_and_code
from dicom_depot.adapters.azure_settings import MANAGED
from dicom_depot.domain.errors import DestinationFault, DestinationRefused, FaultKind, IdentityUnavailable, Obstacle
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.domain.identity import AccessToken
from dicom_depot.ports import LogOutdated, ManagedIdentity

CONTENT_TYPE = "application/dicom"
LOG_CONTENT_TYPE = "application/x-ndjson"

_PROBE_SECONDS = 10.0
_REMOVE_SECONDS = 5.0
_STREAM_PART_BYTES = 8 * 1024 * 1024
_STREAM_PARTS_AT_ONCE = 2
_SMALL_LOG_BYTES = 16 * 1024 * 1024
_SECOND_REFUSAL_SECONDS = 60.0
"""A token refused so soon after another one was is refused for good."""

_ATTRIBUTES = {"Content-Type": CONTENT_TYPE}
_LOG_ATTRIBUTES = {"Content-Type": LOG_CONTENT_TYPE}


def log_href(spec: DestinationSpec, key: str) -> str:
    return f"{spec.public['endpoint']}/{spec.public['container']}/{key}"


class AzureDestination:
    """`ports.Destination` on one container."""

    def __init__(
        self,
        spec: DestinationSpec,
        *,
        request_seconds: float,
        content_md5: bool,
        identity: ManagedIdentity | None = None,
        is_cli_identity: bool = False,
    ) -> None:
        """identity: signs in where the destination says so. Raises DestinationRefused."""
        uses_identity = spec.public.get("identity") == MANAGED
        self._place = Place(spec.public["endpoint"], spec.public["container"], uses_identity, is_cli_identity)
        if uses_identity and identity is None:
            raise DestinationRefused("This service has no managed identity.", target="destination.settings")
        self._sign_in = IdentitySignIn(identity) if uses_identity and identity is not None else None
        self._refused_at = float("-inf")
        account = self._place.account
        try:
            self._probe = open_store(spec, account, self._sign_in, min(_PROBE_SECONDS, request_seconds))
            self._store = open_store(spec, account, self._sign_in, request_seconds)
            # obstore deletes through a batch, whose body repeats the token.
            self._remover = open_container_client(spec, self._sign_in, min(_REMOVE_SECONDS, request_seconds))
            self._md5 = _Md5Writer(open_container_client(spec, self._sign_in, request_seconds)) if content_md5 else None
        except (BaseError, AzureError, ValueError):  # the libraries say no more; their text may hold the secret
            raise DestinationRefused(
                f"The sign-in for {self._place} cannot be read. Use the SAS as the portal shows it.",
                code="InvalidSignIn",
                target="destination.settings",
            ) from None

    def put(self, key: str, content: bytes) -> None:
        with self._requests():
            if self._md5 is not None:
                self._md5.put(key, content)
            else:
                obstore.put(self._store, key, content, attributes=_ATTRIBUTES, use_multipart=False)

    def put_stream(self, key: str, blocks: Iterator[bytes], size: int) -> None:
        with self._requests():
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

    def flush(self, keys: Iterable[str]) -> None:
        """The service acknowledges only what is durable."""

    def create_log(self, key: str) -> str | None:
        with self._requests():
            return obstore.put(self._probe, key, b"", attributes=_LOG_ATTRIBUTES, mode="create", use_multipart=False)[
                "e_tag"
            ]

    def write_log(self, key: str, blocks: Iterable[bytes], *, if_match: str | None) -> str | None:
        first, rest = _split(blocks, _SMALL_LOG_BYTES)
        store = self._store if first else self._probe
        with self._requests():
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
            except ERRORS as error:
                status, code = status_and_code(error)
                if status == 412 or code == "ConditionNotMet":
                    raise LogOutdated from None
                raise

    def remove_log(self, key: str) -> bool:
        try:
            self._remover.get_blob_client(key).delete_blob()
        except (*ERRORS, IdentityUnavailable):
            return False
        return True

    def close(self) -> None:
        self._remover.close()
        if self._md5 is not None:
            self._md5.close()

    @contextmanager
    def _requests(self) -> Iterator[None]:
        """Around requests: a token is there before they begin, and their errors become faults."""
        began_at = time.monotonic()
        try:
            token = None if self._sign_in is None else self._sign_in.token()
            yield
        except IdentityUnavailable as error:
            raise no_token(error) from None
        except ERRORS as error:
            raise self._fault(error, token, began_at) from None

    def _fault(self, error: BaseException, token: AccessToken | None, began_at: float) -> DestinationFault:
        fault = fault_of(error, self._place, token)
        if token is None or self._sign_in is None:
            return fault
        if fault.code == TOKEN_MISSING:
            try:
                self._sign_in.token()  # it says why
            except IdentityUnavailable as unavailable:
                return no_token(unavailable)
        if fault.obstacle is Obstacle.SIGN_IN and fault.kind is FaultKind.PERMANENT:
            # A token may have been revoked, or be older than a change that it should tell of: the next one decides.
            if began_at - self._refused_at > _SECOND_REFUSAL_SECONDS or began_at < self._refused_at:
                fault.kind = FaultKind.TRANSIENT
                self._refused_at = max(self._refused_at, time.monotonic())
            self._sign_in.discard(token)
        return fault


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

    def __init__(self, client: ContainerClient) -> None:
        self._client = client

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
