"""Multipart bodies: however parts, boundary and blocks are chosen, what was written is read, and damage is refused."""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Iterable, Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_depot.codec.multipart import (
    HEAD_BYTES_MAX,
    MalformedMultipart,
    MultipartReader,
    PartBegin,
    PartData,
    PartEnd,
    closing,
    new_boundary,
    part_head,
)

Part = tuple[Mapping[str, str], bytes]
Outcome = tuple[list[object], str]

BOUNDARY_CHARACTERS = string.digits + string.ascii_letters + "'()+_,-./:=? "
BOUNDARIES = st.one_of(
    st.sampled_from(
        ["b", "-", "--", "----WebKitFormBoundary7MA4YWxk", "a b", "0f3cf5c0-70e0-41ef", "=_?:/(x)", "aaaa"]
    ),
    st.text(BOUNDARY_CHARACTERS, min_size=1, max_size=80).filter(lambda text: not text.endswith(" ")),
)
NAMES = st.text(string.ascii_lowercase + string.digits + "-_", min_size=1, max_size=12)
VALUES = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=20).map(
    lambda text: text.strip(" ")
)
HEADERS = st.dictionaries(NAMES, VALUES, max_size=4)


def fragments(boundary: str) -> st.SearchStrategy[bytes]:
    """What is hard about data: line ends and pieces of delimiters, beside anything else."""
    dashed = b"--" + boundary.encode()
    hard = [
        b"\r", b"\n", b"\r\n", b"-", b"--", b" ", b"\t", b"\0", b"x", b"\xff", dashed, b"\r\n" + dashed, b"\n" + dashed,
        b"\r" + dashed, b"\r\r\n" + dashed, b"\r\n" + dashed + b"-", b"\r\n" + dashed + b"x", b"\r\n" + dashed + b" x",
        b"\r\n" + dashed[:-1], b"\r\n" + dashed + b"\r", b"\r\n" + dashed + b" " * 257 + b"\r\n",
    ]  # fmt: skip
    return st.one_of(st.sampled_from(hard), st.binary(max_size=8))


def data_of(boundary: str) -> st.SearchStrategy[bytes]:
    """Data as RFC 2046 allows it: without a delimiter, also together with the line ends around it."""
    delimiter = re.compile(rb"\r\n--" + re.escape(boundary.encode()) + rb"(?:--|[ \t]{0,256}\r?\n)")

    def without_delimiters(pieces: list[bytes]) -> bytes:
        data = b"".join(pieces)
        while found := delimiter.search(b"\r\n" + data + b"\r\n"):
            data = (b"\r\n" + data + b"\r\n")[found.end() :][:-2]
        return data

    return st.lists(fragments(boundary), max_size=12).map(without_delimiters)


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, list[Part]]:
    boundary = draw(BOUNDARIES)
    return boundary, draw(st.lists(st.tuples(HEADERS, data_of(boundary)), max_size=4))


def written(boundary: str, parts: Iterable[Part]) -> bytes:
    body = b"".join(
        part_head(boundary, headers, is_first=number == 0) + data for number, (headers, data) in enumerate(parts)
    )
    return body + closing(boundary)


def outcome_of(boundary: str, blocks: Iterable[bytes]) -> Outcome:
    """Headers, data (joined) and ends as they were read, and the message of the refusal."""
    events: list[object] = []
    reader = MultipartReader(boundary)
    try:
        for block in blocks:
            for event in reader.feed(block):
                match event:
                    case PartBegin(headers):
                        events.append(dict(headers))
                    case PartData(data):
                        assert len(data) > 0
                        if isinstance(events[-1], bytes):
                            events[-1] += bytes(data)
                        else:
                            events.append(bytes(data))
                    case PartEnd():
                        events.append(None)
        reader.close()
    except MalformedMultipart as error:
        return events, fit_for_a_log(error.message)
    return events, ""


def fit_for_a_log(message: str) -> str:
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 400
    return message


def expected(parts: Iterable[Part]) -> Outcome:
    events: list[object] = []
    for headers, data in parts:
        events += [dict(headers), data, None] if data else [dict(headers), None]
    return events, ""


def cut(body: bytes, sizes: list[int]) -> Iterator[bytes]:
    """Blocks of these sizes, over and over."""
    position, number = 0, 0
    while position < len(body):
        size = sizes[number % len(sizes)]
        yield body[position : position + size]
        position, number = position + size, number + 1


@given(messages())
@settings(deadline=None, max_examples=50)
def test_what_was_written_is_read_wherever_the_body_is_split(message: tuple[str, list[Part]]) -> None:
    boundary, parts = message
    body = written(boundary, parts)
    for place in range(len(body) + 1):
        assert outcome_of(boundary, [body[:place], body[place:]]) == expected(parts)


