"""The habits of clients that send multipart bodies, one by one, and what each refusal says."""

from __future__ import annotations

import email.policy
from email.parser import BytesParser

import pytest
from dicomweb_client.web import DICOMwebClient

from dicom_depot.codec.media_types import parse_media_type
from dicom_depot.codec.multipart import (
    BOUNDARY_CHARACTERS_MAX,
    HEAD_BYTES_MAX,
    HEADERS_MAX,
    PREAMBLE_BYTES_MAX,
    Event,
    MalformedMultipart,
    MultipartReader,
    PartBegin,
    PartData,
    PartEnd,
    boundary_of,
    closing,
    part_head,
)
from dicom_depot.domain.errors import InvalidRequest

TYPE = {"content-type": "application/dicom"}


def parts_of(body: bytes, boundary: str = "b") -> list[tuple[dict[str, str], bytes]]:
    """Every part, read whole and byte by byte alike."""
    whole = read([body], boundary)
    assert read([body[place : place + 1] for place in range(len(body))], boundary) == whole
    return whole


def read(blocks: list[bytes], boundary: str) -> list[tuple[dict[str, str], bytes]]:
    parts: list[tuple[dict[str, str], bytes]] = []
    is_open = False
    reader = MultipartReader(boundary)
    for block in blocks:
        for event in reader.feed(block):
            match event:
                case PartBegin(headers):
                    assert not is_open
                    is_open = True
                    parts.append((dict(headers), b""))
                case PartData(data):
                    assert is_open
                    parts[-1] = (parts[-1][0], parts[-1][1] + bytes(data))
                case PartEnd():
                    assert is_open
                    is_open = False
    reader.close()
    assert not is_open
    return parts


def refusal_of(body: bytes, boundary: str = "b") -> MalformedMultipart:
    with pytest.raises(MalformedMultipart) as whole:
        read([body], boundary)
    with pytest.raises(MalformedMultipart) as bytewise:
        read([body[place : place + 1] for place in range(len(body))], boundary)
    assert bytewise.value.message == whole.value.message
    assert bytewise.value.target == whole.value.target
    return whole.value


def test_two_parts_are_read_with_their_headers() -> None:
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\nDICM\r\n--b\r\nX-A:\t1 \r\nx-b:2\r\n\r\n\0\1\r\n--b--\r\n"
    assert parts_of(body) == [(TYPE, b"DICM"), ({"x-a": "1", "x-b": "2"}, b"\0\1")]


@pytest.mark.parametrize(
    "preamble",
    [
        b"",
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b"This is a multi-part message in MIME format.\r\n",
        b"a--b\r\n--bx\r\n --b\r\n--\r\n-\r\n",
        b"x" * (PREAMBLE_BYTES_MAX - 2) + b"\r\n",  # As long as it may be.
    ],
)
def test_what_stands_before_the_first_boundary_is_ignored(preamble: bytes) -> None:
    assert parts_of(preamble + b"--b\r\n\r\ndata\r\n--b--") == [({}, b"data")]


@pytest.mark.parametrize(
    "epilogue",
    [b"", b"\r\n", b"\n", b"  \r\n", b"\r\nepilogue", b"no line end", b"\r\n--b\r\n\r\nno part\r\n--b--", b"--"],
)
def test_what_stands_after_the_closing_boundary_is_ignored(epilogue: bytes) -> None:
    assert parts_of(b"--b\r\n\r\ndata\r\n--b--" + epilogue) == [({}, b"data")]


@pytest.mark.parametrize("padding", [b" ", b"\t", b" \t " * 80])
def test_white_space_after_a_boundary_is_no_data(padding: bytes) -> None:
    body = b"--b%s\r\n\r\none\r\n--b%s\r\n\r\ntwo\r\n--b--%s\r\n" % (padding, padding, padding)
    assert parts_of(body) == [({}, b"one"), ({}, b"two")]


@pytest.mark.parametrize(
    "boundary",
    ["b", "-", "--", "a b", "'()+_,-./:=?", "x" * BOUNDARY_CHARACTERS_MAX, "#*@!", "name:", "----=_Part_1.2"],
)
def test_a_boundary_may_hold_any_legal_character(boundary: str) -> None:
    dashed = b"--" + boundary.encode()
    body = dashed + b"\r\n\r\none\r\n" + dashed[:-1] + b"\r\n" + dashed + b"\r\n\r\ntwo\r\n" + dashed + b"--"
    assert parts_of(body, boundary) == [({}, b"one\r\n" + dashed[:-1]), ({}, b"two")]
    for text in (f'multipart/related; boundary="{boundary}"', f"multipart/related; boundary={boundary} ; a=b"):
        assert boundary_of(parse_media_type(text).parameters) == boundary


