"""What the search routes answer with: which attributes, of which instance, in which order and form (facts, section 2.5;
PS3.18 section 10.6).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydicom.datadict import tag_for_keyword

from tests.http.answers import COMMON_HEADERS, assert_error
from tests.http.dicomweb.conftest import Made, Raw, Web, make, new_uid, open_web
from tests.support.searched import JSON, ROOTS, Searched, first, store_two_studies

VERSIONS = pytest.mark.parametrize("root", ROOTS)

STUDY_1 = (
    "SpecificCharacterSet StudyDate StudyTime AccessionNumber InstanceAvailability ReferringPhysicianName"
    " TimezoneOffsetFromUTC PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyID"
)
SERIES_1 = (
    "SpecificCharacterSet Modality TimezoneOffsetFromUTC SeriesDescription SeriesInstanceUID"
    " PerformedProcedureStepStartDate PerformedProcedureStepStartTime RequestAttributesSequence"
)
INSTANCE_1 = (
    "SpecificCharacterSet SOPClassUID SOPInstanceUID InstanceAvailability TimezoneOffsetFromUTC InstanceNumber Rows"
    " Columns BitsAllocated NumberOfFrames"
)
STUDY_2 = (
    "StudyInstanceUID StudyDate StudyDescription AccessionNumber ReferringPhysicianName PatientName PatientID"
    " PatientBirthDate"
)
SERIES_2 = "SeriesInstanceUID Modality PerformedProcedureStepStartDate ManufacturerModelName"
INSTANCE_2 = "SOPInstanceUID"
STUDY_STANDARD = (
    f"{STUDY_1} StudyDescription ModalitiesInStudy NumberOfStudyRelatedSeries NumberOfStudyRelatedInstances RetrieveURL"
)
SERIES_STANDARD = f"{SERIES_1} SeriesNumber NumberOfSeriesRelatedInstances InstanceAvailability RetrieveURL"
INSTANCE_STANDARD = f"{INSTANCE_1} RetrieveURL"
STUDY_ALL = (
    "StudyDescription ProcedureCodeSequence PatientAge PatientWeight AnatomicRegionsInStudyCodeSequence"
    " NameOfPhysiciansReadingStudy AdmittingDiagnosesDescription ReferencedStudySequence PatientSize Occupation"
    " AdditionalPatientHistory"
)
SERIES_ALL = "SeriesNumber Laterality SeriesDate SeriesTime"
LEVELS = {
    "/v1": (STUDY_1, SERIES_1, INSTANCE_1),
    "/v2": (STUDY_2, SERIES_2, INSTANCE_2),
    "": (STUDY_STANDARD, SERIES_STANDARD, INSTANCE_STANDARD),
}
ROUTES = {
    "/studies": (0, 1),
    "/series": (0, 2),
    "/instances": (0, 3),
    "/studies/s/series": (1, 2),
    "/studies/s/instances": (1, 3),
    "/studies/s/series/e/instances": (2, 3),
}
"""The levels whose default sets are answered; above them stand the UIDs of the path."""


def tags(keywords: str) -> set[str]:
    return {f"{tag_for_keyword(keyword):08X}" for keyword in keywords.split()}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    with open_web(tmp_path_factory.mktemp("search answers")) as web:
        yield store_two_studies(web)


@pytest.fixture(scope="module")
def present(searched: Searched) -> set[str]:
    """The tags of the first CT instance."""
    [found] = searched.web.metadata(searched.ct[0].path)
    return set(found)


def of_ct(searched: Searched, route: str, query: str = "", root: str = "/v2") -> dict[str, Any]:
    """What a route says of the CT series, its study or its first instance."""
    names = {"/studies": "PatientID=A", "/series": "Modality=CT", "/instances": f"SOPInstanceUID={searched.ct[0].sop}"}
    filters = names.get(route) or ("Modality=CT" if route.endswith("series") else f"00080018={searched.ct[0].sop}")
    found = searched.ask(searched.routes()[route], "&".join(filter(None, (filters, query))), root)
    assert len(found) == 1
    return found[0]


# Attributes


@VERSIONS
@pytest.mark.parametrize("route", list(ROUTES))
def test_each_version_answers_with_its_default_set(
    searched: Searched, present: set[str], root: str, route: str
) -> None:
    above, end = ROUTES[route]
    expected = set().union(
        *map(tags, LEVELS[root][above:end]), tags("StudyInstanceUID SeriesInstanceUID"[: 17 * above])
    )
    computed = tags(
        "ModalitiesInStudy NumberOfStudyRelatedSeries NumberOfStudyRelatedInstances NumberOfSeriesRelatedInstances"
        " RetrieveURL InstanceAvailability"
    )
    has_requests = tags("RequestAttributesSequence") if route != "/studies" else set()
    filters = {"/studies": "PatientID", "/instances": "SOPInstanceUID"}.get(route, "Modality" if end == 2 else "")
    matched = tags(filters or "SOPInstanceUID")
    found = of_ct(searched, route, root=root)
    assert set(found) == (expected | matched) & (present | computed) - has_requests
    assert expected - set(found) <= has_requests, "the study has all others"
    assert list(found) == sorted(found), "in the order of their tags (PS3.18 section F.2.2)"


@VERSIONS
def test_request_attributes_are_answered_as_the_sequence_that_they_are(searched: Searched, root: str) -> None:
    query = "Modality=MR&includefield=RequestAttributesSequence"
    [found] = searched.ask("/series", query, root)
    steps = [first(item, "00400009") for item in found["00400275"]["Value"]]
    assert (found["00400275"]["vr"], steps) == ("SQ", ["SPS1", "SPS2"])
    if root == "/v2":
        [found] = searched.ask("/series", "00400275.00401001=RP2")
        assert found["00400275"]["Value"] == [{"00401001": {"vr": "SH", "Value": [each]}} for each in ("RP1", "RP2")], (
            "what is matched, and nothing else"
        )


def test_filters_are_answered_too(searched: Searched) -> None:
    found = of_ct(searched, "/studies", "StudyID=S1&PatientSex=*&ModalitiesInStudy=CT")
    assert set(found) == tags(STUDY_2) | tags("StudyID PatientSex ModalitiesInStudy")
    assert found["00080061"] == {"vr": "CS", "Value": ["CT", "MR"]}


@VERSIONS
def test_all_adds_the_sets_of_both_versions_and_more(searched: Searched, present: set[str], root: str) -> None:
    study, series, instance = (tags(each) & present for each in LEVELS[root])
    study |= tags(f"{STUDY_1} {STUDY_2} {STUDY_ALL}") & present
    series |= tags(f"{SERIES_1} {SERIES_2} {SERIES_ALL}") & present
    instance |= tags(INSTANCE_1) & present
    computed = tags(" ".join(LEVELS[root])) & tags(
        "ModalitiesInStudy NumberOfStudyRelatedSeries NumberOfStudyRelatedInstances RetrieveURL"
    )
    of_series = tags("NumberOfSeriesRelatedInstances") if root == "" else set()
    assert set(of_ct(searched, "/studies", "includefield=all", root)) == study | computed
    assert set(of_ct(searched, "/series", "includefield=All", root)) == study | series | computed | of_series
    assert set(of_ct(searched, "/instances", "IncludeField=ALL", root)) == (
        study | series | instance | computed | of_series
    )


@VERSIONS
@pytest.mark.parametrize(
    "query",
    [
        *("includefield=all,PatientAge", "includefield=PatientAge,all", "includefield=all&includefield=PatientAge"),
        *("includefield=", "includefield=PatientAge,", "includefield=patientage", "includefield=0010FFFF"),
        *("includefield=NoSuchAttribute", "includefield=PatientID.PatientName", "includefield=*", "includefield=0010"),
    ],
)
def test_what_cannot_be_included_is_refused(searched: Searched, root: str, query: str) -> None:
    error = assert_error(searched.get("/studies", query, root), 400, "InvalidRequest")
    assert error["target"] == "includefield"
    assert "includefield" in error["message"]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("PatientAge", {"00101010": {"vr": "AS", "Value": ["054Y"]}}),
        ("00101010", {"00101010": {"vr": "AS", "Value": ["054Y"]}}),
        ("PatientAge,ImageComments", {"00101010": {"vr": "AS", "Value": ["054Y"]}, "00204000": None}),
        ("PatientAge&includefield=00204000", {"00101010": {"vr": "AS", "Value": ["054Y"]}, "00204000": None}),
        ("PixelSpacing", {"00280030": {"vr": "DS", "Value": [0.5, 0.25]}}),
        ("PatientWeight", {"00101030": {"vr": "DS", "Value": [70.5]}}),
        ("00090010,00091001", {"00090010": None, "00091001": {"vr": "LO", "Value": ["secret"]}}),
        ("00091002", {}),
        ("PixelData", {}),
        ("EthnicGroup", {}),
        ("SOPClassUID.CodeValue", None),
        ("SourceImageSequence.CodeValue", {"00082112": ["00080100"]}),
        ("00082112.00080100,00082112.CodeMeaning", {"00082112": ["00080100", "00080104"]}),
        ("SourceImageSequence", {"00082112": ["00080100", "00080102", "00080104"]}),
        ("SourceImageSequence,SourceImageSequence.CodeValue", {"00082112": ["00080100", "00080102", "00080104"]}),
        ("SourceImageSequence.PatientID", {"00082112": []}),
        ("ModalitiesInStudy", {"00080061": {"vr": "CS", "Value": ["CT", "MR"]}}),
        ("NumberOfStudyRelatedSeries", {"00201206": {"vr": "IS", "Value": [2]}}),
        ("NumberOfStudyRelatedInstances", {"00201208": {"vr": "IS", "Value": [3]}}),
        ("NumberOfSeriesRelatedInstances", {"00201209": {"vr": "IS", "Value": [2]}}),
    ],
)
def test_any_attribute_may_be_included(searched: Searched, field: str, expected: dict[str, Any] | None) -> None:
    if expected is None:
        assert searched.get("/instances", f"includefield={field}").status_code == 400
        return
    found = of_ct(searched, "/instances", f"includefield={field}")
    assert set(found) == tags(f"{STUDY_2} {SERIES_2} {INSTANCE_2}") | set(expected)
    for tag, element in expected.items():
        if isinstance(element, list):
            assert [list(item) for item in found[tag]["Value"]] == [element] * 2
        else:
            assert element in (None, found[tag])


def test_no_version_names_where_to_retrieve_but_the_standards_own_root_does(searched: Searched) -> None:
    made = searched.ct[0]
    for route in ROUTES:
        for root in ("/v1", "/v2"):
            assert "00081190" not in of_ct(searched, route, "includefield=RetrieveURL", root)
        url = of_ct(searched, route, root="")["00081190"]
        path = made.path if route.endswith("instances") else f"/studies/{made.study}"
        path += f"/series/{made.series}" if route.endswith("series") else ""
        assert url == {"vr": "UR", "Value": [f"{searched.web.service.url}{path}"]}
        assert searched.web.client.get(url["Value"][0]).status_code == 200


# Order, pages, headers


@VERSIONS
def test_the_newest_comes_first(searched: Searched, root: str) -> None:
    made = [searched.pt, searched.mr, searched.ct[1], searched.ct[0]]
    assert [first(each, "00080018") for each in searched.ask("/instances", "", root)] == [each.sop for each in made]
    series = dict.fromkeys(each.series for each in made)
    assert [first(each, "0020000E") for each in searched.ask("/series", "", root)] == list(series)
    assert searched.patients(root=root) == ["B", "A"]
    for offset in range(4):
        found = searched.ask("/instances", f"limit=1&offset={offset}", root)
        assert [first(each, "00080018") for each in found] == [made[offset].sop]


def test_nothing_found_is_204_without_a_body(searched: Searched) -> None:
    for path in (*searched.routes().values(), "/studies/1.2/series", "/studies/1.2/series/1.3/instances"):
        query = "" if "/1.2/" in path else "offset=100"
        for root in ROOTS:
            answer = searched.get(path, query, root)
            assert (answer.status_code, answer.content) == (204, b"")
            assert COMMON_HEADERS.items() <= dict(answer.headers).items()
            assert "Warning" not in answer.headers


def test_a_warning_says_that_there_are_more(searched: Searched) -> None:
    for query, count in (("limit=1", ""), ("limit=1&PatientID=*&PatientSex=*", ""), ("limit=3&Modality=*T", None)):
        answer = searched.get("/instances", query)
        if count is None:
            assert "Warning" not in answer.headers
        else:
            assert answer.headers["Warning"].startswith(f"299 {searched.web.service.url}: There are ")
    answer = searched.get("/instances", "limit=1&PatientID=A\\B")
    assert "There are 3 additional results that can be requested." in answer.headers["Warning"]
    assert "Warning" not in searched.get("/instances", "limit=4").headers


@pytest.mark.parametrize(
    "accept", [None, "*/*", JSON, "application/json", "application/*", "Application/DICOM+JSON;q=1"]
)
def test_dicom_json_is_sent_to_whoever_takes_it(searched: Searched, accept: str | None) -> None:
    answer = searched.get("/studies", accept=accept)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == JSON
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()
    assert len(json.loads(answer.content)) == 2


@VERSIONS
@pytest.mark.parametrize("accept", ["application/dicom", "application/data", "text/html", "application/dicom+xml", "x"])
def test_whoever_takes_something_else_gets_nothing(searched: Searched, root: str, accept: str) -> None:
    for path in searched.routes().values():
        answer = searched.get(path, "PatientID=A", root, accept)
        assert answer.status_code in (400, 406)
        if accept != "x":
            assert_error(answer, 406, "NotAcceptable")


def test_only_get_searches(searched: Searched) -> None:
    for method in ("HEAD", "PUT", "PATCH"):
        answer = searched.web.client.request(method, "/v1/series")
        assert answer.status_code == 405
        assert answer.headers["Allow"] == "GET"
    assert searched.web.client.head("/v1/studies").status_code == 405


# What changes


def test_study_and_series_say_what_was_stored_last_and_what_is_deleted_says_nothing(web: Web) -> None:
    searched = Searched(web, (make(), make()), make(), make())
    study, series = new_uid(), new_uid()
    first_one: dict[str, Any] = {"PatientSex": "F"}
    made: list[Made] = []
    for number, (description, modality) in enumerate((("first", "CT"), ("second", "MR"), ("third", "PT"))):
        more = {} if number else first_one
        made.append(make(study=study, series=series, StudyDescription=description, Modality=modality, **more))
        web.must_store(made[-1])
        [found] = searched.ask("/studies", f"StudyDescription={description}&PatientSex=*&ModalitiesInStudy={modality}")
        assert first(found, "00081030") == description
        assert ("Value" in found.get("00100040", {})) == (number == 0), "what the last one lacks is not there"
        assert not searched.ask("/studies", "StudyDescription=first") or number == 0
    [found] = searched.ask("/series", "Modality=PT&includefield=NumberOfSeriesRelatedInstances")
    assert first(found, "00201209") == 3
    replaced = make(study=study, series=series, sop=made[0].sop, StudyDescription="fourth", Modality="US")
    web.must_store(replaced, method="PUT")
    assert [first(each, "00080018") for each in searched.ask("/instances", f"0020000D={study}")] == [
        *(each.sop for each in (replaced, made[2], made[1]))
    ]
    assert len(searched.ask("/studies", "StudyDescription=fourth&ModalitiesInStudy=US")) == 1
    web.client.delete(f"/v2{replaced.path}").raise_for_status()
    assert (
        searched.ask("/studies", "StudyDescription=fourth")
        == searched.ask("/instances", f"00080018={made[0].sop}")
        == []
    )
    [found] = searched.ask("/studies", f"StudyInstanceUID={study}&includefield=NumberOfStudyRelatedInstances")
    assert (first(found, "00081030"), first(found, "00201208")) == ("third", 2)
    web.client.delete(f"/v2/studies/{study}/series/{series}").raise_for_status()
    for path in (f"/studies?StudyInstanceUID={study}", f"/studies/{study}/series", f"/studies/{study}/instances"):
        assert web.client.get(f"/v2{path}").status_code == 204
    web.must_store(made[1])
    assert [first(each, "00081030") for each in searched.ask("/studies", f"0020000D={study}")] == ["second"]


def test_an_answer_is_json_whatever_numbers_an_instance_holds(web: Web) -> None:
    made = make(elements=[Raw(0x00101030, "DS", b"1e400 "), Raw(0x00101020, "DS", b"-1E999")])
    web.must_store(made)
    answer = web.client.get(f"/v2/studies?StudyInstanceUID={made.study}&includefield=PatientWeight,PatientSize")
    [found] = json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [first(found, tag) for tag in ("00101030", "00101020")] == ["1e400", "-1E999"]
