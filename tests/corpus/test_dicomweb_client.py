"""The Python DICOMweb client stores, finds again and deletes every real file that it can write."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom import Dataset, dcmread
from pydicom.encaps import generate_frames
from requests import HTTPError

from tests.support.quiet_pydicom import quiet_pydicom
from tests.support.service import RunningService, running_service

DEFLATED, BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
Uids = tuple[str, str, str]
UID = re.compile(r"[0-9.]{0,63}[0-9]")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_service(tmp_path_factory.mktemp("client") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def originals(corpus: Path) -> dict[Uids, Dataset]:
    """The first file of each instance that pydicom reads, and writes again as the client does."""
    found: dict[Uids, Dataset] = {}
    with (corpus / "index.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    for row in rows:
        study, series, sop = (row[name].rstrip(" \0") for name in ("study_uid", "series_uid", "sop_uid"))
        uids = (study, series, sop)
        if row["parses"] != "yes" or not all(map(UID.fullmatch, (*uids, row["sop_class"]))) or uids in found:
            continue
        with quiet_pydicom():
            try:
                data_set = dcmread(corpus / row["path"])
                data_set.save_as(io.BytesIO())
                _ = [element.value for element in data_set.iterall()]
            except Exception:  # noqa: S112  (not a matter of ours: the client could not send it)
                continue
        if "PatientID" in data_set:
            found[uids] = data_set
    assert len(found) > 180
    return found


@pytest.fixture(scope="module")
def stored(client: DICOMwebClient, originals: dict[Uids, Dataset]) -> dict[Uids, Dataset]:
    """What the service took: everything that the client could send."""
    taken: dict[Uids, Dataset] = {}
    for uids, data_set in originals.items():
        with quiet_pydicom():
            answer = client.store_instances([data_set])
        items = answer.ReferencedSOPSequence
        assert [item.ReferencedSOPInstanceUID for item in items] == [uids[2]]
        assert items[0].RetrieveURL.endswith("/studies/{}/series/{}/instances/{}".format(*uids))
        taken[uids] = data_set
    return taken


def test_metadata_of_each_instance_names_it(client: DICOMwebClient, stored: dict[Uids, Dataset]) -> None:
    for uids, original in stored.items():
        found = client.retrieve_instance_metadata(*uids)
        data_set = Dataset.from_json(found)
        assert data_set.SOPInstanceUID == uids[2]
        assert data_set.SOPClassUID == original.SOPClassUID
        assert data_set.get("Rows") == original.get("Rows")


def test_metadata_of_a_study_holds_its_instances(client: DICOMwebClient, stored: dict[Uids, Dataset]) -> None:
    for study in {uids[0] for uids in stored}:
        expected = {uids[2] for uids in stored if uids[0] == study}
        assert {each["00080018"]["Value"][0] for each in client.retrieve_study_metadata(study)} == expected


def test_instances_come_back_as_they_were_sent(client: DICOMwebClient, stored: dict[Uids, Dataset]) -> None:
    for uids, original in stored.items():
        with quiet_pydicom():
            sent, expected = io.BytesIO(), io.BytesIO()
            original.save_as(expected)
            found = client.retrieve_instance(*uids, media_types=(("application/dicom", "*"),))
            found.save_as(sent)
        assert sent.getvalue() == expected.getvalue(), uids


def test_a_series_comes_whole(client: DICOMwebClient, stored: dict[Uids, Dataset]) -> None:
    for series in {uids[:2] for uids in stored}:
        expected = sorted(uids[2] for uids in stored if uids[:2] == series)
        with quiet_pydicom():
            found = client.retrieve_series(*series, media_types=(("application/dicom", "*"),))
        assert sorted(each.SOPInstanceUID for each in found) == expected


def test_frames_are_those_of_the_file(client: DICOMwebClient, stored: dict[Uids, Dataset]) -> None:
    compared = 0
    for uids, original in stored.items():
        if "PixelData" not in original or original.file_meta.TransferSyntaxUID in (DEFLATED, BIG_ENDIAN):
            continue
        count = int(original.get("NumberOfFrames") or 1)
        syntax = original.file_meta.TransferSyntaxUID
        if syntax.is_encapsulated:
            with quiet_pydicom():
                expected = list(generate_frames(original.PixelData, number_of_frames=count))
        else:
            size = frame_size(original)
            if not size or size * count > len(original.PixelData):
                continue
            expected = [original.PixelData[size * n : size * (n + 1)] for n in range(count)]
        wanted = [1, count] if count > 1 else [1]
        found = client.retrieve_instance_frames(*uids, frame_numbers=wanted)
        assert found == [expected[number - 1] for number in wanted], uids
        compared += len(found)
    assert compared > 100


def test_bulk_data_is_what_metadata_leaves_out(client: DICOMwebClient, stored: dict[Uids, Dataset]) -> None:
    compared = 0
    for uids, original in stored.items():
        if original.file_meta.TransferSyntaxUID in (DEFLATED, BIG_ENDIAN):
            continue
        for tag, element in client.retrieve_instance_metadata(*uids).items():
            if "BulkDataURI" not in element or tag == "7FE00010":
                continue
            theirs: Any = original[int(tag, 16)].value
            assert client.retrieve_bulkdata(element["BulkDataURI"]) == [theirs], (uids, tag)
            compared += 1
    assert compared > 100


def test_what_was_deleted_is_gone(client: DICOMwebClient, stored: dict[Uids, Dataset]) -> None:
    """The last test of this module: it empties the service."""
    by_instance, *by_study = list({uids[0]: uids for uids in stored}.values())
    client.delete_instance(*by_instance)
    client.delete_series(*by_study[0][:2])
    for uids in by_study[1:]:
        client.delete_study(uids[0])
    for uids in (by_instance, *by_study):
        with pytest.raises(HTTPError, match="404"):
            client.retrieve_instance_metadata(*uids)


def frame_size(data_set: Dataset) -> int:
    samples = 2 if data_set.PhotometricInterpretation == "YBR_FULL_422" else data_set.SamplesPerPixel
    bits = data_set.Rows * data_set.Columns * samples * data_set.BitsAllocated
    return 0 if bits % 8 else int(bits // 8)