@pytest.mark.parametrize(
    "boundary", ["", " ", "a ", "x" * (BOUNDARY_CHARACTERS_MAX + 1), "a\r\nb", "b\n", "ä", "a\tb", "a\0"]
)
def test_a_boundary_that_cannot_be_one_is_refused(boundary: str) -> None:
    with pytest.raises(MalformedMultipart, match="1 to 200 printable ASCII characters") as refusal:
        boundary_of({"boundary": boundary})
    assert refusal.value.target == "Content-Type"
    with pytest.raises(MalformedMultipart):
        MultipartReader(boundary)


def test_a_content_type_without_a_boundary_is_refused() -> None:
    with pytest.raises(MalformedMultipart, match="has no boundary; give the one that the body uses"):
        boundary_of({"type": "application/dicom"})


def test_a_part_without_headers_is_read() -> None:
    assert parts_of(b"--b\r\n\r\n\r\n\r\ndata\r\n\r\n--b--") == [({}, b"\r\n\r\ndata\r\n")]


@pytest.mark.parametrize("head", [b"\r\n", b"Content-Type: application/dicom\r\n\r\n"])
def test_an_empty_part_may_end_in_its_blank_line_or_one_more(head: bytes) -> None:
    headers = TYPE if head != b"\r\n" else {}
    short = b"--b\r\n" + head + b"--b\r\n" + head + b"--b\r\n\r\ndata\r\n--b--"
    assert parts_of(short) == [(headers, b""), (headers, b""), ({}, b"data")]
    full = b"--b\r\n" + head + b"\r\n--b\r\n" + head + b"\r\n--b--"
    assert parts_of(full) == [(headers, b""), (headers, b"")]


@pytest.mark.parametrize(
    "body", [b"--b--", b"--b--\r\n", b"\r\n--b--\r\n", closing("b"), b"preamble\r\n--b-- \r\nepilogue"]
)
def test_only_the_closing_boundary_means_no_parts(body: bytes) -> None:
    assert parts_of(body) == []


def test_headers_of_form_data_are_read() -> None:
    head = b'content-disposition: form-data; name="f"; filename="a:b.dcm"\r\nCONTENT-LENGTH: 4\r\nContent-Type:\r\n'
    assert parts_of(b"--b\r\n" + head + b"\r\ndata\r\n--b--") == [
        (
            {
                "content-disposition": 'form-data; name="f"; filename="a:b.dcm"',
                "content-length": "4",
                "content-type": "",
            },
            b"data",
        )
    ]


def test_the_length_in_a_part_head_is_not_believed() -> None:
    assert parts_of(b"--b\r\nContent-Length: 1\r\n\r\ndata\r\n--b--") == [({"content-length": "1"}, b"data")]


def test_lines_of_a_head_may_end_in_lf_alone() -> None:
    body = b"--b\nContent-Type: application/dicom\nx: y\r\n\ndata\n\r\n--b\n\nmore\r\n--b--\n"
    assert parts_of(body) == [({**TYPE, "x": "y"}, b"data\n"), ({}, b"more")]


def test_a_folded_header_is_one_header() -> None:
    body = b"--b\r\nContent-Type: application/dicom;\r\n transfer-syntax=1.2\r\n\t; a=b\r\nx:\r\n y\r\n\r\nd\r\n--b--"
    assert parts_of(body) == [({"content-type": "application/dicom; transfer-syntax=1.2 ; a=b", "x": "y"}, b"d")]


def test_a_header_that_comes_twice_has_both_values() -> None:
    assert parts_of(b"--b\r\nA: 1\r\na: 2\r\n\r\n\r\n--b--") == [({"a": "1, 2"}, b"")]


def test_white_space_before_the_colon_and_latin_1_in_values_pass() -> None:
    assert parts_of(b"--b\r\nA \t: \xe4\xff\r\n\r\nd\r\n--b--") == [({"a": "ä\xff"}, b"d")]


