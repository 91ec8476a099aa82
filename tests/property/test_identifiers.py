"""Identifiers: the parser accepts exactly what the rule says, and what it accepts means the same again."""

from __future__ import annotations

import re
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from dicom_depot.domain.errors import InvalidIdentifier
from dicom_depot.domain.export import select
from dicom_depot.domain.identifiers import InstanceRef, SeriesRef, StudyRef, parent_refs, parse_identifier, parse_uid

UIDS = st.from_regex(r"[0-9.]{0,63}[0-9]", fullmatch=True).filter(str.isascii)
NEAR_UIDS = st.text(alphabet="0123456789. \0\t/x\u0662-", max_size=70)
REFS = st.lists(UIDS, min_size=1, max_size=3).map(lambda uids: parse_identifier("/".join(uids)))
FEW = st.lists(st.sampled_from("12"), min_size=1, max_size=3).map(lambda uids: parse_identifier("/".join(uids)))


def is_uid(text: str) -> bool:
    """The rule in other words: trailing padding aside, 1 to 64 ASCII digits and dots that end in a digit."""
    uid = text.rstrip(" \0")
    return 1 <= len(uid) <= 64 and set(uid) <= set("0123456789.") and uid[-1] != "."


def outcome_of(parse: Callable[[str], object], text: str) -> tuple[object, str]:
    """What was parsed, or None and the message of the refusal."""
    try:
        return parse(text), ""
    except InvalidIdentifier as error:
        return None, error.message


def is_fit_for_a_log(message: str) -> bool:
    return message.isascii() and (message.isprintable() or not message) and len(message) < 400


@given(UIDS, st.text(alphabet=" \0", max_size=5))
def test_a_uid_is_read_without_its_padding(uid: str, padding: str) -> None:
    assert parse_uid(uid + padding) == uid


@given(st.one_of(NEAR_UIDS, st.text(max_size=70)))
def test_a_uid_is_accepted_exactly_by_the_rule(text: str) -> None:
    parsed, refusal = outcome_of(parse_uid, text)
    assert (parsed is not None) == is_uid(text)
    assert is_fit_for_a_log(refusal)
    if parsed is not None:
        assert text.startswith(str(parsed))


@given(st.lists(UIDS, min_size=1, max_size=3), st.sampled_from(["", " ", "\t ", "\n"]))
def test_an_identifier_is_read_and_written_alike(uids: list[str], space: str) -> None:
    ref = parse_identifier("/".join(f"{space}{uid}{space}" for uid in uids))
    assert type(ref) is (StudyRef, SeriesRef, InstanceRef)[len(uids) - 1]
    assert str(ref) == "/".join(uids)
    assert parse_identifier(str(ref)) == ref
    assert [str(parent) for parent in parent_refs(ref)] == ["/".join(uids[:n]) for n in range(1, len(uids))]


@given(st.one_of(NEAR_UIDS, st.text(), st.lists(NEAR_UIDS, max_size=5).map("/".join)))
def test_an_identifier_is_accepted_exactly_by_the_rule(text: str) -> None:
    parts = text.split("/")
    is_valid = len(parts) <= 3 and all(is_uid(part.strip()) for part in parts)
    parsed, refusal = outcome_of(parse_identifier, text)
    assert (parsed is not None) == is_valid
    assert is_fit_for_a_log(refusal)
    if parsed is not None:
        assert re.sub(r"[\s\0]", "", text) == str(parsed)


@given(st.lists(st.one_of(FEW, REFS), max_size=30))
def test_sorting_out_overlaps_keeps_every_identifier_once(refs: list[StudyRef | SeriesRef | InstanceRef]) -> None:
    selection = select(refs)
    both = [*selection.planned, *selection.covered]
    assert len(both) == len(set(both))
    assert set(both) == set(refs)
    planned = set(selection.planned)
    for ref in selection.planned:
        assert planned.isdisjoint(parent_refs(ref)), "two that are planned overlap"
    for ref in selection.covered:
        assert not planned.isdisjoint(parent_refs(ref)), "nothing that is planned contains it"
    kinds = [type(ref) for ref in selection.planned]
    assert kinds == sorted(kinds, key=[StudyRef, SeriesRef, InstanceRef].index)