@given(messages(), st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(deadline=None)
def test_what_was_written_is_read_in_blocks_of_any_sizes(message: tuple[str, list[Part]], sizes: list[int]) -> None:
    boundary, parts = message
    body = written(boundary, parts)
    assert outcome_of(boundary, cut(body, [1])) == expected(parts)
    assert outcome_of(boundary, cut(body, sizes)) == expected(parts)


@given(messages(), st.text(string.printable, max_size=50), st.binary(max_size=50), st.sampled_from(["", " ", "\t  "]))
@settings(deadline=None)
def test_preamble_padding_and_epilogue_change_nothing(
    message: tuple[str, list[Part]], preamble: str, epilogue: bytes, padding: str
) -> None:
    boundary, parts = message
    dashed = b"--" + boundary.encode()
    body = written(boundary, parts)
    if parts:
        first, pad = dashed + b"\r\n", padding.encode()
        body = first.replace(b"\r\n", pad + b"\r\n") + body.removeprefix(first)
    text = preamble.encode().replace(b"--", b"")
    assert outcome_of(boundary, cut(text + b"\r\n" + body + epilogue, [7])) == expected(parts)


@given(messages())
@settings(deadline=None, max_examples=50)
def test_a_body_cut_off_anywhere_is_refused(message: tuple[str, list[Part]]) -> None:
    boundary, parts = message
    body = written(boundary, parts).removesuffix(b"\r\n")
    for length in range(len(body)):
        events, refusal = outcome_of(boundary, [body[:length]])
        assert refusal
        assert events.count(None) <= len(parts)


@given(messages(), st.data(), st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_damaged_body_ends_alike_however_it_is_divided(
    message: tuple[str, list[Part]], data: st.DataObject, sizes: list[int]
) -> None:
    boundary, parts = message
    body = bytearray(written(boundary, parts))
    for _ in range(data.draw(st.integers(1, 5))):
        begin = data.draw(st.integers(0, len(body)))
        end = data.draw(st.integers(begin, min(len(body), begin + 6)))
        body[begin:end] = data.draw(fragments(boundary))
    whole = outcome_of(boundary, [bytes(body)])
    assert outcome_of(boundary, cut(bytes(body), [1])) == whole
    assert outcome_of(boundary, cut(bytes(body), sizes)) == whole


@given(BOUNDARIES, st.data())
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(boundary: str, data: st.DataObject) -> None:
    body = b"".join(data.draw(st.lists(st.one_of(fragments(boundary), st.just(b"a: b\r\n\r\n")), max_size=30)))
    assert outcome_of(boundary, cut(body, [3])) == outcome_of(boundary, [body])


HOSTILE = {
    "CRs": b"\r",
    "dashes": b"-",
    "line ends": b"\r\n",
    "beginnings of delimiters": b"\r\n--",
    "almost delimiters": b"\r\n--boundaryx",
    "almost closing delimiters": b"\r\n--boundary-x",
    "delimiters with too much after them": b"\r\n--boundary" + b" " * 256 + b"\r\r",
    "delimiters with too much white space": b"\r\n--boundary" + b" " * 257,
}


def calls_of(body: bytes, block_bytes: int) -> int:
    """How many functions, C functions included, the reader calls for `body`; its buffer must stay small meanwhile."""
    reader = MultipartReader("boundary")
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    for block in cut(body, [block_bytes]):
        previous = sys.getprofile()
        sys.setprofile(counted)
        try:
            for _ in reader.feed(block):
                pass
        finally:
            sys.setprofile(previous)
        assert len(reader._buffer) <= len("\r\n\r\n--boundary\r") + 256, "more than one unfinished line is kept"
    return count


@pytest.mark.parametrize("pattern", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("block_bytes", [1, 7, 4096])
def test_work_grows_with_the_bytes_and_what_is_kept_does_not(pattern: bytes, block_bytes: int) -> None:
    head = part_head("boundary", {}, is_first=True)
    once, twice = (calls_of(head + pattern * (size // len(pattern)), block_bytes) for size in (8 << 10, 16 << 10))
    assert twice <= 2.2 * once


@pytest.mark.parametrize("line", [b"a" * HEAD_BYTES_MAX, b"a: b\r\n" * HEAD_BYTES_MAX, b"\r" * (1 << 20)])
def test_an_endless_head_is_not_kept(line: bytes) -> None:
    reader = MultipartReader("b")
    list(reader.feed(b"--b\r\n"))

    def feed_all() -> None:
        for block in cut(line, [100]):
            list(reader.feed(block))
            assert len(reader._buffer) <= HEAD_BYTES_MAX

    with pytest.raises(MalformedMultipart):
        feed_all()


@pytest.mark.parametrize("pattern", HOSTILE.values(), ids=HOSTILE.keys())
def test_many_megabytes_of_hostile_data_pass(pattern: bytes) -> None:
    data = pattern * ((2 << 20) // len(pattern)) + b"."  # A quadratic reader would need hours.
    for block_bytes in (61, 1 << 20, len(data) * 2):
        assert length_of_data(cut(written("boundary", [({}, data)]), [block_bytes])) == len(data)


def length_of_data(blocks: Iterable[bytes]) -> int:
    """Only how much data there is: joining it would cost more than reading it."""
    reader = MultipartReader("boundary")
    length = 0
    for block in blocks:
        length += sum(len(event.block) for event in reader.feed(block) if isinstance(event, PartData))
    reader.close()
    return length


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=30)), max_size=3))
def test_a_new_boundary_fits_any_parts(parts: list[Part]) -> None:
    boundary = new_boundary()
    assert outcome_of(boundary, [written(boundary, parts)]) == expected(parts)
    assert re.fullmatch(r"[0-9a-z]{1,70}", boundary)
    assert boundary != new_boundary()
