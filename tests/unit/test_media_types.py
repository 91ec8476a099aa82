"""Media types, Accept headers, and what they choose of each DICOMweb resource."""

from __future__ import annotations

import pytest

from dicom_depot.codec.media_types import (
    EXPLICIT_LITTLE_ENDIAN,
    MediaRange,
    MediaType,
    RetrieveChoice,
    accepts_dicom_json,
    choose_frames,
    choose_instance,
    choose_instances,
    frame_media_type,
    parse_accept,
    parse_media_type,
)
from dicom_depot.domain.errors import DepotError, InvalidRequest, NotAcceptable

EXPLICIT, JPEG_2000, JPEG_LS, RLE = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.5",
)
JPEG_2000_LOSSY = "1.2.840.10008.1.2.4.91"
OFFERED = frozenset({EXPLICIT, JPEG_2000, JPEG_2000_LOSSY, JPEG_LS, RLE})

DICOM = 'multipart/related; type="application/dicom"'
OCTETS = 'multipart/related; type="application/octet-stream"'

AS_STORED = RetrieveChoice(None)
DEFAULT = RetrieveChoice(EXPLICIT)
SINGLE = RetrieveChoice(EXPLICIT, is_multipart=False)
SINGLE_AS_STORED = RetrieveChoice(None, is_multipart=False)


@pytest.mark.parametrize(
    ("text", "name", "parameters"),
    [
        ("application/dicom", "application/dicom", {}),
        (" Application/DICOM+json ", "application/dicom+json", {}),
        ("*/*", "*/*", {}),
        ("text/plain;charset=UTF-8", "text/plain", {"charset": "UTF-8"}),
        ("a/b; C=D; e=F", "a/b", {"c": "D", "e": "F"}),
        ("a/b;", "a/b", {}),
        ("a/b ; ;; c=d ; ", "a/b", {"c": "d"}),
        ("a/b; c = d", "a/b", {"c": "d"}),
        ("a/b; c=d; C=d", "a/b", {"c": "d"}),
        ("multipart/related; type=application/dicom", "multipart/related", {"type": "application/dicom"}),
        (
            "multipart/related; boundary='()+_,-./:=? x ; a=b",
            "multipart/related",
            {"boundary": "'()+_,-./:=? x", "a": "b"},
        ),
        ('m/r; boundary="a b;c,d=\'e"; type="x/y"', "m/r", {"boundary": "a b;c,d='e", "type": "x/y"}),
        (r'a/b; c="d\"e\\f\g"', "a/b", {"c": r'd"e\fg'}),
        ('a/b; c=""', "a/b", {"c": ""}),
        ('a/b; c="\t ä" ;d=e', "a/b", {"c": "\t ä", "d": "e"}),
    ],
)
def test_a_media_type_is_read(text: str, name: str, parameters: dict[str, str]) -> None:
    assert parse_media_type(text) == MediaType(name, parameters)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is not a media type"),
        ("*", "is not a media type"),
        ("application", "is not a media type; the form is type/subtype"),
        ("application/", "is not a media type"),
        ("/dicom", "is not a media type"),
        ("app lication/dicom", "is not a media type"),
        ("; a=b", "is not a media type"),
        ("a/b c", "from character 5 on, 'c'"),
        ("a/b/c", "from character 4 on, '/c'"),
        ("a/b, c/d", "from character 4 on, ', c/d'"),
        ("a/b; c", "from character 6 on, 'c'"),
        ("a/b; c=", "from character 6 on, 'c='"),
        ("a/b; c=;d=e", "from character 6 on"),
        ("a/b; =c", "from character 6 on"),
        ('a/b; c="d', "from character 6 on"),
        ('a/b; c="d\\"', "from character 6 on"),
        ('a/b; c="d"e', "from character 11 on, 'e'"),
        ('a/b; c=d"e"', "from character 9 on"),
        ("a/b; c=d\r\nX: y", r"'\r\nX: y'"),
        ("a/b; c=d\0", r"'\x00'"),
        ("a/b; c=d; C=D", "has two values of c; give one"),
    ],
)
def test_a_malformed_media_type_is_refused_with_the_place(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_media_type(text)
    assert says in refusal.value.message
    assert refusal.value.message.isprintable()


def test_a_refusal_is_not_flooded_by_what_was_sent() -> None:
    for text in ("\x1b" * 60_000, "a/b;" + "\x1b" * 60_000, 'a/b; c="' + '\\"' * 60_000):
        with pytest.raises(InvalidRequest) as refusal:
            parse_media_type(text)
        assert len(refusal.value.message) < 400


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        (["", " , ,"], []),
        (["a/b"], ["a/b"]),
        (["a/b, c/d", "e/f"], ["a/b", "c/d", "e/f"]),
        (["a/b;q=0.1, c/d;q=1.0, e/f;q=.5, g/h"], ["c/d", "g/h", "e/f", "a/b"]),
        (["a/b; Q=0.2", "c/d; x=y; q=0.3; ext=1"], ["c/d", "a/b"]),
        (["a/b;q=0, c/d;q=0.000, e/f;q=0.001"], ["e/f"]),
        (["a/b;q=0"], []),
        (["a/b;q=2, c/d, nonsense, e/f;q=x, g/h;q=-1, i/j;q=nan, k/l;q=1e0, m/n;q="], ["c/d"]),
        (['a/b; x="c/d, e/f;q=0", g/h'], ["a/b", "g/h"]),
        (['a/b; x="\\", c/d", e/f'], ["a/b", "e/f"]),
        (['a/b, c/d; x="e, f/g'], ["a/b"]),
        (["a/b;q=0, nonsense"], []),
    ],
)
def test_the_members_of_accept_are_read_best_first(values: list[str], expected: list[str]) -> None:
    assert [wanted.name for wanted in parse_accept(values)] == expected


