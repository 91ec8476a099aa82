"""What the DICOMweb tests share: instances made to measure, and an empty service for each module that stores and
deletes in it. No assertions live here.
"""

from __future__ import annotations

import contextlib
import email.parser
import email.policy
import itertools
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID

from tests.support.service import RunningService, running_service

SOP_CLASS = "1.2.840.10008.5.1.4.1.1.7"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"

_numbers = itertools.count(1)


class Made(NamedTuple):
    """One instance: its UIDs and its bytes."""

    study: str
    series: str
    sop: str
    content: bytes

    @property
    def path(self) -> str:
        return f"/studies/{self.study}/series/{self.series}/instances/{self.sop}"


def new_uid() -> str:
    """A UID that no other test has."""
    return f"1.2.826.0.1.3680043.8.498.77.{next(_numbers)}"


class Raw(NamedTuple):
    """An element with exactly these bytes, whatever they are worth, in explicit VR little endian."""

    tag: int
    vr: str
    value: bytes

    def encoded(self) -> bytes:
        head = struct.pack("<HH2s", self.tag >> 16, self.tag & 0xFFFF, self.vr.encode())
        is_long = self.vr in ("OB", "OW", "SQ", "UN", "UT", "UC", "UR", "SV", "UV")
        return head + struct.pack("<2xL" if is_long else "<H", len(self.value)) + self.value


