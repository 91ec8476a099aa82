"""Which destinations there are: one table from a type's name to its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dicom_depot.adapters import azure_blob
from dicom_depot.adapters.local_folder import FolderDestination, check_folder
from dicom_depot.domain.errors import DestinationRefused
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.ports import Destination

FILE_TYPE = "file"


@dataclass(frozen=True, slots=True)
class Destinations:
    """`ports.DestinationFactory`, with what the settings allow."""

    export_root: Path | None
    allowed_endpoints: tuple[str, ...]
    allow_anonymous: bool
    request_seconds: float
    content_md5: bool

    def parse(self, type_: str, settings: Mapping[str, object]) -> DestinationSpec:
        if type_ == FILE_TYPE:
            if self.export_root is None:
                raise DestinationRefused(
                    "Folder destinations are switched off: the service has no DICOM_DEPOT_EXPORT_ROOT.",
                    code="FolderDestinationsDisabled",
                    target="destination.type",
                )
            return DestinationSpec(FILE_TYPE, {"folder": check_folder(str(settings.get("folder") or ""))})
        return azure_blob.parse_settings(settings, self.allowed_endpoints, allow_anonymous=self.allow_anonymous)

    def log_href(self, spec: DestinationSpec, key: str) -> str:
        if spec.type == FILE_TYPE:
            folder = spec.public["folder"]
            return f"{folder}/{key}" if folder else key
        return azure_blob.log_href(spec, key)

    def open(self, spec: DestinationSpec) -> Destination:
        if spec.type == FILE_TYPE:
            if self.export_root is None:
                raise DestinationRefused("Folder destinations are switched off.", target="destination.type")
            return FolderDestination(self.export_root, spec.public["folder"])
        return azure_blob.AzureDestination(spec, request_seconds=self.request_seconds, content_md5=self.content_md5)