def test_the_quality_is_no_parameter_of_a_media_range() -> None:
    assert parse_accept(['A/B; Type="C, D"; q=0.25; e=f']) == [MediaRange("a/b", {"type": "C, D", "e": "f"}, 0.25)]


@pytest.mark.parametrize(
    "values", [["nonsense"], ["a/b;q=2"], ["a/b;q=1.1", '"'], ['a/b; c="d'], ["a/b; q=0.5; q=0.6"]]
)
def test_an_accept_without_any_good_member_is_refused(values: list[str]) -> None:
    for read in (parse_accept, accepts_dicom_json, lambda accept: choose_instances(accept, OFFERED)):
        with pytest.raises(InvalidRequest) as refusal:
            read(values)
        assert refusal.value.target == "Accept"


def test_a_long_hostile_accept_is_read_in_one_go() -> None:
    for value in (
        '"' * 100_000,
        '"\\' * 100_000,
        'a/b; c="' * 50_000,
        "a/b;" + " " * 200_000 + '"',
        "a/b" + ";x" * 100_000,
    ):
        with pytest.raises(InvalidRequest):
            parse_accept([value])
    assert len(parse_accept(["a/b," * 50_000])) == 50_000


@pytest.mark.parametrize(
    "accept",
    [
        [],
        [""],
        ["*/*"],
        ["application/*"],
        ["application/json"],
        ["application/dicom+json"],
        ["Application/DICOM+JSON; charset=utf-8"],
        ["text/html, */*;q=0.1"],
        ["text/html", "application/json;q=0.001"],
        ["nonsense, application/json"],
    ],
)
def test_dicom_json_is_accepted(accept: list[str]) -> None:
    accepts_dicom_json(accept)


@pytest.mark.parametrize(
    "accept",
    [
        ["application/dicom"],
        ["application/data"],
        ["application/dicom+xml"],
        ["text/html, image/*"],
        ["application/json;q=0"],
        ["*/*;q=0.0"],
        [DICOM],
        ['text/html; x="application/json"'],
    ],
)
def test_what_holds_no_dicom_json_is_not_acceptable(accept: list[str]) -> None:
    with pytest.raises(NotAcceptable, match=r"Offered: application/dicom\+json") as refusal:
        accepts_dicom_json(accept)
    assert (refusal.value.code, refusal.value.target) == ("NotAcceptable", "Accept")
    assert isinstance(refusal.value, DepotError)
    assert not isinstance(refusal.value, InvalidRequest)