def make(
    *,
    study: str | None = None,
    series: str | None = None,
    sop: str | None = None,
    syntax: str = EXPLICIT_LITTLE,
    elements: Sequence[Raw] = (),
    without: Sequence[str] = (),
    change: Callable[[Dataset], None] | None = None,
    preamble: bytes = b"",
    **attributes: Any,
) -> Made:
    """An instance with new UIDs where none are given, and these attributes by keyword."""
    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 192"
    made.PatientID, made.PatientName = "P1", "Doe^Jane"
    made.StudyDate, made.Modality = "20240102", "OT"
    with disable_value_validation():
        made.SOPClassUID, made.SOPInstanceUID = SOP_CLASS, sop or new_uid()
        made.StudyInstanceUID, made.SeriesInstanceUID = study or new_uid(), series or new_uid()
        for keyword, value in attributes.items():
            setattr(made, keyword, value)
        if change is not None:
            change(made)
    uids = [str(made.get(name, "")) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
    for name in without:
        delattr(made, name)
    media_sop = uids[2].strip() or "1.2"
    for element in elements:
        if element.tag in made:
            del made[element.tag]
    content = to_bytes(made, syntax, preamble, media_sop)
    for element in sorted(elements, reverse=True):
        place = len(to_bytes(_below(made, element.tag), syntax, preamble, media_sop))
        content = content[:place] + element.encoded() + content[place:]
    return Made(uids[0], uids[1], uids[2], content)


def make_with(name: str, value: Any) -> Made:
    """An instance with one attribute of this value."""
    attributes: dict[str, Any] = {name: value}
    return make(**attributes)


def _below(made: Dataset, tag: int) -> Dataset:
    below = Dataset()
    for each in made.keys():  # noqa: SIM118  (a data set iterates over its elements)
        if each < tag:
            below[each] = made[each]
    return below


def to_bytes(made: Dataset, syntax: str = EXPLICIT_LITTLE, preamble: bytes = b"", sop: str = "1.2") -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(SOP_CLASS)
    meta.MediaStorageSOPInstanceUID = UID(sop)
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = UID("1.2.826.0.1.3680043.8.498.1")
    made.file_meta = meta
    if preamble:
        made.preamble = preamble
    buffer = BytesIO()
    with disable_value_validation():
        if syntax == EXPLICIT_BIG:
            dcmwrite(buffer, made, enforce_file_format=True, implicit_vr=False, little_endian=False)
        else:
            dcmwrite(buffer, made, enforce_file_format=True)
    return buffer.getvalue()


def with_pixels(
    pixels: bytes,
    *,
    rows: int = 4,
    columns: int = 4,
    bits: int = 8,
    frames: int | None = None,
    syntax: str = EXPLICIT_LITTLE,
    is_encapsulated: bool = False,
    **attributes: Any,
) -> Made:
    """An instance with this value of Pixel Data: monochrome, unless `attributes` say otherwise."""

    def change(made: Dataset) -> None:
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.Rows, made.Columns, made.PixelRepresentation = rows, columns, 0
        made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
        if frames is not None:
            made.NumberOfFrames = frames
        for keyword, value in attributes.items():
            setattr(made, keyword, value)
        made.PixelData = pixels + b"\0" * (len(pixels) % 2)
        made["PixelData"].VR = "OB" if bits <= 8 or is_encapsulated else "OW"
        made["PixelData"].is_undefined_length = is_encapsulated

    return make(syntax=syntax, change=change)


class Part(NamedTuple):
    """One part of a multipart answer, as Python's email package reads it."""

    content_type: str
    parameters: dict[str, str]
    content: bytes


def parts_of(answer: httpx.Response) -> list[Part]:
    """The parts of an answer, read by a parser that is not ours."""
    head = b"Content-Type: " + answer.headers["Content-Type"].encode() + b"\r\n\r\n"
    message = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(head + answer.content)
    if not message.is_multipart() or message.defects:
        raise ValueError(f"not multipart, or broken: {message.defects}")
    found = []
    for part in message.get_payload():
        assert isinstance(part, email.message.Message)
        parameters = dict((part.get_params() or [])[1:])
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.append(Part(part.get_content_type(), parameters, content))
    return found


def multipart(
    *contents: bytes, boundary: str = "b", head: bytes = b"Content-Type: application/dicom\r\n", end: bytes = b"\r\n"
) -> bytes:
    """The body of a store request."""
    mark = boundary.encode()
    parts = b"".join(b"--" + mark + b"\r\n" + head + b"\r\n" + content + b"\r\n" for content in contents)
    return parts + b"--" + mark + b"--" + end


RELATED = 'multipart/related; type="application/dicom"; boundary=b'


@dataclass(slots=True)
class Web:
    """A running service and its DICOMweb interface."""

    service: RunningService
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.service.url, timeout=60)

    def store(
        self, *made: Made | bytes, version: str = "v2", study: str | None = None, method: str = "POST"
    ) -> httpx.Response:
        """Send instances in one multipart request."""
        contents = [each if isinstance(each, bytes) else each.content for each in made]
        return self.send(multipart(*contents), version=version, study=study, method=method)

    def must_store(self, *made: Made, method: str = "POST") -> None:
        answer = self.store(*made, method=method)
        if answer.status_code not in (200, 202) or "00081198" in answer.json():
            raise RuntimeError(f"not stored: {answer.status_code} {answer.text}")

    def send(
        self,
        body: bytes | Iterable[bytes],
        content_type: str | None = RELATED,
        *,
        version: str = "v2",
        study: str | None = None,
        method: str = "POST",
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        path = f"/{version}/studies" + ("" if study is None else f"/{study}")
        given = ({} if content_type is None else {"Content-Type": content_type}) | (headers or {})
        return self.client.request(method, path, content=body, headers=given)

    def get(self, path: str, accept: str | None = None, *, version: str = "v2", **headers: str) -> httpx.Response:
        """GET; without `accept` there is no Accept header at all. Names of headers with underscores for hyphens."""
        request = self.client.build_request("GET", f"/{version}{path}")
        del request.headers["Accept"]
        if accept is not None:
            request.headers["Accept"] = accept
        for name, value in headers.items():
            request.headers[name.replace("_", "-")] = value
        return self.client.send(request)

    def original(self, made: Made) -> bytes:
        """The stored instance's bytes."""
        answer = self.get(made.path, "application/dicom; transfer-syntax=*").raise_for_status()
        return answer.content

    def metadata(self, path: str, **headers: str) -> list[dict[str, Any]]:
        answer = self.get(f"{path}/metadata", "application/dicom+json", **headers).raise_for_status()
        return list(answer.json())

    def is_stored(self, made: Made) -> bool:
        return self.get(made.path, "application/dicom; transfer-syntax=*").status_code == 200

    def store_files(self) -> set[Path]:
        """Every file in the store's folder, leftovers included."""
        folder = self.service.data_dir / "store"
        return {path for path in folder.rglob("*") if path.is_file() and path.name != ".dicom-depot-store"}

    def raw(self, *pieces: bytes, closes: bool = False) -> tuple[int, bytes]:
        """Send bytes as they are; the answer's status and body. With `closes` the client hangs up instead."""
        with socket.create_connection(("127.0.0.1", self.service.port), timeout=20) as connection:
            for piece in pieces:
                connection.sendall(piece)
            if closes:
                return 0, b""
            received = b""
            while block := connection.recv(1 << 16):
                received += block
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body


@contextlib.contextmanager
def open_web(folder: Path, **settings: object) -> Iterator[Web]:
    """A service on an empty data folder below `folder`."""
    with running_service(folder / "data", **settings) as service:
        web = Web(service)
        try:
            yield web
        finally:
            web.client.close()


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """An empty service; the tests of a module share it, and name what they store by UIDs of their own."""
    with open_web(tmp_path_factory.mktemp("dicomweb")) as running:
        yield running
