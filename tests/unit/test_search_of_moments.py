"""Dates with times in searches: what no attribute of the index has by itself, but an extended query tag may."""

from __future__ import annotations

import pytest

from dicom_depot.codec.qido import SearchResource, parse_filters, parse_search
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.query_tags import QueryTag, TagStatus
from dicom_depot.domain.search import Between, Exactly, Level, Match

ACQUIRED = QueryTag(tag=0x0008002A, vr="DT", level=Level.INSTANCE, id=1, status=TagStatus.READY)


def match_of(value: str) -> Match:
    search = parse_search([("AcquisitionDateTime", value)], SearchResource(Level.INSTANCE), {ACQUIRED.tag: ACQUIRED})
    [condition] = search.query.conditions
    return condition.match


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [
        ("2024", "20240101000000000000", "2024" + "9" * 16),
        ("202402", "20240201000000000000", "202402" + "9" * 14),
        ("20240203", "20240203000000000000", "20240203" + "9" * 12),
        ("2024020304", "20240203040000000000", "2024020304" + "9" * 10),
        ("202402030405", "20240203040500000000", "202402030405" + "9" * 8),
        ("20240203040506", "20240203040506000000", "20240203040506" + "9" * 6),
        ("20240203040506.7", "20240203040506700000", "20240203040506799999"),
        ("2023-20240203", "20230101000000000000", "20240203" + "9" * 12),
        ("2023-", "20230101000000000000", None),
        ("-20240203040506", None, "20240203040506" + "9" * 6),
    ],
)
def test_a_moment_stands_for_all_within_its_precision(value: str, first: str | None, last: str | None) -> None:
    assert match_of(value) == Between(first, last)


def test_a_moment_of_full_precision_is_one_value() -> None:
    assert match_of("20240203040506.123456") == Exactly(("20240203040506123456",))


@pytest.mark.parametrize(
    "value",
    [
        *("20240203+0100", "20240203-0100-20240204", "20240203040506.123456+0000", "20240203040506-0500-"),
        *("-", "2024-2023", "202413", "20240132", "2024010125", "202401011060", "20240101101061", "202", "x", "2024-x"),
        *("20240203 0405", "2024.01.01"),
    ],
)
def test_a_time_zone_or_what_is_no_moment_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        match_of(value)
    assert raised.value.target == "AcquisitionDateTime"


def test_a_date_with_dashes_is_told_how_dates_are_written() -> None:
    for value in ("2024-01-31", "2024-01-31-2024-02-29"):
        with pytest.raises(InvalidRequest, match="without dashes, as 20240131"):
            parse_filters([("StudyDate", value)], [Level.STUDY], {})
