"""The founding document's example request, letter by letter but for the account, and an archive that it fits."""

from __future__ import annotations

import io
from pathlib import Path

import pydicom

from dicom_depot.testing.samples import ct_volume

REQUEST = """{
    "source": {
        "type": "identifiers",
        "settings": {
            "values": [
                "1.2.3",
                "12.3/4.5.678",
                "123.456/7.8/9.1011.12"
            ]
        }
    },
    "destination": {
        "type": "azureblob",
        "settings": {
            "blobContainerUri": "https://dicomexport.blob.core.windows.net/export",
            "UseManagedIdentity": true
        }
    }
}"""

EXPORTED = frozenset(
    {
        "1.2.3/1.2.3.1/1.2.3.1.1",
        "1.2.3/1.2.3.1/1.2.3.1.2",
        "1.2.3/1.2.3.2/1.2.3.2.1",
        "12.3/4.5.678/4.5.678.1",
        "12.3/4.5.678/4.5.678.2",
        "123.456/7.8/9.1011.12",
    }
)
OTHERS = frozenset(
    {"12.3/4.5.679/4.5.679.1", "123.456/7.8/9.1011.13", "123.456/7.9/7.9.1", "1.2.33/1.2.33.1/1.2.33.1.1"}
)


def request_for(container_uri: str) -> str:
    """The example's text with this container in it."""
    return REQUEST.replace("https://dicomexport.blob.core.windows.net/export", container_uri)


def write_archive(folder: Path) -> dict[str, bytes]:
    """Write files that hold what the example names, and others; returns the contents by study/series/instance."""
    folder.mkdir(parents=True)
    template = ct_volume(slices=1)[0].content
    contents: dict[str, bytes] = {}
    for number, identifier in enumerate(sorted(EXPORTED | OTHERS)):
        data_set = pydicom.dcmread(io.BytesIO(template))
        data_set.StudyInstanceUID, data_set.SeriesInstanceUID, data_set.SOPInstanceUID = identifier.split("/")
        data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
        path = folder / f"{number}.dcm"
        data_set.save_as(path)
        contents[identifier] = path.read_bytes()
    return contents