@pytest.mark.parametrize(
    "data",
    [
        b"--bx",
        b"--b\rx",
        b"--b-",
        b"--b x\r\n",
        b"x--b--",
        b"\n--b\n",
        b"\r--b--\r",
        b"\r\n--",
        b"\r\n--bb\r\n",
        b"\r\n--b-\r\n",
        b"\r\n--b\r\r\n",
        b"\r\n--b\t\rx",
        b"\r\n--B--",
        b"\r\n --b",
        b"\r\n-b",
        b"\r\n--b" + b" " * 257 + b"\r\n",
        b"\r\r\r\n\n\r\n\r\n",
        b"\r\n",
        b"\r",
        b"\n",
        b"\r\n-\r\n--\r\n--bc\r\n--b-c\r\n--b\rc",
        bytes(range(256)) * 3,
    ],
)
def test_data_that_looks_like_a_boundary_is_data(data: bytes) -> None:
    assert parts_of(b"--b\r\n\r\n" + data + b"\r\n--b\r\n\r\n" + data + b"\r\n--b--") == [({}, data), ({}, data)]


def test_data_is_a_view_of_the_block_and_outlives_the_next_one() -> None:
    reader = MultipartReader("b")
    assert list(reader.feed(b"--b\r\n\r\n")) == [PartBegin({})]
    assert list(reader.feed(b"first")) == [PartData(memoryview(b"first"))]  # Behind the blank line, which was kept.
    block = b"x" * 1000
    (data,) = reader.feed(block)
    assert isinstance(data, PartData)
    assert data.block.obj is block
    list(reader.feed(b"y" * 1000))
    assert bytes(data.block) == block


def test_events_left_from_one_block_come_with_the_next() -> None:
    reader = MultipartReader("b")
    events: list[Event] = [next(reader.feed(b"--b\r\nA: 1\r\n\r\ndata\r\n--b"))]
    reader.feed(b"--")
    events += reader.feed(b"\r\n")
    reader.close()
    assert events == [PartBegin({"a": "1"}), PartData(memoryview(b"data")), PartEnd()]


def test_parts_before_the_damage_are_given_before_the_refusal() -> None:
    reader = MultipartReader("b")
    events: list[Event] = []
    with pytest.raises(MalformedMultipart) as refusal:
        events.extend(reader.feed(b"--b\r\n\r\ndata\r\n--b\r\nno header\r\n\r\n"))
    assert events == [PartBegin({}), PartData(memoryview(b"data")), PartEnd()]
    assert refusal.value.target == "parts[1]"
    with pytest.raises(MalformedMultipart):
        list(reader.feed(b"more"))
    with pytest.raises(MalformedMultipart):
        reader.close()


@pytest.mark.parametrize(
    ("body", "says", "target"),
    [
        (b"", "ends before the line '--b'. Give in Content-Type the boundary that the body uses", None),
        (b"--c\r\n\r\ndata\r\n--c--", "ends before the line '--b'", None),
        (b"--b", "ends before the line '--b'", None),
        (b"DICM" * PREAMBLE_BYTES_MAX, "did not come in the body's first 64 KiB", None),
        (b"x" * (PREAMBLE_BYTES_MAX - 1) + b"\r\n--b--", "did not come in the body's first 64 KiB", None),
        (b"--b\r\n", "Part 1 of the body: the body ends within its headers", "parts[0]"),
        (b"--b\r\nA: b\r\n", "a blank line is missing", "parts[0]"),
        (b"--b\r\n\r\n", "ends without the closing line '--b--'", "parts[0]"),
        (b"--b\r\n\r\na\r\n--b\r\n\r\nb\r\n--b-", "Part 2 of the body: the body ends without the closing", "parts[1]"),
        (b"--b\n\ndata\n--b--\n", "the line does not follow a CR LF; send the body again, whole", "parts[0]"),
        (b"--b\r\nDICM\0\xff\r\n\r\n", r"'DICM\x00\xff' is not a header of the form `Name: value`", "parts[0]"),
        (b"--b\r\n: x\r\n\r\n", "': x' is not a header", "parts[0]"),
        (b"--b\r\nA b: x\r\n\r\n", "'A b: x' is not a header", "parts[0]"),
        (b"--b\r\n folded: x\r\n\r\n", "' folded: x' is not a header", "parts[0]"),
        (b"--b\r\nA: x\r\n\r\n\r\n--b\r\n y\r\n\r\n", "Part 2 of the body: ' y' is not a header", "parts[1]"),
        (b"--b\r\nA: x\ry\r\n\r\n", "is not a header", "parts[0]"),
        (b"--b\r\nA: x\r\n \x00\r\n\r\n", "is not a header", "parts[0]"),
        (b"--b\r\nA: x\r\n--b--", "the body ends within its headers", "parts[0]"),
        (b"--b\r\nA: x\r\n--b--\r\n", "a blank line must stand between the part's headers and its data", "parts[0]"),
        (b"--b\r\n" + b"A: x\r\n" * (HEADERS_MAX + 1) + b"\r\n", "it has more than 32 headers; send fewer", "parts[0]"),
        (b"--b\r\nA: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n", "its headers are longer than 16 KiB", "parts[0]"),
        (b"--b\r\nA: x\r\n" + b" x\r\n" * HEAD_BYTES_MAX, "its headers are longer than 16 KiB", "parts[0]"),
    ],
)
def test_a_refusal_says_what_is_wrong(body: bytes, says: str, target: str | None) -> None:
    refusal = refusal_of(body)
    assert says in refusal.message
    assert refusal.target == target
    assert refusal.code == "MalformedMultipart"
    assert isinstance(refusal, InvalidRequest)
    assert refusal.message.isprintable()


