"""Other programs use our DICOMweb routes: Orthanc sends studies to us and fetches them back, DCMTK and dicom3tools read
what is retrieved. What an answer must look like in detail is tested in tests/http.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from pydicom import dcmread

from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.testing.samples import Sample, ct_volume, multiframe, structured_report
from tests.support.orthanc import Orthanc, running_orthanc, server
from tests.support.service import RunningService, running_service

pytestmark = pytest.mark.clients

AS_STORED = "*"
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"
# Each has samples of its own, so that none meets what another one left in the service.
CHUNKED, WHOLE = "chunked", "whole"
SEEDS = {CHUNKED: 101, WHOLE: 102}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_service(tmp_path_factory.mktemp("orthanc") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def orthanc(service: RunningService) -> Iterator[Orthanc]:
    root = f"{service.url}/v2"
    with running_orthanc({CHUNKED: server(root), WHOLE: server(root, is_chunked=False)}) as running:
        yield running


@pytest.mark.parametrize("transfer", [CHUNKED, WHOLE])
def test_orthanc_sends_a_study_and_fetches_the_same_instances_back(
    orthanc: Orthanc, service: RunningService, transfer: str
) -> None:
    seed = SEEDS[transfer]
    samples = [*ct_volume(slices=4, seed=seed), multiframe(frames=3, seed=seed), structured_report(seed=seed)]
    studies = sorted({str(sample.ref.study_uid) for sample in samples})
    for sample in samples:
        orthanc.upload(sample.content)

    sent = orthanc.send(transfer, *studies)
    assert int(sent["InstancesCount"]) == len(samples)
    for sample in samples:
        assert _differences(sample.content, _retrieved(service, sample.ref, AS_STORED)) == []
    for study in studies:
        assert _named_in_metadata(service, study) == _uids_of(samples, study)

    orthanc.delete_all()
    assert orthanc.instances() == {}
    fetched = orthanc.fetch(transfer, *studies)
    assert int(fetched["ReceivedInstancesCount"]) == len(samples)
    assert sorted(orthanc.instances()) == sorted(str(sample.ref.sop_instance_uid) for sample in samples)
    for sample in samples:
        assert _differences(sample.content, orthanc.file(str(sample.ref.sop_instance_uid))) == []
    assert [line for line in orthanc.log().splitlines() if re.match(r"E\d{4} ", line)] == []
    orthanc.delete_all()


@pytest.fixture(scope="module")
def stored(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Instances in our service, some of them as implicit VR, RLE and JPEG lossless files, written by other programs."""
    folder = tmp_path_factory.mktemp("stored")
    samples = [
        *ct_volume(slices=2, seed=201),
        _rewritten(ct_volume(slices=1, seed=202)[0], "dcmconv", folder, "+ti"),
        _rewritten(ct_volume(slices=1, seed=203)[0], "dcmcrle", folder),
        _rewritten(ct_volume(slices=1, seed=206)[0], "dcmcjpeg", folder),
        multiframe(frames=3, seed=204),
        structured_report(seed=205),
    ]
    for sample in samples:
        answer = httpx.post(
            f"{service.url}/v2/studies",
            content=sample.content,
            headers={"Content-Type": "application/dicom", "Accept": "application/dicom+json"},
            timeout=60,
        )
        assert answer.status_code in {200, 202}, answer.text  # 202: stored, with a warning (implicit VR)
    return samples


@pytest.mark.parametrize("transfer_syntax", [AS_STORED, EXPLICIT_VR_LITTLE_ENDIAN, JPEG_2000_LOSSLESS])
def test_dcmtk_reads_what_is_retrieved_to_its_last_byte(
    service: RunningService, stored: list[Sample], transfer_syntax: str, tmp_path: Path
) -> None:
    for sample in _that_can_be(stored, transfer_syntax):
        content = _retrieved(service, sample.ref, transfer_syntax)
        file = tmp_path / "retrieved.dcm"
        file.write_bytes(content)
        _run("dcmftest", file)
        dumped = _run("dcmdump", "-q", file)
        assert str(sample.ref.sop_instance_uid) in dumped.stdout
        assert dumped.stderr == ""
        if transfer_syntax == AS_STORED:
            assert content == sample.content
        else:
            assert dcmread(file).file_meta.TransferSyntaxUID == transfer_syntax
            assert _pixels(content) == _pixels(sample.content)


