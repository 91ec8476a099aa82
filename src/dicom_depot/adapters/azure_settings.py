"""Reading what a caller says of an Azure container: a URL with or without a SAS, or a connection string.

Everything is refused that is not plainly a container at an endpoint where data may go (`destination_guard`). URLs are
matched whole against one pattern: what a lenient parser would repair is an error here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from dicom_depot.adapters.destination_guard import DestinationGuard, Endpoint, parse_endpoint
from dicom_depot.adapters.managed_identity import HOW_TO_SWITCH_ON
from dicom_depot.config import CLOUD_SUFFIXES
from dicom_depot.domain.errors import DestinationRefused
from dicom_depot.domain.export import DestinationSpec

TYPE = "azureBlob"
MANAGED = "managed"
"""`DestinationSpec.public["identity"]` of a destination that is signed in to with the managed identity."""

EMULATOR_ACCOUNT = "devstoreaccount1"
EMULATOR_ENDPOINT = f"http://127.0.0.1:10000/{EMULATOR_ACCOUNT}"
EMULATOR_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account key that every emulator has: published, no secret."""

_CONTAINER_NAME = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){2,62}", re.ASCII)
_CONTAINER_URI = re.compile(r"(?P<endpoint>[a-z]+://[^/]+(?:/[^/]+)?)/(?P<container>[^/]+)/?", re.IGNORECASE)
_SAS = re.compile(r"[^\x00-\x20\x7f#]*")
_ACCOUNT_NAME = re.compile(r"[a-z0-9]{3,24}", re.ASCII)

Secret = dict[str, str]
"""`{"sas": ...}` or `{"account_key": ...}`, as it is sealed."""


@dataclass(frozen=True, slots=True)
class AzureSettings:
    """What the service's settings and switches allow callers to say."""

    guard: DestinationGuard
    allow_anonymous: bool
    is_identity_on: Callable[[], bool]

    def parse(self, settings: Mapping[str, Any]) -> DestinationSpec:
        """Read `destination.settings` of a request (members in camelCase). Raises DestinationRefused."""
        uri = str(settings.get("blobContainerUri") or "").strip(" ")
        connection_string = str(settings.get("connectionString") or "").strip(" ")
        container = str(settings.get("blobContainerName") or "").strip(" ")
        use_identity = bool(settings.get("useManagedIdentity", False))
        if uri:
            if connection_string or container:
                raise _refused(
                    "ConflictingSettings",
                    "Give either blobContainerUri, or connectionString with blobContainerName, not both.",
                    "blobContainerUri",
                )
            endpoint, container, secret = _parse_uri(uri, use_identity=use_identity)
            place, container_place = "blobContainerUri", "blobContainerUri"
        elif connection_string and container:
            if use_identity:
                raise _refused(
                    "ConflictingSettings",
                    "A managed identity needs blobContainerUri; a connection string brings its own sign-in.",
                    "useManagedIdentity",
                )
            endpoint, secret = _parse_connection_string(connection_string)
            place, container_place = "connectionString", "blobContainerName"
        elif use_identity:
            raise _refused("MissingSettings", "A managed identity needs blobContainerUri.", "blobContainerUri")
        else:
            raise _refused(
                "MissingSettings",
                "Give blobContainerUri, or both connectionString and blobContainerName.",
                "blobContainerUri",
            )
        self.guard.check_name(endpoint, place, carries_token=use_identity)
        _check_container(container, container_place)
        public = {"endpoint": str(endpoint), "container": container}
        if use_identity:
            if not self.is_identity_on():
                raise _refused(
                    "ManagedIdentityDisabled",
                    f"The managed identity of this service is switched off. {HOW_TO_SWITCH_ON}",
                    "useManagedIdentity",
                )
            return DestinationSpec(TYPE, {**public, "identity": MANAGED})
        if secret is None and not self.allow_anonymous:
            raise _refused(
                "AnonymousAccessDisabled",
                "The destination names no sign-in. Add a SAS with create and write rights, or set useManagedIdentity "
                "to true; DICOM_DEPOT_EXPORT_ALLOW_ANONYMOUS=true allows containers that anybody may write to.",
                place,
            )
        return DestinationSpec(TYPE, public, None if secret is None else json.dumps(secret))


def _parse_uri(uri: str, *, use_identity: bool) -> tuple[Endpoint, str, Secret | None]:
    place = "blobContainerUri"
    wanted = "blobContainerUri must be the complete URL of one container: https://<account>.blob.../<container>"
    path, _, query = uri.partition("?")
    if "@" in path or "#" in uri:
        raise _refused("InvalidUri", "blobContainerUri must not hold a user, a password or a fragment.", place)
    found = _CONTAINER_URI.fullmatch(path)
    endpoint = parse_endpoint(found["endpoint"]) if found is not None else None
    if found is None or endpoint is None:
        raise _refused("InvalidUri", f"{wanted}.", place)
    is_signed = "sig" in {name.lower() for name in parse_qs(query, keep_blank_values=True)}
    if query and not (is_signed and _SAS.fullmatch(query)):
        raise _refused("InvalidUri", "The query of blobContainerUri is not a SAS: it has no sig.", place)
    if is_signed and use_identity:
        raise _refused(
            "ConflictingSettings",
            "blobContainerUri brings a SAS; leave it out, or set useManagedIdentity to false.",
            "useManagedIdentity",
        )
    return endpoint, found["container"], {"sas": query} if is_signed else None


def _parse_connection_string(text: str) -> tuple[Endpoint, Secret | None]:
    place = "connectionString"
    if text.lower().rstrip(";") == "usedevelopmentstorage=true":
        endpoint = parse_endpoint(EMULATOR_ENDPOINT)
        assert endpoint is not None
        return endpoint, {"account_key": EMULATOR_KEY}
    values: dict[str, str] = {}
    for part in filter(None, (part.strip(" ") for part in text.split(";"))):
        name, separator, value = part.partition("=")
        if not separator or not value:
            raise _refused(
                "InvalidConnectionString",
                "connectionString must consist of Name=Value pairs split by ';'.",
                place,
            )
        values[name.strip(" ").lower()] = value.strip(" ")
    account = values.get("accountname", "")
    is_emulator = account == EMULATOR_ACCOUNT and not _is_of_the_cloud(values.get("blobendpoint", ""))
    if "accountkey" in values and not is_emulator:
        raise _refused(
            "AccountKeyRefused",
            "Account keys are not supported: they open the whole account. Use a SAS for the container.",
            place,
        )
    url = values.get("blobendpoint", "")
    if not url and is_emulator:
        url = EMULATOR_ENDPOINT
    if not url and _ACCOUNT_NAME.fullmatch(account):
        suffix = values.get("endpointsuffix", "core.windows.net")
        url = f"{values.get('defaultendpointsprotocol', 'https')}://{account}.blob.{suffix}"
    endpoint = parse_endpoint(url)
    sas = values.get("sharedaccesssignature", "").removeprefix("?")
    if endpoint is None or not _SAS.fullmatch(sas):
        raise _refused(
            "InvalidConnectionString", "connectionString needs a BlobEndpoint, or a valid AccountName.", place
        )
    if sas:
        return endpoint, {"sas": sas}
    return endpoint, {"account_key": values["accountkey"]} if "accountkey" in values else None


def _is_of_the_cloud(endpoint: str) -> bool:
    return any(suffix in endpoint.lower() for suffix in CLOUD_SUFFIXES)


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
