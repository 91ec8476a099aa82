"""The body of an export by query: what is understood, and where an error points at."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.export import DestinationSpec, ExportSpecification, Matching, Source
from dicom_depot.domain.query_tags import QueryTag, TagStatus
from dicom_depot.domain.search import Level
from dicom_depot.web.bodies import parse_json, parse_source

READY = QueryTag(0x00091001, "LO", Level.INSTANCE, "ACME", id=7, status=TagStatus.READY)
ADDING = QueryTag(0x00091002, "LO", Level.INSTANCE, "ACME", id=8, operation_id="0" * 32)


def parsed(settings: Any, *, type_: str = "query") -> Source:
    body = {"Source": {"Type": type_, "Settings": settings}, "destination": {}}
    return parse_source(parse_json(json.dumps(body).encode()), 10, lambda: {tag.tag: tag for tag in (READY, ADDING)})


def query(level: str = "instance", **filters: Any) -> dict[str, Any]:
    return {"level": level, "filters": filters}


@pytest.mark.parametrize("type_", ["query", "Query"])
def test_members_have_any_letter_case_and_filters_stay_as_given(type_: str) -> None:
    filters = {"00080060": "CT", "PatientName": " Dö* ", "00091001": "a", "StudyDate": "-20241231"}
    source = parsed({"LEVEL": "Instance", "Filters": filters, "fuzzyMatching": True}, type_=type_)
    assert source == Matching(Level.INSTANCE, filters, is_fuzzy=True)


@pytest.mark.parametrize("level", ["study", "series", "instance"])
def test_each_level_takes_the_attributes_down_to_it(level: str) -> None:
    below = {"PatientID": "study", "ModalitiesInStudy": "study", "Modality": "series", "InstanceNumber": "instance"}
    order = ["study", "series", "instance"]
    for name, of in below.items():
        if order.index(of) <= order.index(level):
            assert parsed(query(level, **{name: "1"})) == Matching(Level(level), {name: "1"})
        else:
            with pytest.raises(InvalidRequest, match=f"{name} belongs to the {of}") as caught:
                parsed(query(level, **{name: "1"}))
            assert caught.value.target == f"source.settings.filters.{name}"


@pytest.mark.parametrize(
    ("settings", "target", "said"),
    [
        (None, "", "is required"),
        ([], "", "must be an object, not a list"),
        ({}, ".level", "is required"),
        ({"level": "series"}, ".filters", "is required"),
        ({"level": "patient", "filters": {"Modality": "CT"}}, ".level", "must be one of: instance, series, study"),
        ({"level": 1, "filters": {"Modality": "CT"}}, ".level", "must be a string, not a number"),
        (query() | {"values": ["1.2.3"]}, ".values", "'values' is not a member of source.settings"),
        (query() | {"filter": {}}, ".filter", "Did you mean 'filters'"),
        (query(Modality="CT") | {"fuzzymatching": "true"}, ".fuzzymatching", "must be true or false, not a string"),
        (query() | {"filters": [["Modality", "CT"]]}, ".filters", "must be an object of attributes"),
        (query(), ".filters", "leave `source` out for everything"),
        (query(PatientName="*"), ".filters", "leave `source` out for everything"),
        (query(PatientName="**", PatientID=" * "), ".filters", "no filter that restricts anything"),
        (query(Modality=None), ".filters.Modality", "must be a string, not null"),
        (query(SeriesNumber=1), ".filters.SeriesNumber", "must be a string, not a number"),
        (query(Modality=["CT"]), ".filters.Modality", "must be a string, not a list"),
        (query(Modality=""), ".filters.Modality", "is empty"),
        (query(Modality="C\nT"), ".filters.Modality", "control character"),
        (query(Modality="x" * 65_537), ".filters.Modality", "65537 characters; at most 65536"),
        (query(modality="CT"), ".filters.modality", "letter case matters.*Did you mean Modality"),
        (query(Rows="5"), ".filters.Rows", "cannot be searched"),
        (query(Nonsense="5"), ".filters.Nonsense", "is no attribute"),
        (query(Modality="CT", **{"00080060": "MR"}), ".filters.00080060", "given twice"),
        (query(StudyDate="2024"), ".filters.StudyDate", "is no date"),
        (query(StudyDate="20241231-20240101"), ".filters.StudyDate", "ends before it begins"),
        (query(StudyInstanceUID="1.2,x"), ".filters.StudyInstanceUID", "not a UID"),
        (query(Modality="\\".join(["CT"] * 1001)), ".filters.Modality", "at most 1000 values"),
        (query(**{"00091002": "x"}), ".filters.00091002", "still being added"),
        (query(**{"00091003": "x"}), ".filters.00091003", "cannot be searched"),
        (query(**{"N" * 250: "x"}), ".filters.NNN", "is no attribute"),
    ],
)
def test_errors_name_their_place(settings: Any, target: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"(?s){said}") as caught:
        parsed(settings)
    assert str(caught.value.target).startswith(f"source.settings{target}")
    assert len(str(caught.value.target)) <= 200


@pytest.mark.parametrize("name", ["Modality", "MODALITY"])
def test_a_filter_that_stands_twice_is_refused_by_the_reader(name: str) -> None:
    filters = f'{{"Modality": "CT", "{name}": "MR"}}'
    with pytest.raises(InvalidRequest, match="stands twice"):
        parse_json(f'{{"source": {{"type": "query", "settings": {{"filters": {filters}}}}}}}'.encode())


def test_the_type_decides_which_settings_are_known() -> None:
    for type_, settings in (("query", {"values": ["1.2.3"]}), ("identifiers", query(Modality="CT"))):
        with pytest.raises(InvalidRequest, match=r"is not a member of source\.settings"):
            parsed(settings, type_=type_)


def test_equal_queries_have_equal_fingerprints_and_others_do_not() -> None:
    def fingerprint(source: Source) -> str:
        return ExportSpecification(source, DestinationSpec("file", {"folder": ""})).fingerprint()

    one = query("series", Modality="CT", PatientID="1")
    assert fingerprint(parsed(one)) == fingerprint(parsed(query("series", PatientID="1", Modality="CT")))
    others = [
        query("instance", Modality="CT", PatientID="1"),
        query("series", Modality="CT"),
        query("series", Modality="ct", PatientID="1"),
        one | {"fuzzymatching": True},
    ]
    assert len({fingerprint(parsed(each)) for each in [one, *others]}) == 5