MULTIPART_DICOM: list[tuple[list[str], RetrieveChoice | None]] = [
    (["*/*"], AS_STORED),
    ([DICOM], DEFAULT),
    (["multipart/related; type=application/dicom"], DEFAULT),
    (["Multipart/Related; Type=Application/DICOM"], DEFAULT),
    (["multipart/related"], DEFAULT),
    (["multipart/*"], DEFAULT),
    (["multipart/*; transfer-syntax=*"], AS_STORED),
    ([DICOM + "; transfer-syntax=*"], AS_STORED),
    ([DICOM + '; transfer-syntax="*"'], AS_STORED),
    ([DICOM + f"; transfer-syntax={EXPLICIT}"], DEFAULT),
    ([DICOM + f'; Transfer-Syntax="{JPEG_2000}"'], RetrieveChoice(JPEG_2000)),
    ([DICOM + "; transfer-syntax=1.2.840.10008.1.2.4.50"], None),
    ([DICOM + "; transfer-syntax=1.2.840.10008.1.2"], None),
    ([DICOM + "; transfer-syntax=nonsense"], None),
    (['multipart/related; type="*/*"'], AS_STORED),
    (['multipart/related; type="application/*"'], AS_STORED),
    ([f'multipart/related; type="*/*"; transfer-syntax={JPEG_LS}'], RetrieveChoice(JPEG_LS)),
    ([f"*/*; transfer-syntax={JPEG_LS}"], RetrieveChoice(JPEG_LS)),
    ([f"multipart/related; transfer-syntax={JPEG_LS}"], RetrieveChoice(JPEG_LS)),
    ([OCTETS], None),
    (['multipart/related; type="image/jp2"'], None),
    (["multipart/form-data"], None),
    (["application/octet-stream"], None),
    (["application/dicom+json"], None),
    (["image/jp2", "text/html"], None),
    ([DICOM + ";q=0"], None),
    # The highest q wins, in one header or several; among equal ones, what needs no change; else the first.
    ([DICOM + ";q=0.5", DICOM + f"; transfer-syntax={JPEG_2000}; q=0.6"], RetrieveChoice(JPEG_2000)),
    ([DICOM + ", " + DICOM + "; transfer-syntax=*"], AS_STORED),
    ([DICOM + "; transfer-syntax=*;q=0.5, " + DICOM + ";q=0.5"], AS_STORED),
    ([DICOM + "; transfer-syntax=*;q=0.5, " + DICOM + ";q=0.6"], DEFAULT),
    ([DICOM + f"; transfer-syntax={JPEG_LS}", DICOM + f"; transfer-syntax={JPEG_2000}"], RetrieveChoice(JPEG_LS)),
    ([DICOM, "*/*"], DEFAULT),
    (["text/html; transfer-syntax=*", DICOM], DEFAULT),
    ([DICOM + "; transfer-syntax=1.2.3", DICOM + ";q=0.1"], DEFAULT),
    (["text/html, application/xhtml+xml, */*;q=0.8"], AS_STORED),
    (["nonsense", DICOM], DEFAULT),
]

INSTANCES: list[tuple[list[str], RetrieveChoice | None]] = [
    ([], DEFAULT),
    ([" "], DEFAULT),
    (["application/dicom"], None),
    (["application/*"], None),
]

INSTANCE: list[tuple[list[str], RetrieveChoice | None]] = [
    ([], SINGLE),
    ([",", ""], SINGLE),
    (["application/dicom"], SINGLE),
    (["application/DICOM; transfer-syntax=*"], SINGLE_AS_STORED),
    ([f"application/dicom; transfer-syntax={JPEG_2000}"], RetrieveChoice(JPEG_2000, is_multipart=False)),
    (["application/dicom; transfer-syntax=1.2.840.10008.1.2.4.50"], None),
    (["application/*"], SINGLE),
    (["application/*; transfer-syntax=*"], SINGLE_AS_STORED),
    ([DICOM + ";q=0.9, application/dicom"], SINGLE),
    (["application/dicom;q=0.9", DICOM], DEFAULT),
    (["application/dicom", DICOM + "; transfer-syntax=*"], AS_STORED),
    (["application/dicom; type=x"], SINGLE),
]

FRAMES: list[tuple[list[str], RetrieveChoice | None]] = [
    ([], DEFAULT),
    (["*/*"], AS_STORED),
    (["application/octet-stream"], SINGLE),
    ([f"application/octet-stream; transfer-syntax={EXPLICIT}"], SINGLE),
    (["application/octet-stream; transfer-syntax=*"], SINGLE_AS_STORED),
    ([f"application/octet-stream; transfer-syntax={JPEG_2000}"], None),
    ([OCTETS], DEFAULT),
    (["multipart/related; type=application/octet-stream"], DEFAULT),
    ([OCTETS + "; transfer-syntax=*"], AS_STORED),
    ([OCTETS + f"; transfer-syntax={EXPLICIT}"], DEFAULT),
    ([OCTETS + f"; transfer-syntax={RLE}"], None),
    (["multipart/related"], DEFAULT),
    (["multipart/*"], DEFAULT),
    (['multipart/related; type="*/*"'], AS_STORED),
    ([f'multipart/related; type="*/*"; transfer-syntax={RLE}'], RetrieveChoice(RLE)),
    ([f"*/*; transfer-syntax={JPEG_LS}"], RetrieveChoice(JPEG_LS)),
    (['multipart/related; type="image/jp2"'], RetrieveChoice(JPEG_2000)),
    (['multipart/related; type="IMAGE/JP2"'], RetrieveChoice(JPEG_2000)),
    ([f'multipart/related; type="image/jp2"; transfer-syntax={JPEG_2000}'], RetrieveChoice(JPEG_2000)),
    ([f'multipart/related; type="image/jp2"; transfer-syntax={JPEG_2000_LOSSY}'], RetrieveChoice(JPEG_2000_LOSSY)),
    ([f'multipart/related; type="image/jp2"; transfer-syntax={EXPLICIT}'], None),
    (['multipart/related; type="image/jp2"; transfer-syntax=*'], AS_STORED),
    (['multipart/related; type="image/jls"'], RetrieveChoice(JPEG_LS)),
    (['multipart/related; type="image/jls"; transfer-syntax=*'], AS_STORED),
    (['multipart/related; type="image/dicom-rle"'], RetrieveChoice(RLE)),
    (['multipart/related; type="image/jpeg"'], None),
    (['multipart/related; type="image/*"'], None),
    ([DICOM], None),
    (["application/dicom"], None),
    (["application/*"], None),
    (["image/jp2"], None),
    (["application/octet-stream;q=0.5", 'multipart/related; type="image/jls";q=0.7'], RetrieveChoice(JPEG_LS)),
    (["application/octet-stream", OCTETS + "; transfer-syntax=*"], AS_STORED),
    ([f'multipart/related; type="image/jp2"; transfer-syntax={JPEG_LS}', "application/octet-stream;q=0.1"], SINGLE),
]