@pytest.mark.parametrize("transfer_syntax", [AS_STORED, EXPLICIT_VR_LITTLE_ENDIAN, JPEG_2000_LOSSLESS])
def test_dciodvfy_finds_no_error_that_the_stored_file_did_not_have(
    service: RunningService, stored: list[Sample], transfer_syntax: str, tmp_path: Path
) -> None:
    for sample in _that_can_be(stored, transfer_syntax):
        before = _errors(sample.content, tmp_path / "before.dcm")
        after = _errors(_retrieved(service, sample.ref, transfer_syntax), tmp_path / "after.dcm")
        assert after - before == set()


def test_dciodvfy_finds_what_a_synthetic_image_lacks(tmp_path: Path) -> None:
    """It ends with 0 even then: without this, the test before this one could be comparing nothing with nothing."""
    errors = _errors(ct_volume(slices=1)[0].content, tmp_path / "lacking.dcm")
    assert "Error - Missing attribute Type 2 Required Element=<KVP> Module=<CTImage>" in errors


def _retrieved(service: RunningService, ref: InstanceRef, transfer_syntax: str) -> bytes:
    answer = httpx.get(
        f"{service.url}/v2/studies/{ref.study_uid}/series/{ref.series_uid}/instances/{ref.sop_instance_uid}",
        headers={"Accept": f"application/dicom; transfer-syntax={transfer_syntax}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return answer.content


def _named_in_metadata(service: RunningService, study_uid: str) -> list[str]:
    url = f"{service.url}/v2/studies/{study_uid}/metadata"
    answer = httpx.get(url, headers={"Accept": "application/dicom+json"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return sorted(each["00080018"]["Value"][0] for each in answer.json())


def _uids_of(samples: Sequence[Sample], study_uid: str) -> list[str]:
    return sorted(str(each.ref.sop_instance_uid) for each in samples if str(each.ref.study_uid) == study_uid)


def _differences(expected: bytes, found: bytes) -> list[str]:
    """The elements in which two files' data sets differ; meta headers may be another program's."""
    ours, theirs = dcmread(io.BytesIO(expected)), dcmread(io.BytesIO(found))
    assert ours.file_meta.TransferSyntaxUID == theirs.file_meta.TransferSyntaxUID
    tags = sorted(set(ours.keys()) | set(theirs.keys()))
    return [
        f"{tag}: {ours.get(tag)} became {theirs.get(tag)}"
        for tag in tags
        if tag not in ours or tag not in theirs or ours[tag] != theirs[tag]
    ]


def _that_can_be(samples: Sequence[Sample], transfer_syntax: str) -> list[Sample]:
    """JPEG 2000 is for images."""
    found = [
        sample
        for sample in samples
        if transfer_syntax != JPEG_2000_LOSSLESS or "PixelData" in dcmread(io.BytesIO(sample.content))
    ]
    assert len(found) >= 6
    return found


def _pixels(content: bytes) -> bytes:
    data_set = dcmread(io.BytesIO(content))
    return data_set.pixel_array.tobytes() if "PixelData" in data_set else b""


def _rewritten(sample: Sample, program: str, folder: Path, *options: str) -> Sample:
    """The same instance as DCMTK writes it; all of its programs' defaults are without loss."""
    before, after = folder / "before.dcm", folder / "after.dcm"
    before.write_bytes(sample.content)
    _run(program, *options, before, after)
    return sample._replace(content=after.read_bytes())


def _errors(content: bytes, file: Path) -> set[str]:
    """What dciodvfy calls an error. It says so in lines, never in its exit code."""
    file.write_bytes(content)
    said = subprocess.run([_program("dciodvfy"), str(file)], capture_output=True, text=True, check=False, timeout=60)
    lines = (said.stdout + said.stderr).splitlines()
    assert lines, "dciodvfy said nothing, not even which kind of instance it is"
    return {line for line in lines if line.startswith("Error")}


def _run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [_program(name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is not installed; run `make test-clients`, which installs it"
    return found
