"""Two studies for the tests of the search routes, and how the routes are asked. No assertions live here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.http.dicomweb.conftest import Made, Web, make, new_uid

ROOTS = ("/v1", "/v2", "")
JSON = "application/dicom+json"


def request_item(step: str, procedure: str) -> Dataset:
    item = Dataset()
    item.ScheduledProcedureStepID, item.RequestedProcedureID = step, procedure
    return item


@dataclass
class Searched:
    """A service with a study of three instances in two series, and a newer study of one."""

    web: Web
    ct: tuple[Made, Made]
    mr: Made
    pt: Made

    @property
    def study(self) -> str:
        return self.mr.study

    def routes(self) -> dict[str, str]:
        """The six routes, by their name in the facts."""
        series = f"/studies/{self.study}/series"
        return {
            "/studies": "/studies",
            "/series": "/series",
            "/instances": "/instances",
            "/studies/s/series": series,
            "/studies/s/instances": f"/studies/{self.study}/instances",
            "/studies/s/series/e/instances": f"{series}/{self.ct[0].series}/instances",
        }

    def get(self, path: str, query: str = "", root: str = "/v2", accept: str | None = JSON) -> httpx.Response:
        """GET with a query string that is sent as it is, but for blanks and letters beyond ASCII."""
        url = f"{root}{path}" + (f"?{quote(query, safe=_SENT_AS_IT_IS)}" if query else "")
        request = self.web.client.build_request("GET", url)
        del request.headers["Accept"]
        if accept is not None:
            request.headers["Accept"] = accept
        return self.web.client.send(request)

    def raw_query(self, query: bytes) -> tuple[int, bytes]:
        """The status and body for a query of exactly these bytes."""
        return self.web.raw(b"GET /v2/studies?" + query + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")

    def ask(self, path: str, query: str = "", root: str = "/v2") -> list[dict[str, Any]]:
        answer = self.get(path, query, root)
        if answer.status_code not in (200, 204):
            raise RuntimeError(f"{answer.status_code} {answer.text}")
        return list(answer.json()) if answer.content else []

    def patients(self, query: str = "", root: str = "/v2") -> list[str]:
        """The patients of the studies that are found, newest first."""
        return [first(result, "00100020") for result in self.ask("/studies", query, root)]


_SENT_AS_IT_IS = "&=%+,;:/?-_.~*'()!$@"


def first(result: dict[str, Any], tag: str) -> Any:
    return (result.get(tag, {}).get("Value") or [None])[0]


def store_two_studies(web: Web) -> Searched:
    """The studies of patients A and B."""
    older, newer, ct_series = new_uid(), new_uid(), new_uid()
    of_older: dict[str, Any] = {
        "study": older,
        "PatientID": "A",
        "PatientName": "Müller^Jürgen",
        "PatientBirthDate": "19700131",
        "PatientSex": "M",
        "StudyDate": "20240101",
        "StudyTime": "101112.5",
        "StudyDescription": "Größe 100%",
        "AccessionNumber": "ACC_1",
        "ReferringPhysicianName": "Παπαδόπουλος^Γιώργος",
        "StudyID": "S1",
        "TimezoneOffsetFromUTC": "+0100",
        "InstanceAvailability": "NEARLINE",
        "ProcedureCodeSequence": Sequence([_code("P1")]),
        "PatientAge": "054Y",
        "PatientWeight": "70.5",
    }
    of_series: dict[str, Any] = {
        "SeriesDescription": "Axial",
        "SeriesDate": "20240102",
        "SeriesTime": "1112",
        "Laterality": "L",
        "ManufacturerModelName": "Scanner 1",
        "PerformedProcedureStepStartDate": "20240101",
        "PerformedProcedureStepStartTime": "1011",
        "Rows": 4,
        "Columns": 5,
        "BitsAllocated": 8,
        "NumberOfFrames": 2,
        "ImageComments": "seen",
        "PixelSpacing": [0.5, 0.25],
        "SourceImageSequence": Sequence([_code("Q1"), _code("Q2")]),
    }
    requests = Sequence([request_item("SPS1", "RP1"), request_item("SPS2", "RP2")])

    def private(made: Dataset) -> None:
        block = made.private_block(0x0009, "DEPOT TEST", create=True)
        block.add_new(1, "LO", "secret")
        block.add_new(2, "OB", b"\1\2")

    ct = [
        make(series=ct_series, Modality="CT", SeriesNumber=1, InstanceNumber=n, change=private, **of_older, **of_series)
        for n in (1, 2)
    ]
    mr = make(Modality="MR", SeriesNumber=2, InstanceNumber=7, RequestAttributesSequence=requests, **of_older)
    pt = make(
        study=newer,
        PatientID="B",
        PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう",
        StudyDate="20240229",
        StudyTime="235959",
        StudyDescription="Thorax",
        Modality="PT",
        SeriesNumber=3,
        InstanceNumber=1,
    )
    for each in (*ct, mr, pt):
        web.must_store(each)
    return Searched(web, (ct[0], ct[1]), mr, pt)


def _code(value: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", f"meaning of {value}"
    return item