@pytest.mark.parametrize(("accept", "choice"), [*MULTIPART_DICOM, *INSTANCES])
def test_accept_chooses_how_instances_are_sent(accept: list[str], choice: RetrieveChoice | None) -> None:
    if choice is not None:
        assert choose_instances(accept, OFFERED) == choice
        return
    with pytest.raises(NotAcceptable) as refusal:
        choose_instances(accept, OFFERED)
    assert 'Offered: multipart/related; type="application/dicom", */*; with transfer-syntax' in refusal.value.message
    assert f"* (as stored) or one of: {EXPLICIT}, {JPEG_LS}, {JPEG_2000}, " in refusal.value.message
    assert refusal.value.target == "Accept"


@pytest.mark.parametrize(("accept", "choice"), [*MULTIPART_DICOM, *INSTANCE])
def test_accept_chooses_how_one_instance_is_sent(accept: list[str], choice: RetrieveChoice | None) -> None:
    if choice is not None:
        assert choose_instance(accept, OFFERED) == choice
        return
    with pytest.raises(NotAcceptable, match='Offered: application/dicom, multipart/related; type="application/dicom"'):
        choose_instance(accept, OFFERED)


@pytest.mark.parametrize(("accept", "choice"), FRAMES)
def test_accept_chooses_how_frames_are_sent(accept: list[str], choice: RetrieveChoice | None) -> None:
    if choice is not None:
        assert choose_frames(accept, OFFERED) == choice
        return
    with pytest.raises(NotAcceptable, match=r'octet-stream", multipart/related; type="image/jp2", .*"image/dicom-rle"'):
        choose_frames(accept, OFFERED)


def test_a_transfer_syntax_is_chosen_only_from_those_offered() -> None:
    for accept in (['multipart/related; type="image/jp2"'], [f"*/*; transfer-syntax={JPEG_2000}"]):
        assert choose_frames(accept, {EXPLICIT, JPEG_2000}) == RetrieveChoice(JPEG_2000)
        with pytest.raises(NotAcceptable):
            choose_frames(accept, {EXPLICIT})
    for nothing_asked in ([], [DICOM]):
        with pytest.raises(NotAcceptable):
            choose_instances(nothing_asked, {JPEG_2000})
    assert choose_instances(["*/*"], set()) == AS_STORED
    assert choose_frames(['multipart/related; type="image/jls"; transfer-syntax=*'], set()) == AS_STORED


def test_the_default_is_explicit_little_endian() -> None:
    assert EXPLICIT_LITTLE_ENDIAN == EXPLICIT


@pytest.mark.parametrize(
    ("media_type", "endings"),
    [
        ("image/jpeg", ["4.50", "4.51", "4.57", "4.70"]),
        ("image/jls", ["4.80", "4.81"]),
        ("image/jp2", ["4.90", "4.91"]),
        ("image/jpx", ["4.92", "4.93"]),
        ("image/jphc", ["4.201", "4.202", "4.203"]),
        ("image/dicom-rle", ["5"]),
        ("video/mpeg2", ["4.100", "4.101"]),
        ("video/mp4", ["4.102", "4.103", "4.104", "4.105", "4.106"]),
        ("application/octet-stream", ["1", "1.99", "2", "4.5", "4.110", "50", "4.9", ""]),
    ],
)
def test_the_media_type_of_frames_follows_from_their_transfer_syntax(media_type: str, endings: list[str]) -> None:
    for ending in endings:
        assert frame_media_type(f"1.2.840.10008.1.2.{ending}") == media_type
    assert frame_media_type("1.2.840.10008.1.2") == "application/octet-stream"
