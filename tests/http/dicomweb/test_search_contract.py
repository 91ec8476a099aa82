"""What may be asked of the search routes and what matches: the DICOM service's rules (facts, section 2.5) one by one,
with the deliberate differences: wildcards, lists of UIDs, more attributes, JSON errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.http.answers import COMMON_HEADERS, assert_error
from tests.http.dicomweb.conftest import open_web
from tests.support.searched import ROOTS, Searched, first, store_two_studies

VERSIONS = pytest.mark.parametrize("root", ROOTS)

STUDY = (
    *("StudyInstanceUID", "PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "ReferringPhysicianName"),
    *("StudyDate", "StudyDescription", "ModalitiesInStudy", "StudyTime", "StudyID", "PatientSex"),
)
SERIES = (
    *("SeriesInstanceUID", "Modality", "PerformedProcedureStepStartDate", "ManufacturerModelName", "SeriesNumber"),
    *("PerformedProcedureStepStartTime", "SeriesDescription", "RequestAttributesSequence.ScheduledProcedureStepID"),
    "RequestAttributesSequence.RequestedProcedureID",
)
INSTANCE = ("SOPInstanceUID", "SOPClassUID", "InstanceNumber")
SEARCHED_AT = {
    "/studies": (*STUDY,),
    "/series": (*STUDY, *SERIES),
    "/instances": (*STUDY, *SERIES, *INSTANCE),
    "/studies/s/series": (*SERIES,),
    "/studies/s/instances": (*SERIES, *INSTANCE),
    "/studies/s/series/e/instances": (*INSTANCE,),
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    with open_web(tmp_path_factory.mktemp("search contract")) as web:
        yield store_two_studies(web)


def refused(searched: Searched, path: str, query: str, root: str = "/v2") -> dict[str, Any]:
    answer = searched.get(path, query, root)
    return assert_error(answer, 400, answer.json()["code"])


# Parameters


@VERSIONS
def test_names_of_parameters_are_read_in_any_letter_case(searched: Searched, root: str) -> None:
    for query in ("limit=1&offset=1", "LIMIT=1&OFFSET=1", "Limit=1&oFFset=1"):
        assert searched.patients(query, root) == ["A"]
    for query in ("fuzzymatching=true&includefield=PatientAge", "FuzzyMatching=TRUE&IncludeField=00101010"):
        [result] = searched.ask("/studies", f"PatientName=jürg&{query}", root)
        assert first(result, "00101010") == "054Y"


@VERSIONS
@pytest.mark.parametrize("name", ["limit", "Limit", "offset", "OFFSET"])
@pytest.mark.parametrize("value", ["-1", "x", "", " ", "1.5", "1e1", "2147483648", "9" * 20, "١", "0x1"])
def test_a_limit_or_offset_that_is_none_is_named_with_its_bounds(
    searched: Searched, root: str, name: str, value: str
) -> None:
    error = refused(searched, "/studies", f"{name}={value}", root)
    assert error["code"] == "InvalidRequest"
    assert error["target"] == name.lower()
    assert error["message"].startswith(name.capitalize())
    assert ("from 1 to 200" if name.lower() == "limit" else "from 0 to") in error["message"]


def test_limits_go_from_1_to_200(searched: Searched) -> None:
    assert len(searched.ask("/instances", "limit=1")) == 1
    assert len(searched.ask("/instances", "limit=200")) == 4
    for limit in (0, 201):
        assert refused(searched, "/instances", f"limit={limit}")["target"] == "limit"
    assert len(searched.ask("/instances", "offset=0")) == 4
    assert len(searched.ask("/instances", "offset=3")) == 1
    assert searched.get("/instances", "offset=4").status_code == 204
    assert searched.get("/instances", "offset=2147483647").status_code == 204


@VERSIONS
@pytest.mark.parametrize(
    ("query", "target"),
    [
        ("PatientAddress2=1", "PatientAddress2"),
        ("patientid=1", "patientid"),
        ("PATIENTID=1", "PATIENTID"),
        ("patientName=1", "patientName"),
        ("0010FFFF=1", "0010FFFF"),
        ("0010,0020=1", "0010,0020"),
        ("00100=1", "00100"),
        ("(0010,0020)=1", "(0010,0020)"),
        ("=1", ""),
        ("PatientAge=054Y", "PatientAge"),
        ("00090010=DEPOT TEST", "00090010"),
        ("RequestAttributesSequence=1", "RequestAttributesSequence"),
        ("ReferencedStudySequence.ReferencedSOPInstanceUID=1.2", "ReferencedStudySequence.ReferencedSOPInstanceUID"),
        ("ProcedureCodeSequence.CodeValue=P1", "ProcedureCodeSequence.CodeValue"),
        ("00081032.00080100=P1", "00081032.00080100"),
        ("PatientID.PatientName=x", "PatientID.PatientName"),
        ("PatientID=", "PatientID"),
        ("PatientID", "PatientID"),
        ("PatientID=+%20", "PatientID"),
        ("StudyDate=", "StudyDate"),
        ("StudyInstanceUID=", "StudyInstanceUID"),
        ("PatientID=A&PatientID=B", "PatientID"),
        ("PatientID=A&PatientID=A", "PatientID"),
        ("PatientID=A&00100020=A", "00100020"),
        ("0020000d=1.2&0020000D=1.2", "0020000D"),
        ("fuzzymatching=yes", "fuzzymatching"),
        ("fuzzymatching=1", "fuzzymatching"),
        ("fuzzymatching=", "fuzzymatching"),
        ("limit=1&LIMIT=1", "limit"),
        ("offset=1&offset=1", "offset"),
        ("fuzzymatching=true&fuzzymatching=true", "fuzzymatching"),
        ("TimezoneOffsetFromUTC=%2B0100", "TimezoneOffsetFromUTC"),
    ],
)
def test_what_is_no_query_is_refused_with_its_name(searched: Searched, root: str, query: str, target: str) -> None:
    error = refused(searched, "/studies", query, root)
    assert (error["code"], error["target"]) == ("InvalidRequest", target)


@VERSIONS
@pytest.mark.parametrize("route", list(SEARCHED_AT))
def test_each_route_searches_the_attributes_of_its_levels(searched: Searched, root: str, route: str) -> None:
    values = {"UID": "1.2", "Date": "19000101", "Time": "0001", "Number": "99"}
    for keyword in (*STUDY, *SERIES, *INSTANCE):
        value = next((value for ending, value in values.items() if keyword.endswith(ending)), "x")
        value = "x" if keyword == "AccessionNumber" else value
        answer = searched.get(searched.routes()[route], f"{keyword}={value}", root)
        if keyword in SEARCHED_AT[route]:
            assert answer.status_code == 204, (keyword, answer.text)
        else:
            error = assert_error(answer, 400, "InvalidRequest")
            assert error["target"] == keyword
            assert keyword in error["message"]
            assert "case-sensitive" in error["message"]


def test_a_uid_of_the_path_cannot_be_asked_for_again(searched: Searched) -> None:
    routes, study, series = searched.routes(), searched.study, searched.ct[0].series
    for route in ("/studies/s/series", "/studies/s/instances", "/studies/s/series/e/instances"):
        assert refused(searched, routes[route], f"StudyInstanceUID={study}")["target"] == "StudyInstanceUID"
    assert refused(searched, routes["/studies/s/series/e/instances"], f"0020000E={series}")["target"] == "0020000E"
    assert len(searched.ask(routes["/studies/s/instances"], f"0020000e={series}")) == 2


def test_attributes_are_named_by_keyword_or_by_tag_in_any_letter_case(searched: Searched) -> None:
    series = searched.ct[0].series
    for name in ("SeriesInstanceUID", "0020000E", "0020000e"):
        assert len(searched.ask("/series", f"{name}={series}")) == 1
    for name in ("RequestAttributesSequence.RequestedProcedureID", "00400275.00401001"):
        assert [first(each, "00080060") for each in searched.ask("/series", f"{name}=RP1")] == ["MR"]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/studies/x/series", "study"),
        ("/studies/1.2./instances", "study"),
        ("/studies/1.2/series/1.%20x/instances", "series"),
        ("/studies/1.2/series/a/instances", "series"),
        (f"/studies/{'1' * 65}/series", "study"),
    ],
)
@VERSIONS
def test_an_invalid_uid_in_the_path_is_refused(searched: Searched, root: str, path: str, target: str) -> None:
    error = refused(searched, path, "", root)
    assert (error["code"], error["target"]) == ("InvalidIdentifier", target)


def test_more_than_200_parameters_are_refused(searched: Searched) -> None:
    assert refused(searched, "/studies", "&".join(["a=b"] * 201))["target"] == "query"


def test_a_query_in_another_encoding_is_refused(searched: Searched) -> None:
    error = assert_error(searched.web.client.get("/v2/studies?PatientName=M%FCller"), 400, "InvalidRequest")
    assert (error["message"], error["target"]) == ("The query is not UTF-8.", "query")
    assert searched.raw_query(b"PatientName=M\xfcller")[0] == 400


def test_text_beyond_ascii_is_sent_percent_encoded_or_as_it_is(searched: Searched) -> None:
    assert searched.patients("PatientName=M%C3%BCller%5EJ%C3%BCrgen") == ["A"]
    assert searched.patients("PatientName=M%75%CC%88ller%5EJ%75%cc%88rgen") == ["A"]
    status, body = searched.raw_query("PatientName=Müller^Jürgen".encode())
    assert status == 200
    assert len(json.loads(body)) == 1


def test_wildcards_and_signs_may_be_percent_encoded(searched: Searched) -> None:
    assert searched.patients("StudyDescription=Gr%C3%B6%C3%9Fe%20100%25") == ["A"]
    assert searched.patients("StudyDescription=Gr%C3%B6%C3%9Fe+100%25") == ["A"]
    assert searched.patients("StudyDescription=Gr%C3%B6%C3%9Fe%2B100%25") == []
    assert searched.patients("StudyDescription=%2A100%25") == searched.patients("StudyDescription=*100%25") == ["A"]
    assert searched.patients("StudyDescription=Thora%3F") == ["B"]


# Matching


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("PatientID=A", "A"),
        ("PatientID=a", "A"),
        ("PatientID= A ", "A"),
        ("PatientID=A\\B", "BA"),
        ("PatientID=*", "BA"),
        ("PatientID=?", "BA"),
        ("PatientID=??", ""),
        ("StudyDescription=THORAX", "B"),
        ("StudyDescription=thor", ""),
        ("StudyDescription=thor*", "B"),
        ("StudyDescription=*r*x", "B"),
        ("StudyDescription=GRÖ*", "A"),
        ("StudyDescription=%25", ""),
        ("StudyDescription=*%25", "A"),
        ("StudyDescription=Größe_100%25", ""),
        ("AccessionNumber=ACC_1", "A"),
        ("AccessionNumber=ACC_*", "A"),
        ("AccessionNumber=ACCX*", ""),
        ("AccessionNumber=ACC_?", "A"),
        ("AccessionNumber=*", "BA"),
        ("PatientSex=m", "A"),
        ("ModalitiesInStudy=CT", "A"),
        ("ModalitiesInStudy=mr", "A"),
        ("ModalitiesInStudy=PT\\CT", "BA"),
        ("ModalitiesInStudy=?T", "BA"),
        ("ModalitiesInStudy=SR", ""),
        ("StudyInstanceUID=1.2,1.3", ""),
        # Names: letter case and accents mean nothing, component groups stand alone.
        ("PatientName=MULLER^JURGEN", "A"),
        ("PatientName=müller^jürgen", "A"),
        ("PatientName=Müller^Jürgen^^^", "A"),
        ("PatientName=Müller", ""),
        ("PatientName=M*", "A"),
        ("PatientName=m?ller^*", "A"),
        ("PatientName=山田^太郎", "B"),
        ("PatientName=yamada^tarou", "B"),
        ("PatientName=*=山田^*", "B"),
        ("PatientName=やまだ*", "B"),
        ("PatientName=やまた*", ""),
        ("ReferringPhysicianName=παπαδοπουλοσ^γιωργοσ", "A"),
        # Fuzzy: words of the name by their beginnings, in any order.
        ("PatientName=mul&fuzzymatching=true", "A"),
        ("PatientName=jürg mül&fuzzymatching=true", "A"),
        ("PatientName=jürg xul&fuzzymatching=true", ""),
        ("PatientName=uller&fuzzymatching=true", ""),
        ("PatientName=mul*&fuzzymatching=true", "A"),
        ("PatientName=太郎&fuzzymatching=true", "B"),
        ("PatientName=tar^yam&fuzzymatching=TRUE", "B"),
        ("ReferringPhysicianName=γιω&fuzzymatching=true", "A"),
        ("PatientID=A&fuzzymatching=true", "A"),
        ("PatientName=mul&fuzzymatching=false", ""),
        # Ranges, both ends included; less precision stands for all within.
        ("StudyDate=20240101", "A"),
        ("StudyDate=20240101-20240229", "BA"),
        ("StudyDate=20240102-20240228", ""),
        ("StudyDate=20240229-", "B"),
        ("StudyDate=-20240101", "A"),
        ("StudyDate=-20231231", ""),
        ("StudyDate=20240101-20240101", "A"),
        ("StudyTime=101112.5", "A"),
        ("StudyTime=101112", "A"),
        ("StudyTime=10", "A"),
        ("StudyTime=101112.50-101112.500000", "A"),
        ("StudyTime=101112.6-", "B"),
        ("StudyTime=-10", "A"),
        ("StudyTime=10-2359", "BA"),
        ("PatientBirthDate=-", None),
        ("StudyDate=20240102-20240101", None),
        ("StudyDate=20240101-20240102-20240103", None),
        ("StudyDate=2024", None),
        ("StudyDate=20241301", None),
        ("StudyDate=20240132", None),
        ("StudyDate=2024-01-01", None),
        ("StudyDate=2024.01.01", None),
        ("StudyDate=*", None),
        ("StudyDate=yesterday", None),
        ("StudyTime=25", None),
        ("StudyTime=1060", None),
        ("StudyTime=10:11", None),
        ("StudyTime=11-10", None),
        ("StudyTime=101112.1234567", None),
        ("StudyTime=10%2B0100", None),
        ("StudyInstanceUID=x", None),
        ("StudyInstanceUID=1.2,", None),
        ("StudyInstanceUID=1.2.*", None),
        ('PatientName=a"b&fuzzymatching=true', None),
        ("PatientName=^&fuzzymatching=true", None),
        ("PatientName=*&fuzzymatching=true", None),
    ],
)
def test_a_query_finds_what_it_asks_for(searched: Searched, query: str, expected: str | None) -> None:
    for root in ROOTS:
        if expected is None:
            assert refused(searched, "/studies", query, root)["target"] == query.partition("=")[0]
        else:
            assert searched.patients(f"{query}&includefield=PatientID", root) == list(expected)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SeriesNumber=1", ["CT"]),
        ("SeriesNumber= 001 ", ["CT"]),
        ("SeriesNumber=+2", ["MR"]),
        ("SeriesNumber=1.0", None),
        ("SeriesNumber=9223372036854775807", []),
        ("SeriesNumber=9223372036854775808", None),
        ("SeriesNumber=9999999999999999999", None),
        ("SeriesNumber=-9223372036854775809", None),
        ("SeriesNumber=1*", None),
        ("SeriesNumber=x", None),
        ("ManufacturerModelName=scanner ?", ["CT"]),
        ("RequestAttributesSequence.ScheduledProcedureStepID=SPS2", ["MR"]),
        ("RequestAttributesSequence.ScheduledProcedureStepID=sps*", ["MR"]),
        ("RequestAttributesSequence.ScheduledProcedureStepID=RP1", []),
        ("RequestAttributesSequence.RequestedProcedureID=RP3", []),
        ("PatientID=A&Modality=CT", ["CT"]),
        ("PatientID=B&Modality=CT", []),
        ("ModalitiesInStudy=CT", ["MR", "CT"]),
        ("PerformedProcedureStepStartDate=20240101-&PerformedProcedureStepStartTime=10", ["CT"]),
    ],
)
def test_series_are_found_by_their_own_attributes_and_their_studys(
    searched: Searched, query: str, expected: list[str] | None
) -> None:
    if expected is None:
        refused(searched, "/series", query)
    else:
        assert [first(each, "00080060") for each in searched.ask("/series", query)] == expected


def test_uids_may_be_listed(searched: Searched) -> None:
    sops = [searched.ct[0].sop, searched.mr.sop, searched.pt.sop]
    for separator in (",", "\\", ", "):
        found = searched.ask("/instances", f"SOPInstanceUID={separator.join([*sops, sops[0], '1.2.3'])}")
        assert [first(each, "00080018") for each in found] == sops[::-1]
    assert refused(searched, "/instances", "SOPInstanceUID=" + ",".join(f"1.{n}" for n in range(1001)))["target"]
    assert searched.ask("/instances", "SOPInstanceUID=" + ",".join(f"1.{n}" for n in range(1000))) == []


def test_errors_carry_the_common_headers(searched: Searched) -> None:
    answer = searched.get("/studies", "limit=0")
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()
