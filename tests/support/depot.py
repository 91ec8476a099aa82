"""What the HTTP tests share: instances with chosen UIDs, a service that holds them, and the places that it may export
to, good ones and bad ones. No assertions live here.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from pydicom import dcmread
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.uid import UID

from dicom_depot.testing import samples
from tests.support.azurite import Azurite
from tests.support.fault_endpoint import Attempt, FaultEndpoint, Rule
from tests.support.service import RunningService, run_command, running_service

SEED_IDENTIFIERS = ("1.2.3", "12.3/4.5.678", "123.456/7.8/9.1011.12")
SEED_INSTANCES = frozenset(
    {
        "1.2.3/1.2.3.1/1.2.3.1.1",
        "1.2.3/1.2.3.1/1.2.3.1.2",
        "1.2.3/1.2.3.2/1.2.3.2.1",
        "12.3/4.5.678/4.5.678.1",
        "12.3/4.5.678/4.5.678.2",
        "123.456/7.8/9.1011.12",
    }
)
"""What the identifiers of the founding document's example name in the stored data."""
NEIGHBOURS = frozenset({"12.3/4.5.679/4.5.679.1", "123.456/7.8/9.1011.13", "1.2.30/1.2.3.1/1.2.3.1.9"})
"""Stored as well, and next to them, but not named."""


def with_uids(content: bytes, identifier: str) -> bytes:
    """A copy of an instance under other UIDs, odd ones included (leading zeros, empty components)."""
    study, series, instance = identifier.split("/")
    buffer = BytesIO()
    with disable_value_validation():
        data_set: Dataset = dcmread(BytesIO(content))
        data_set.StudyInstanceUID, data_set.SeriesInstanceUID, data_set.SOPInstanceUID = study, series, instance
        data_set.file_meta.MediaStorageSOPInstanceUID = UID(instance)
        data_set.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def stored_instances() -> dict[str, bytes]:
    """Identifier to bytes: everything that the service under test holds."""
    made = [*samples.ct_volume(slices=4, rows=16, columns=16), samples.multiframe(), samples.structured_report()]
    stored = {str(sample.ref): sample.content for sample in made}
    chosen = sorted(SEED_INSTANCES | NEIGHBOURS | {"007/0/00.1"})
    for number, identifier in enumerate(chosen):
        [template] = samples.ct_volume(slices=1, rows=8, columns=8, seed=100 + number)
        stored[identifier] = with_uids(template.content, identifier)
    return stored


@dataclass(frozen=True, slots=True)
class BadPlaces:
    """Endpoints that the service may use and that do not work."""

    refusing: str
    silent: str


@dataclass(slots=True)
class Depot:
    """A running service with data, and what it may export to. Safe for many tests, which share it."""

    service: RunningService
    azurite: Azurite
    endpoint: FaultEndpoint
    bad: BadPlaces
    export_root: Path
    instances: dict[str, bytes]
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.service.url, timeout=60)

    def container(self, permissions: str = "cw") -> tuple[str, dict[str, Any]]:
        """A new container in Azurite, and a destination that names it with a SAS of these rights."""
        name = self.azurite.create_container()
        return name, azure(self.azurite.container_url(name, self.azurite.container_sas(name, permissions)))

    def faulty(self, container: str, *rules: Rule, sas: str | None = "sv=x&sig=faulty") -> dict[str, Any]:
        """A destination on the fault endpoint whose rules hold for this container only."""
        for rule in rules:
            rule.when = _within(container, rule)
            self.endpoint.add_rule(rule)
        return azure(self.endpoint.container_url(container, sas))

    def start(self, destination: Mapping[str, Any], *identifiers: str, version: str = "v2") -> str:
        """Start an export that must be accepted; returns its id."""
        answer = self.client.post(f"/{version}/export", json=body(destination, *identifiers))
        if answer.status_code != 202:
            raise RuntimeError(f"the export was refused: {answer.status_code} {answer.text}")
        return str(answer.json()["id"])

    def operations(self) -> list[str]:
        """The ids of all operations, newest first."""
        found: list[str] = []
        token: str | None = None
        while True:
            arguments = {"limit": "200"} | ({"continuationToken": token} if token else {})
            page = self.client.get("/v2/operations", params=arguments).raise_for_status().json()
            found += [operation["operationId"] for operation in page["operations"]]
            token = page.get("continuationToken")
            if token is None:
                return found


def azure(container_uri: str, **settings: Any) -> dict[str, Any]:
    return {"type": "azureBlob", "settings": {"blobContainerUri": container_uri, **settings}}


def body(destination: Mapping[str, Any], *identifiers: str) -> dict[str, Any]:
    """An export request; without identifiers it asks for everything."""
    content: dict[str, Any] = {"destination": destination}
    if identifiers:
        content["source"] = {"type": "identifiers", "settings": {"values": list(identifiers)}}
    return content


def tree_of(operation_id: str, identifiers: Iterable[str], instances: Mapping[str, bytes]) -> dict[str, bytes]:
    """Names and bytes of the objects that an export of these instances makes, its log left out."""
    return {f"{operation_id}/results/{each}.dcm": instances[each] for each in identifiers}


def all_below(folder: Path) -> list[str]:
    """Every file, folder and link below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@dataclass(frozen=True, slots=True)
class Imported:
    """A data folder that holds `instances` and that no service has opened."""

    data_dir: Path
    instances: dict[str, bytes]


def import_instances(folder: Path) -> Imported:
    """Make a data folder below `folder`, as an operator does: by the command."""
    imported = Imported(folder / "data", stored_instances())
    files = folder / "files"
    files.mkdir()
    for number, content in enumerate(imported.instances.values()):
        (files / f"{number:03}").write_bytes(content)
    run_command("import", str(files), data_dir=imported.data_dir)
    return imported


@contextlib.contextmanager
def open_depot(
    folder: Path, imported: Imported, azurite: Azurite, endpoint: FaultEndpoint, **settings: object
) -> Iterator[Depot]:
    """Start a service on a copy of the imported data below `folder`, and stop it at the end."""
    data_dir, export_root = folder / "data", folder / "export-root"
    shutil.copytree(imported.data_dir, data_dir)
    export_root.mkdir()
    # A port that is bound and does not listen refuses; one that listens and never accepts stays silent.
    with socket.socket() as refusing, socket.socket() as silent:
        refusing.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        bad = BadPlaces(*(f"http://127.0.0.1:{each.getsockname()[1]}/account" for each in (refusing, silent)))
        allowed = f"{azurite.account_url},{endpoint.account_url},{bad.refusing},{bad.silent}"
        given: dict[str, object] = {
            "export_root": export_root,
            "export_allowed_endpoints": allowed,
            "secret_keys": base64.b64encode(os.urandom(32)).decode(),
        }
        given |= settings
        with running_service(
            data_dir, **{name: value for name, value in given.items() if value is not None}
        ) as service:
            depot = Depot(service, azurite, endpoint, bad, export_root, imported.instances)
            try:
                yield depot
            finally:
                depot.client.close()


def _within(container: str, rule: Rule) -> Any:
    also = rule.when

    def fits(attempt: Attempt) -> bool:
        return attempt.container == container and (also is None or also(attempt))

    return fits
