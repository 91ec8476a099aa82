"""Headers of synthetic files, of odd ones, and of random damage."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import warnings
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_depot.codec.part10 import read_header
from dicom_depot.codec.values import decode_integer, decode_text, encodings_of
from dicom_depot.domain.errors import BrokenInstance, NotDicom
from dicom_depot.domain.instance import InstanceHeader
from dicom_depot.domain.search import ATTRIBUTES
from dicom_depot.testing.samples import ct_volume, many_small, multiframe, structured_report

STUDY, SERIES, INSTANCE, SOP_CLASS = "1.2.3", "1.2.3.4", "1.2.3.4.5", "1.2.840.10008.5.1.4.1.1.7"
SMALL = next(many_small(1)).content
LONG_VRS = ("OB", "OW", "SQ", "UN", "UT")

Element = tuple[int, str, bytes]


def header_of(content: bytes) -> InstanceHeader:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom's warnings hold values
        return read_header(io.BytesIO(content), len(content))


def element(tag: int, vr: str, value: bytes, *, order: str = "<", implicit: bool = False) -> bytes:
    value += b"\0" * (len(value) % 2)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<L", len(value)) + value
    if vr in LONG_VRS:
        return head + vr.encode() + b"\0\0" + struct.pack(order + "L", len(value)) + value
    return head + vr.encode() + struct.pack(order + "H", len(value)) + value


def identifying(**replaced: bytes) -> list[Element]:
    values = {
        "sop_class": (0x00080016, SOP_CLASS.encode()),
        "instance": (0x00080018, INSTANCE.encode()),
        "study": (0x0020000D, STUDY.encode()),
        "series": (0x0020000E, SERIES.encode()),
    }
    return [(tag, "UI", replaced.get(name, value)) for name, (tag, value) in values.items()]


def data_set(elements: list[Element], *, order: str = "<", implicit: bool = False) -> bytes:
    return b"".join(element(tag, vr, value, order=order, implicit=implicit) for tag, vr, value in sorted(elements))


def part10(body: bytes, transfer_syntax: str = "1.2.840.10008.1.2.1") -> bytes:
    return bytes(128) + b"DICM" + element(0x00020010, "UI", transfer_syntax.encode()) + body


def with_elements(*extra: Element) -> InstanceHeader:
    return header_of(part10(data_set([*identifying(), *extra])))


def test_synthetic_samples_are_read_as_they_were_made() -> None:
    samples = [*ct_volume(3), multiframe(5), structured_report(), *many_small(120, 3000)]
    for sample in samples:
        assert header_of(sample.content).ref == sample.ref
    assert len({sample.ref for sample in samples}) == len(samples)
    assert [header_of(sample.content).attributes["instance_number"] for sample in ct_volume(3)] == [1, 2, 3]
    assert header_of(multiframe(5).content).attributes["number_of_frames"] == 5
    header = header_of(SMALL)
    assert header.attributes["patient_name"] == "Synthetic^Alpha"
    assert header.transfer_syntax_uid == "1.2.840.10008.1.2.1"
    assert set(header.attributes) == {attribute.column for attribute in ATTRIBUTES}


@pytest.mark.parametrize("content", [b"", b"x", b"PK\3\4" + bytes(300), b"plain text\n" * 40, b"\x89PNG" + bytes(99)])
def test_what_is_not_dicom_is_said_to_be_not_dicom(content: bytes) -> None:
    with pytest.raises(NotDicom):
        header_of(content)


@pytest.mark.parametrize(
    ("order", "implicit", "transfer_syntax"),
    [
        ("<", True, "1.2.840.10008.1.2"),
        ("<", False, "1.2.840.10008.1.2.1"),
        (">", False, "1.2.840.10008.1.2.2"),
    ],
)
def test_a_bare_data_set_is_read_in_the_encoding_that_it_shows(
    order: str, implicit: bool, transfer_syntax: str
) -> None:
    rows = (0x00280010, "US", struct.pack(order + "H", 300))
    header = header_of(data_set([*identifying(), rows], order=order, implicit=implicit))
    assert str(header.ref) == f"{STUDY}/{SERIES}/{INSTANCE}"
    assert header.transfer_syntax_uid == transfer_syntax
    assert header.attributes["rows"] == 300


def test_an_encoding_that_contradicts_the_transfer_syntax_is_followed() -> None:
    content = part10(data_set(identifying(), implicit=True), "1.2.840.10008.1.2.1")
    assert header_of(content).transfer_syntax_uid == "1.2.840.10008.1.2.1"


def test_the_letters_dicm_inside_a_bare_data_set_are_no_prefix() -> None:
    body = data_set([*identifying(), (0x00080070, "LO", b"x" * 300)])
    start = body.index(b"x" * 300)
    content = data_set([*identifying(), (0x00080070, "LO", b"x" * (128 - start) + b"DICM" + b"x" * 168)])
    assert content[128:132] == b"DICM"
    assert str(header_of(content).ref).startswith(STUDY)


@pytest.mark.parametrize("name", ["sop_class", "instance", "study", "series"])
def test_each_identifying_attribute_is_needed_and_named(name: str) -> None:
    keywords = {
        "sop_class": "SOPClassUID",
        "instance": "SOPInstanceUID",
        "study": "StudyInstanceUID",
        "series": "SeriesInstanceUID",
    }
    complete = identifying()
    lacking = [entry for entry, key in zip(complete, keywords, strict=True) if key != name]
    with pytest.raises(BrokenInstance, match=f"^missing attribute: {keywords[name]}$"):
        header_of(part10(data_set(lacking)))
    for bad in (b"", b"1.2.", b"1.2/3", b"1" * 65, b" 1.2", b"1.2\\1.3", "1.2.\u0663".encode()):
        with pytest.raises(BrokenInstance, match=f"^invalid UID: {keywords[name]}: ") as caught:
            header_of(part10(data_set(identifying(**{name: bad}))))
        assert str(caught.value).isascii()
    for good in (b"1.2 ", b"1.2\0\0\0", b"1.2 \0", b"01..2", b"0"):
        header_of(part10(data_set(identifying(**{name: good}))))


def test_a_uid_that_the_end_of_the_file_cuts_off_is_not_taken_for_a_shorter_one() -> None:
    content = part10(data_set(identifying()))
    with pytest.raises(BrokenInstance, match="missing attribute: SeriesInstanceUID"):
        header_of(content[:-2])


def test_elements_out_of_order_are_found() -> None:
    body = b"".join(element(*entry) for entry in reversed(identifying()))
    header_of(part10(element(0x00409096, "LO", b"late") + body))


def test_optional_attributes_that_cannot_be_read_are_none() -> None:
    header = with_elements(
        (0x00200013, "IS", b"one"), (0x00200011, "IS", b"99999999999999999999"), (0x00280010, "US", b"")
    )
    assert header.attributes["instance_number"] is None
    assert header.attributes["series_number"] is None
    assert header.attributes["rows"] is None
    assert header.attributes["patient_id"] is None


def test_text_is_freed_of_padding_and_nuls_and_cut() -> None:
    header = with_elements(
        (0x00100020, "LO", b" A\0B \0"), (0x00081030, "LO", b"x" * 3000), (0x0008103E, "LO", b"a \\ b\\")
    )
    assert header.attributes["patient_id"] == "AB"
    assert header.attributes["study_description"] == "x" * 1024
    assert header.attributes["series_description"] == "a\\b\\"


@pytest.mark.parametrize(
    ("character_set", "value", "text"),
    [
        (b"ISO_IR 192", "M\u00fcller^J\u00f6rg".encode(), "M\u00fcller^J\u00f6rg"),
        (b"ISO_IR 100", "M\u00fcller".encode("latin-1"), "M\u00fcller"),
        (b"iso-ir 100 ", "M\u00fcller".encode("latin-1"), "M\u00fcller"),
        (b"ISO_IR 144", "\u041b\u044e\u043a".encode("iso8859_5"), "\u041b\u044e\u043a"),
        (b"NO SUCH SET", "M\u00fcller".encode(), "M\u00fcller"),
        (b"", "M\u00fcller".encode("latin-1"), "M\u00fcller"),
        (b"GB18030", "\u738b^\u5c0f\u4e1c".encode("gb18030"), "\u738b^\u5c0f\u4e1c"),
        (
            b"\\ISO 2022 IR 87",
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
            "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce",
        ),
        (
            b"\\ISO 2022 IR 149",
            b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7",
            "Hong^Gildong=\u6d2a^\u5409\u6d1e",
        ),
        (b"\\ISO 2022 IR 58", b"\x1b$)A\xd0\xa1", "\u5c0f"),
        (b"\\ISO 2022 IR 87", b"\x1b$Bbroken", "\x1b$Bbroken"),
    ],
)
def test_text_is_decoded_by_its_character_set(character_set: bytes, value: bytes, text: str) -> None:
    header = with_elements((0x00080005, "CS", character_set), (0x00100010, "PN", value))
    decoded = header.attributes["patient_name"]
    if "broken" in text:
        assert decoded  # some text, no error
    else:
        assert decoded == text


def test_nesting_of_any_depth_is_stepped_over() -> None:
    depth = 20_000
    opened = struct.pack("<HH2sHLHHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    closed = struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    first, second, *rest = identifying()
    body = data_set([first, second]) + opened * depth + closed * depth + data_set(rest)
    assert str(header_of(part10(body)).ref) == f"{STUDY}/{SERIES}/{INSTANCE}"


def test_a_deflated_data_set_is_read_and_a_bomb_costs_little_memory() -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = data_set(identifying()) + element(0x7FE00010, "OB", b"")
    deflated = compressor.compress(body) + compressor.compress(bytes(400 << 20)) + compressor.flush()
    tracemalloc.start()
    try:
        header = header_of(part10(deflated, "1.2.840.10008.1.2.1.99"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert header.transfer_syntax_uid == "1.2.840.10008.1.2.1.99"
    assert peak < 64 << 20


class _Sparse(io.RawIOBase):
    """A header followed by zeros up to a size; counts what is read."""

    def __init__(self, head: bytes, size: int) -> None:
        self._head, self._size, self._place, self.bytes_read = head, size, 0, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._place + size)
        assert end - self._place < 1 << 20, "read too much at once"
        content = self._head[self._place : end].ljust(max(0, end - self._place), b"\0")
        self._place, self.bytes_read = max(end, self._place), self.bytes_read + len(content)
        return content


def test_big_values_before_and_after_the_header_are_not_read() -> None:
    size = 4 << 30
    private = struct.pack("<HH2sHL", 0x0009, 0x1001, b"OB", 0, size - 4096)
    first, second, *rest = identifying()
    head = part10(data_set([first, second]) + private)
    stream = _Sparse(head, size)
    with pytest.raises(BrokenInstance):
        read_header(stream, size)  # type: ignore[arg-type]
    assert stream.bytes_read < 100_000

    study = struct.pack("<HH2sHL", 0x0020, 0x000D, b"UT", 0, size - 4096)
    stream = _Sparse(part10(data_set([first, second]) + study), size)
    with pytest.raises(BrokenInstance):
        read_header(stream, size)  # type: ignore[arg-type]
    assert stream.bytes_read < 100_000

    pixels = struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, 0xFFFFFFFF)
    stream = _Sparse(part10(data_set([first, second, *rest]) + pixels), size)
    assert read_header(stream, size).ref.study_uid == STUDY  # type: ignore[arg-type]
    assert stream.bytes_read < 100_000


def test_a_file_full_of_tiny_elements_or_delimiters_takes_bounded_time() -> None:
    for filling in (struct.pack("<HHL", 0xFFFE, 0xE00D, 0), element(0x00090010, "LO", b""), b"\0" * 8):
        started = time.monotonic()
        with pytest.raises(BrokenInstance):
            header_of(part10(filling * (2 << 20)))
        assert time.monotonic() - started < 30


def test_a_stream_that_fails_is_broken_with_the_reason() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(BrokenInstance, match="cannot be read: Input/output error"):
        read_header(Failing(SMALL), len(SMALL))


@settings(max_examples=300, deadline=2000)
@given(
    st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=12)), max_size=8),
    st.integers(0, len(SMALL)),
    st.binary(max_size=20),
)
def test_random_damage_raises_nothing_but_our_two_errors(
    edits: list[tuple[int, bytes]], length: int, tail: bytes
) -> None:
    content = bytearray(SMALL)
    for place, replacement in edits:
        content[place : place + len(replacement)] = replacement
    for variant in (bytes(content), bytes(content[:length]) + tail, bytes(content[132:])):
        message = ""
        try:
            header = header_of(variant)
        except (NotDicom, BrokenInstance) as error:
            message = error.message
        else:
            for value in header.attributes.values():
                if isinstance(value, str):
                    assert value
                    assert "\0" not in value
                    assert len(value.encode()) >= len(value)  # encodable: no surrogates
                    assert len(value) <= 1024
                else:
                    assert value is None or -(2**63) <= value < 2**63
        assert message.isascii()
        assert len(message) < 400


@given(st.binary(max_size=64), st.binary(max_size=200), st.booleans())
def test_any_bytes_are_some_text(character_set: bytes, value: bytes, is_cut: bool) -> None:
    text = decode_text(value, encodings_of(character_set), is_cut=is_cut)
    assert text is None or ("\0" not in text and text.encode())


@given(
    st.binary(max_size=40),
    st.sampled_from(["US", "SS", "UL", "SL", "UV", "SV", "IS", "DS", "LO"]),
    st.booleans(),
)
def test_any_bytes_are_an_integer_of_64_bits_or_none(value: bytes, vr: str, is_little: bool) -> None:
    number = decode_integer(value, vr, is_little)
    assert number is None or -(2**63) <= number < 2**63
