"""One walk over an instance's file: its header, its DICOM JSON (PS3.18 annex F), the layout of its bulk data, and what
it breaks of the rules for values. Reads; never keeps, writes or logs.

Storing an instance costs mostly this, so the walk is made for well-formed files: it steps from element to element and
turns each value into JSON text as it passes. Whatever it does not understand ends it: what came before counts, and the
header is then read by `part10.read_header`, which copes with odd files. Links are left open: where the JSON needs the
instance's own URL, it holds the byte LINK_MARK, which no JSON text can hold.

Files are read forward only, through a window, so that their size costs no memory.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO

from dicom_depot.codec.checks import PATIENT_ID, Check, Violation, patient_id_violation, violations_of_indexed
from dicom_depot.codec.layout import (
    PIXEL_PATHS,
    ByteRange,
    Frames,
    Layout,
    NativeFrames,
    group_fragments,
    pack,
)
from dicom_depot.codec.part10 import VALUE_BYTES_MAX, Encoding, RawValue, encoding_at, header_of, read_header
from dicom_depot.codec.search_values import request_columns
from dicom_depot.codec.values import decode_integer, encodings_of
from dicom_depot.codec.vr import (
    BULK_VRS,
    LONG_VRS,
    TO_JSON,
    Encodings,
    violation,
    vr_of,
)
from dicom_depot.codec.window import SKIP_WINDOW_BYTES, StopWalk, Window
from dicom_depot.domain.errors import BrokenInstance, DepotError, InvalidIdentifier
from dicom_depot.domain.identifiers import InstanceRef, parse_uid
from dicom_depot.domain.instance import AttributeValues, InstanceHeader, Metadata
from dicom_depot.domain.search import REQUEST_ATTRIBUTES, TOP_ATTRIBUTES

LINK_MARK = b"\x01"
"""Stands in packed JSON where the URL of the instance, with a slash at its end, belongs."""

INLINE_BYTES_MAX = 64 << 10
"""Longer values are bulk data, whatever their VR."""
JSON_CHARACTERS_MAX = 32 << 20
"""Where the JSON of one instance ends, however much follows."""
ELEMENTS_MAX = 1_000_000
DEPTH_MAX = 220
FRAGMENTS_MAX = 1_000_000

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_CHARACTER_SET = 0x00080005
_STUDY, _SERIES, _INSTANCE, _CLASS = 0x0020000D, 0x0020000E, 0x00080018, 0x00080016
_IDENTIFYING = (_STUDY, _SERIES, _INSTANCE, _CLASS)
_FRAME_COUNT, _ROWS, _COLUMNS, _SAMPLES, _BITS = 0x00280008, 0x00280010, 0x00280011, 0x00280002, 0x00280100
_PHOTOMETRIC, _PIXEL_REPRESENTATION = 0x00280004, 0x00280103
_OFFSETS, _LENGTHS, _PIXELS = 0x7FE00001, 0x7FE00002, 0x7FE00010
_PIXEL_TAGS = frozenset(int(path, 16) for path in PIXEL_PATHS)
_INDEXED = {attribute.tag: attribute for attribute in TOP_ATTRIBUTES}
_CAPTURED = frozenset(
    [*_IDENTIFYING, *_INDEXED, _CHARACTER_SET, _FRAME_COUNT, _ROWS, _COLUMNS, _SAMPLES, _BITS, _PHOTOMETRIC, _OFFSETS]
)
_PADDING = 0xFFFCFFFC
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT = Encoding(is_implicit=True, is_little=True)

_VRS = {vr.encode(): (vr, vr in LONG_VRS) for vr in (*TO_JSON, *BULK_VRS, "SQ")}
_unpack_tag = {True: struct.Struct("<HH").unpack_from, False: struct.Struct(">HH").unpack_from}
_unpack_short = {True: struct.Struct("<H").unpack_from, False: struct.Struct(">H").unpack_from}
_unpack_long = {True: struct.Struct("<L").unpack_from, False: struct.Struct(">L").unpack_from}


@dataclass(frozen=True, slots=True)
class ReadInstance:
    """What one walk over a file told."""

    header: InstanceHeader
    metadata: Metadata
    violations: tuple[Violation, ...] = ()


def read_instance(source: bytes | BinaryIO, size: int, check: Check = Check.NOTHING) -> ReadInstance:
    """Read the instance in `source`: its bytes, or a seekable stream at its beginning, of `size` bytes.

    Raises NotDicom and BrokenInstance as `part10.read_header`, and what the stream raises of ours.
    """
    walk = _Walk(source, size, is_checking=check is Check.ALL)
    try:
        walk.run()
        header = walk.header()
        if header is None:
            stream = io.BytesIO(source) if isinstance(source, bytes) else source
            stream.seek(0)
            header = read_header(stream, size)
        header.attributes.update(walk.request_columns())
    except BrokenInstance as error:
        raise BrokenInstance(error.message, *map(walk.uid, (_CLASS, _INSTANCE))) from None
    except DepotError:
        raise  # also what a stream of ours says of the store that it reads
    except OSError as error:
        raise BrokenInstance(f"cannot be read: {error.strerror or type(error).__name__}") from None
    except Exception as error:
        raise BrokenInstance(f"cannot be parsed: {type(error).__name__}") from None
    violations = walk.violations
    if check is Check.INDEXED:
        violations = violations_of_indexed(walk.captured, walk.encodings)
    if check is not Check.NOTHING:
        violations = [*violations, *patient_id_violation(walk.captured, header, is_strict=check is Check.INDEXED)]
        for tag in {violation.tag for violation in violations if not violation.is_nested} & _INDEXED.keys():
            header.attributes[_INDEXED[tag].column] = None
    return ReadInstance(header, walk.metadata(header), tuple(violations))


def unpack_json(packed: bytes, instance_url: str) -> bytes:
    """The DICOM JSON object of an instance, with links below `instance_url` (no slash at its end)."""
    return zlib.decompress(packed).replace(LINK_MARK, f"{instance_url}/".encode())


def bare_metadata(ref: InstanceRef) -> Metadata:
    """What can be said of an instance whose file cannot be read: its UIDs."""
    uids = {_STUDY: ref.study_uid, _SERIES: ref.series_uid, _INSTANCE: ref.sop_instance_uid}
    text = ",".join(f'"{tag:08X}":{{"vr":"UI","Value":["{uid}"]}}' for tag, uid in sorted(uids.items()))
    return Metadata(zlib.compress(f"{{{text}}}".encode(), 1), pack(Layout(is_complete=False)))


@dataclass(slots=True)
class _Level:
    """A data set on the way: the file's own, or a sequence item's."""

    encoding: Encoding
    encodings: Encodings
    path: str
    is_signed: bool = False
    members: dict[int, str] = field(default_factory=dict)
    creators: dict[int, str] = field(default_factory=dict)

    def text(self) -> str:
        """A JSON object, its members ordered by tag (PS3.18 section F.2.2)."""
        return "{" + ",".join([f'"{tag:08X}":{self.members[tag]}' for tag in sorted(self.members)]) + "}"


class _Walk(Window):
    """One walk; what it found stands in its attributes."""

    def __init__(self, source: bytes | BinaryIO, size: int, *, is_checking: bool) -> None:
        super().__init__(source, size)
        self._is_checking = is_checking
        self._remaining = ELEMENTS_MAX
        self._characters = 0
        self._transfer_syntax: str | None = None
        self._is_complete = False
        self._values: dict[str, tuple[str, ByteRange]] = {}
        self._frames: Frames | None = None
        self._top: _Level | None = None
        self.captured: dict[int, RawValue] = {}
        self.violations: list[Violation] = []

    @property
    def encodings(self) -> Encodings:
        return self._top.encodings if self._top is not None else ()

    def run(self) -> None:
        try:
            position = self._meta()
            self._top = _Level(self._encoding_at(position), (), "")
            self._data_set(position, self.end, self._top, 0)
            self._is_complete = True
        except (StopWalk, struct.error, zlib.error):
            pass
        self._locate_native()

    def header(self) -> InstanceHeader | None:
        """None when the walk cannot vouch for it. Raises BrokenInstance."""
        if not self._is_complete or self._transfer_syntax is None or self._top is None:
            return None
        if any(tag not in self.captured for tag in _IDENTIFYING):
            return None
        return header_of(self.captured, self._top.encoding, self._transfer_syntax)

    def uid(self, tag: int) -> str | None:
        """A UID of a file that could not be read as a whole, where there is a sound one."""
        raw = self.captured.get(tag)
        try:
            return None if raw is None else parse_uid(raw.value.decode("latin-1"))
        except InvalidIdentifier:
            return None

    def request_columns(self) -> AttributeValues:
        """What the index holds of RequestAttributesSequence."""
        return request_columns(None if self._top is None else self._top.members.get(REQUEST_ATTRIBUTES))

    def metadata(self, header: InstanceHeader) -> Metadata:
        top = self._top or _Level(Encoding(is_implicit=False, is_little=True), (), "")
        ref = header.ref
        uids = (ref.study_uid, ref.series_uid, ref.sop_instance_uid, header.sop_class_uid)
        for tag, uid in zip(_IDENTIFYING, uids, strict=True):  # also where the walk did not get as far
            top.members.setdefault(tag, f'{{"vr":"UI","Value":["{uid}"]}}')
        text = top.text()
        layout = Layout(
            self._values,
            self._frames,
            top.encoding.is_little,
            self.deflated_at,
            self._is_complete,
        )
        return Metadata(zlib.compress(text.encode("utf-8", "replace"), 1), pack(layout))

    def _encoding_at(self, position: int) -> Encoding:
        place = self.at(position, 8)
        return encoding_at(self.buffer[place : place + 8])

    def _meta(self) -> int:
        """Step over preamble and file meta information (PS3.10 section 7.1); returns where the data set begins."""
        has_prefix = self.has(0, 132) and self.buffer[128:132] == b"DICM"
        position = 132 if has_prefix else 0
        is_little = self._encoding_at(position).is_little
        while self.has(position, 8):
            place = self.at(position, 8)
            group, element = _unpack_tag[is_little](self.buffer, place)
            if group != 2:
                break
            known = _VRS.get(self.buffer[place + 4 : place + 6])
            if known is None:
                raise StopWalk
            if known[1]:
                place = self.at(position, 12)
                (length,), start = _unpack_long[is_little](self.buffer, place + 8), position + 12
            else:
                (length,), start = _unpack_short[is_little](self.buffer, place + 6), position + 8
            if element == 0x0010:
                place = self.at(start, length)
                self._transfer_syntax = self.buffer[place : place + length].decode("latin-1").rstrip(" \0")
            position = start + length
        if not has_prefix:
            self._transfer_syntax = None  # what such a file says of itself is for `read_header` to judge
        if self._transfer_syntax == _DEFLATED:
            self.inflate(position)
            if not self.has(0, 8):
                raise StopWalk
            return 0
        return position

    def _data_set(self, position: int, end: int, level: _Level, depth: int) -> int:
        """Walk the elements from `position` to `end`, or to the delimiter that ends an item; returns what is behind."""
        encoding = level.encoding
        is_implicit, is_little = encoding.is_implicit, encoding.is_little
        unpack_tag, unpack_long, unpack_short = (
            _unpack_tag[is_little],
            _unpack_long[is_little],
            _unpack_short[is_little],
        )
        members = level.members
        while position < end:
            self._remaining -= 1
            if self._remaining < 0:
                raise StopWalk
            place = position - self.base
            if place < 0 or place + 12 > len(self.buffer):
                place = self.fill(position)
                available = len(self.buffer) - place
                if not available and self.deflated_at is not None and not depth:
                    return position  # a deflated data set ends where it ends
                if available < 8:
                    raise StopWalk
            buffer = self.buffer
            group, element = unpack_tag(buffer, place)
            tag = group << 16 | element
            if group == 0xFFFE:
                if tag in (_ITEM_END, _SEQUENCE_END) and depth:
                    return position + 8
                raise StopWalk
            item_encoding = encoding
            if is_implicit:
                (length,) = unpack_long(buffer, place + 4)
                vr = vr_of(tag, level.creators.get(tag >> 8) if group & 1 else None, level.is_signed)
                named_vr = None
                start = position + 8
            else:
                known = _VRS.get(buffer[place + 4 : place + 6])
                if known is None:
                    raise StopWalk
                vr, is_long = known
                named_vr = vr
                if is_long:
                    (length,) = unpack_long(buffer, place + 8)
                    start = position + 12
                else:
                    (length,) = unpack_short(buffer, place + 6)
                    start = position + 8
            if length == _UNDEFINED:
                position = self._undefined(start, end, tag, vr, level, depth)
                continue
            if start + length > end:
                raise StopWalk
            position = start + length
            if not element or group < 8 or tag == _PADDING or tag in members:
                continue  # of elements that stand twice the first counts
            if vr == "UN":  # PS3.5 section 6.2.2, note 2: implicit VR little endian inside
                vr = vr_of(tag, level.creators.get(tag >> 8) if group & 1 else None)
                item_encoding = _IMPLICIT
            if vr == "SQ":
                self._sequence(start, position, tag, level, depth, item_encoding)
                continue
            to_json = TO_JSON.get(vr)
            if to_json is None or length > INLINE_BYTES_MAX:
                self._bulk(tag, vr, start, length, level)
                if not depth and tag in _CAPTURED:
                    is_table = tag == _OFFSETS
                    wanted = min(length, 8 * FRAGMENTS_MAX if is_table else VALUE_BYTES_MAX)
                    place = self.at(start, wanted)
                    value = self.buffer[place : place + wanted]
                    self.captured[tag] = RawValue(value, named_vr, is_cut=not is_table)
                continue
            place = start - self.base
            if place < 0 or place + length > len(self.buffer):
                place = self.at(start, length)
            value = self.buffer[place : place + length]
            if tag == _CHARACTER_SET:
                level.encodings = encodings_of(value)
            elif tag == _PIXEL_REPRESENTATION:
                level.is_signed = value[:1] == b"\x01" or value == b"\x00\x01"
            elif group & 1 and 0x10 <= element <= 0xFF:
                level.creators[group << 8 | element] = value.decode("latin-1").strip(" \0")
            if not depth and tag in _CAPTURED:
                self.captured[tag] = RawValue(value, named_vr)
            if self._is_checking:
                reason = violation(vr, value, level.encodings)
                if reason is not None and tag not in _IDENTIFYING:
                    is_fatal = tag == PATIENT_ID and not depth
                    self.violations.append(Violation(tag, reason, is_fatal, is_nested=depth > 0))
                    continue
            text = to_json(value, level.encodings, is_little or item_encoding is _IMPLICIT)
            self._put(tag, f'{{"vr":"{vr}","Value":{text}}}' if text else f'{{"vr":"{vr}"}}', members)
        return position

    def _put(self, tag: int, text: str, members: dict[int, str]) -> None:
        self._characters += len(text) + 12
        if self._characters > JSON_CHARACTERS_MAX:
            raise StopWalk
        members[tag] = text

    def _bulk(self, tag: int, vr: str, start: int, length: int, level: _Level) -> None:
        if not length:
            self._put(tag, f'{{"vr":"{vr}"}}', level.members)
            return
        path = f"{level.path}{tag:08X}"
        self._values[path] = (vr, ByteRange(start, length))
        self._put(tag, f'{{"vr":"{vr}","BulkDataURI":"\x01bulkdata/{path}"}}', level.members)

    def _undefined(self, start: int, end: int, tag: int, vr: str, level: _Level, depth: int) -> int:
        """A value of undefined length: a sequence, or encapsulated pixel data (PS3.5 sections 7.5 and A.4)."""
        if vr == "SQ":
            return self._sequence(start, end, tag, level, depth, level.encoding)
        if vr == "UN":  # PS3.5 section 6.2.2, note 2
            return self._sequence(start, end, tag, level, depth, _IMPLICIT)
        if vr not in ("OB", "OW"):
            raise StopWalk
        return self._fragments(start, tag, vr, level, depth)

    def _sequence(self, position: int, end: int, tag: int, level: _Level, depth: int, encoding: Encoding) -> int:
        """Items to `end`, or to the delimiter; returns what is behind. What was read before a stop stays."""
        if depth >= DEPTH_MAX:
            raise StopWalk
        items: list[_Level] = []
        unpack_tag, unpack_long = _unpack_tag[encoding.is_little], _unpack_long[encoding.is_little]
        try:
            while position < end:
                self._remaining -= 1
                if self._remaining < 0:
                    raise StopWalk
                place = self.at(position, 8)
                group, element = unpack_tag(self.buffer, place)
                (length,) = unpack_long(self.buffer, place + 4)
                item_tag = group << 16 | element
                position += 8
                if item_tag in (_SEQUENCE_END, _ITEM_END):
                    return position
                if item_tag != _ITEM:
                    raise StopWalk
                path = f"{level.path}{tag:08X}/{len(items)}/"
                item = _Level(encoding, level.encodings, path, level.is_signed)
                items.append(item)
                if length == _UNDEFINED:
                    position = self._data_set(position, end, item, depth + 1)
                elif position + length > end:
                    raise StopWalk
                else:
                    position = max(self._data_set(position, position + length, item, depth + 1), position + length)
            return position
        finally:
            if tag not in level.members:
                texts = ",".join([item.text() for item in items])
                level.members[tag] = f'{{"vr":"SQ","Value":[{texts}]}}' if items else '{"vr":"SQ"}'

    def _fragments(self, position: int, tag: int, vr: str, level: _Level, depth: int) -> int:
        """Encapsulated pixel data: an offset table, then fragments up to the delimiter (PS3.5 section A.4)."""
        is_pixels = not depth and tag == _PIXELS and self._frames is None
        is_little = level.encoding.is_little
        starts: list[int] = []
        fragments: list[ByteRange] = []
        begins: list[bool] = []
        first = position
        frame_count = self._integer(_FRAME_COUNT) or 1
        if tag not in level.members:
            if is_pixels:
                self._put(tag, f'{{"vr":"{vr}","BulkDataURI":"\x01bulkdata/{tag:08X}"}}', level.members)
            else:
                self._put(tag, f'{{"vr":"{vr}"}}', level.members)
        try:
            while True:
                place = self.at(position, 8, SKIP_WINDOW_BYTES)
                group, element = _unpack_tag[is_little](self.buffer, place)
                (length,) = _unpack_long[is_little](self.buffer, place + 4)
                item_tag = group << 16 | element
                position += 8
                if item_tag == _SEQUENCE_END:
                    return position
                if item_tag != _ITEM or length == _UNDEFINED or len(fragments) >= FRAGMENTS_MAX:
                    raise StopWalk
                if position - 8 == first:
                    starts = self._offset_table(position, length, is_little=is_little)
                else:
                    if position + length > self.end:
                        raise StopWalk
                    fragments.append(ByteRange(position, length))
                    place = self.at(position, min(length, 2), SKIP_WINDOW_BYTES)
                    begins.append(self.buffer[place : place + 2] in (b"\xff\xd8", b"\xff\x4f"))
                position += length
        finally:
            if is_pixels:
                self._frames = group_fragments(fragments, starts, frame_count, begins_frame=begins)

    def _offset_table(self, position: int, length: int, *, is_little: bool) -> list[int]:
        """The basic offset table's entries; those of the extended one (PS3.3 section C.7.6.3) where it is empty."""
        if length and length <= 4 * FRAGMENTS_MAX:
            place = self.at(position, length)
            count = length // 4
            return list(struct.unpack_from(f"{'<' if is_little else '>'}{count}L", self.buffer, place))
        extended = self.captured.get(_OFFSETS)
        if not length and extended is not None:
            return list(struct.unpack_from(f"{'<' if is_little else '>'}{len(extended.value) // 8}Q", extended.value))
        return []

    def _locate_native(self) -> None:
        """Find the frames of native pixel data, if that is what the instance has."""
        if self._frames is not None:
            return
        for path in PIXEL_PATHS:
            found = self._values.get(path)
            if found is None:
                continue
            rows, columns, samples = (self._integer(tag) or 0 for tag in (_ROWS, _COLUMNS, _SAMPLES))
            bits = {"7FE00008": 32, "7FE00009": 64}.get(path) or self._integer(_BITS) or 0
            photometric = self.captured.get(_PHOTOMETRIC)
            is_halved = photometric is not None and photometric.value.strip(b" \0") == b"YBR_FULL_422"
            frame_bits = rows * columns * ((samples or 1) if not is_halved else 2) * bits
            if frame_bits:
                self._frames = NativeFrames(found[1], frame_bits, max(1, self._integer(_FRAME_COUNT) or 1))
            return

    def _integer(self, tag: int) -> int | None:
        raw = self.captured.get(tag)
        if raw is None or self._top is None:
            return None
        vr = raw.vr or ("IS" if tag == _FRAME_COUNT else "US")
        return decode_integer(raw.value, vr, self._top.encoding.is_little)