def test_a_refusal_is_not_flooded_by_what_was_sent() -> None:
    refusal = refusal_of(b"--b\r\n" + b"\x1b\xff" * 4000 + b"\r\n\r\n")
    assert len(refusal.message) < 250


def test_a_boundary_in_a_head_is_not_taken_for_a_header() -> None:
    assert "is not a header" in refusal_of(b"--a:b\r\nX: y\r\n--a:b\r\n\r\ndata\r\n--a:b--", "a:b").message


@pytest.mark.parametrize("count", [HEADERS_MAX, 1])
def test_a_head_at_its_bounds_is_read(count: int) -> None:
    lines = [b"h%d: \r\n" % number for number in range(count - 1)]
    rest = HEAD_BYTES_MAX - sum(map(len, lines)) - len(b"last: \r\n\r\n")
    head = b"".join([*lines, b"last: " + b"x" * rest + b"\r\n\r\n"])
    assert len(head) == HEAD_BYTES_MAX
    ((headers, data),) = parts_of(b"--b\r\n" + head + b"data\r\n--b--")
    assert (len(headers), len(headers["last"]), data) == (count, rest, b"data")
    assert "longer than 16 KiB" in refusal_of(b"--b\r\n" + head.replace(b"x", b"xx", 1) + b"data\r\n--b--").message


def test_every_part_may_have_a_head_at_its_bounds() -> None:
    lines = [b"h%d: %s\r\n" % (number, b"x" * 500) for number in range(HEADERS_MAX)]
    part = b"--b\r\n" + b"".join(lines) + b"\r\ndata\r\n"
    assert [len(headers) for headers, _ in parts_of(part * 3 + b"--b--")] == [HEADERS_MAX] * 3


def test_what_dicomweb_client_sends_is_read() -> None:
    content = [b"\r\n--", b"DICM\r\n", b""]
    content_type = 'multipart/related; type="application/dicom"; boundary="0f3cf5c0-70e0-41ef-baef-c6f9f65ec3e1"'
    body = DICOMwebClient._encode_multipart_message(content, content_type)
    boundary = boundary_of(parse_media_type(content_type).parameters)
    assert parts_of(body, boundary) == [(TYPE, data) for data in content]


def test_what_is_written_is_read_by_another_reader() -> None:
    body = b"".join(
        [
            b'Content-Type: multipart/related; boundary="a b"\r\n\r\n',
            part_head("a b", {"Content-Type": "application/dicom", "Content-Location": "/x"}, is_first=True),
            b"one\r\n",
            part_head("a b", {}, is_first=False),
            b"two",
            closing("a b"),
        ]
    )
    message = BytesParser(policy=email.policy.HTTP).parsebytes(body)
    first, second = message.iter_parts()
    assert not message.defects
    assert (first["content-type"], first["content-location"]) == ("application/dicom", "/x")
    assert first.get_payload(decode=True) == b"one\r\n"
    assert second.get_payload(decode=True) == b"two"


def test_the_lines_of_an_answer_are_these() -> None:
    assert part_head("b", {"A": "1"}, is_first=True) == b"--b\r\nA: 1\r\n\r\n"
    assert part_head("b", {}, is_first=False) == b"\r\n--b\r\n\r\n"
    assert closing("b") == b"\r\n--b--\r\n"


@pytest.mark.parametrize("header", [("A", "1\r\nB: 2"), ("A\r\nB", "1"), ("A", "€"), ("", "1"), ("A:B C", "\0")])
def test_an_answer_cannot_be_given_lines_by_a_value(header: tuple[str, str]) -> None:
    with pytest.raises(ValueError):
        part_head("b", dict([header]), is_first=True)
