"""Which destinations there are: one table from a type's name to its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dicom_depot.adapters.azure_blob import AzureDestination, log_href
from dicom_depot.adapters.azure_settings import AzureSettings
from dicom_depot.adapters.destination_guard import DestinationGuard, parse_endpoint
from dicom_depot.adapters.folder_destination import FolderDestination, check_folder
from dicom_depot.domain.errors import DestinationRefused
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.ports import Destination, ManagedIdentity

FILE_TYPE = "file"


@dataclass(frozen=True, slots=True)
class Destinations:
    """`ports.DestinationFactory`, with what the settings allow."""

    export_root: Path | None
    guard: DestinationGuard
    allow_anonymous: bool
    request_seconds: float
    content_md5: bool
    identity: ManagedIdentity
    is_cli_identity: bool = False

    def parse(self, type_: str, settings: Mapping[str, object]) -> DestinationSpec:
        if type_ == FILE_TYPE:
            if self.export_root is None:
                raise DestinationRefused(
                    "Folder destinations are switched off: the service has no DICOM_DEPOT_EXPORT_ROOT.",
                    code="FolderDestinationsDisabled",
                    target="destination.type",
                )
            return DestinationSpec(FILE_TYPE, {"folder": check_folder(str(settings.get("folder") or ""))})
        return AzureSettings(self.guard, self.allow_anonymous, self.identity.is_enabled).parse(settings)

    def log_href(self, spec: DestinationSpec, key: str) -> str:
        if spec.type == FILE_TYPE:
            folder = spec.public["folder"]
            return f"{folder}/{key}" if folder else key
        return log_href(spec, key)

    def open(self, spec: DestinationSpec) -> Destination:
        if spec.type == FILE_TYPE:
            if self.export_root is None:
                raise DestinationRefused("Folder destinations are switched off.", target="destination.type")
            return FolderDestination(self.export_root, spec.public["folder"])
        endpoint = parse_endpoint(spec.public["endpoint"])
        if endpoint is None:
            raise DestinationRefused("The endpoint is not one that this release knows.", target="destination.settings")
        self.guard.check_address(endpoint)
        return AzureDestination(
            spec,
            request_seconds=self.request_seconds,
            content_md5=self.content_md5,
            identity=self.identity,
            is_cli_identity=self.is_cli_identity,
        )
