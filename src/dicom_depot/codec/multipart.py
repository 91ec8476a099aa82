r"""Multipart bodies (RFC 2046 section 5.1, RFC 2387, PS3.18 section 8.6): blocks to events, and the lines of an answer.

    body       = [preamble] *(delimiter CRLF part) delimiter "--" [epilogue]
    delimiter  = CRLF "--" boundary *(SP / HTAB)      at the very beginning of the body its CRLF is missing
    part       = *(header CRLF) [CRLF data]           the CRLF of an absent body is the next delimiter's

The reader is our own. python-multipart (0.0.34) was tried: to a part that ends with its blank line
(`--b CRLF CRLF --b`) it adds the whole next part, delimiter and all, as data. It refuses a preamble, white space after
the first boundary and folded headers, and logs a warning for each refusal.

A line that only begins like a delimiter is data, except `--boundary--`: it ends the body whatever comes after it, as no
more bytes may come. Line ends in a part's head may be LF alone; those around data may not, as data may end in CR.

Content types are read in `media_types`; what a part means is decided by the caller.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import assert_never

from dicom_depot.domain.errors import InvalidRequest

HEAD_BYTES_MAX = 16 << 10
"""A part's headers with their line ends and the blank line."""

HEADERS_MAX = 32
"""Headers of one part."""

PREAMBLE_BYTES_MAX = 64 << 10
"""What may stand before the first boundary. Finds a wrong boundary before the whole body has come."""

BOUNDARY_CHARACTERS_MAX = 200
"""RFC 2046 section 5.1.1 allows 70; Orthanc sends 73."""

_PADDING_BYTES_MAX = 256  # White space after a boundary; a line with more of it is data.

# More characters than RFC 2046 allows: clients use them, and none of these can be taken for a line end.
_BOUNDARY = re.compile(rf"[\x20-\x7e]{{0,{BOUNDARY_CHARACTERS_MAX - 1}}}[\x21-\x7e]", re.ASCII)
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+)[ \t]*:([^\x00-\x08\x0a-\x1f\x7f]*)")
_FOLDED = re.compile(rb"[ \t][^\x00-\x08\x0a-\x1f\x7f]*")
_AFTER_BOUNDARY = re.compile(
    rb"(?P<closing>--)|(?P<part>[ \t]{0,%(max)d}+\r?\n)|(?P<unsure>-?\Z|[ \t]{0,%(max)d}+\r?\Z)"
    % {b"max": _PADDING_BYTES_MAX}
)


class MalformedMultipart(InvalidRequest):
    """The body is not the multipart body that its content type announces."""

    code = "MalformedMultipart"


@dataclass(frozen=True, slots=True)
class PartBegin:
    """A part's headers: names in lower case, values as Latin-1 text without white space around them.

    A header that comes twice has its values joined by a comma and a space.
    """

    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PartData:
    """The next bytes of the part, never empty. A view that stays valid, and keeps the whole block that was fed."""

    block: memoryview


@dataclass(frozen=True, slots=True)
class PartEnd:
    """The part is whole."""


Event = PartBegin | PartData | PartEnd


class _Place(Enum):
    """Where in the body the next byte belongs."""

    PREAMBLE = auto()
    HEAD = auto()
    DATA = auto()
    EPILOGUE = auto()


class _Line(Enum):
    """What a search for the next delimiter ends at."""

    PART = auto()
    CLOSING = auto()
    UNSURE = auto()
    """The end of the bytes, or a beginning of a delimiter that they cut off."""


class MultipartReader:
    """Reads one body, block by block. Between blocks it keeps at most one unfinished line."""

    def __init__(self, boundary: str) -> None:
        self._dashed = b"--" + _checked(boundary).encode("ascii")
        self._delimiter = b"\r\n" + self._dashed
        self._place = _Place.PREAMBLE
        self._buffer = b"\n"  # Ends the line before the body: the first delimiter is then like any in the preamble.
        self._position = 0
        self._preamble_bytes = 0
        self._blank_line_bytes = 0  # At the position, before data: the blank line, perhaps also the delimiter's CRLF.
        self._part = 0
        self._head_bytes = 0
        self._headers: dict[str, str] = {}
        self._header_count = 0
        self._last_name = ""

    def feed(self, block: bytes) -> Iterator[Event]:
        """Take the next bytes of the body and iterate over what they complete.

        Nothing is read before the iteration; what is left of one is continued by the next. Events that came before
        the damage are given before MalformedMultipart is raised, however the body is divided into blocks; only where
        a part's data is cut into PartData depends on that.
        """
        self._buffer = self._buffer[self._position :] + block  # Without a copy when nothing is left over.
        self._position = 0
        return self._events()

    def close(self) -> None:
        """The body has ended. Raises MalformedMultipart when its closing boundary did not come."""
        wanted = f"the line {_shown(self._dashed)}"
        match self._place:
            case _Place.EPILOGUE:
                return
            case _Place.PREAMBLE:
                raise MalformedMultipart(
                    f"The body ends before {wanted}. Give in Content-Type the boundary that the body uses."
                )
            case _Place.HEAD:
                raise self._malformed("the body ends within its headers; it was cut off, or a blank line is missing")
            case _Place.DATA:
                closing = _shown(self._dashed + b"--")
                raise self._malformed(
                    f"the body ends without the closing line {closing}. It was cut off, or the line does not follow a "
                    "CR LF; send the body again, whole"
                )
            case unknown:
                assert_never(unknown)

    def _events(self) -> Iterator[Event]:
        while (event := self._next()) is not None:
            yield event
        self._buffer = self._buffer[self._position :]  # The block itself need not wait here for the next one.
        self._position = 0

    def _next(self) -> Event | None:
        if self._place is _Place.PREAMBLE:
            self._skip_preamble()
        match self._place:
            case _Place.PREAMBLE:
                return None
            case _Place.HEAD:
                return self._read_head()
            case _Place.DATA:
                return self._read_data()
            case _Place.EPILOGUE:
                self._position = len(self._buffer)
                return None
            case unknown:
                assert_never(unknown)

    def _skip_preamble(self) -> None:
        """Go behind the first delimiter, or as far as there is none."""
        line, begin, end = self._find(self._delimiter[1:], self._position)
        self._preamble_bytes += begin - self._position
        if self._preamble_bytes > PREAMBLE_BYTES_MAX:
            raise MalformedMultipart(
                f"The line {_shown(self._dashed)} did not come in the body's first {PREAMBLE_BYTES_MAX >> 10} KiB. "
                "Give in Content-Type the boundary that the body uses."
            )
        self._position = begin
        if line is not _Line.UNSURE:
            self._pass_delimiter(line, end)

    def _read_data(self) -> PartData | PartEnd | None:
        line, begin, end = self._find(self._delimiter, self._position)
        data_begin = self._position + self._blank_line_bytes
        if begin > data_begin:
            self._position, self._blank_line_bytes = begin, 0
            return PartData(memoryview(self._buffer)[data_begin:begin])
        if line is _Line.UNSURE:
            return None
        self._pass_delimiter(line, end)
        return PartEnd()

    def _find(self, delimiter: bytes, start: int) -> tuple[_Line, int, int]:
        """The next delimiter from `start` on, its begin and its end; all before the begin is no part of one."""
        buffer = self._buffer
        begin = buffer.find(delimiter, start)
        while begin >= 0:
            end = begin + len(delimiter)
            after = _AFTER_BOUNDARY.match(buffer, end)
            if after is not None:
                if after["closing"]:
                    return _Line.CLOSING, begin, after.end()
                if after["part"]:
                    return _Line.PART, begin, after.end()
                return _Line.UNSURE, begin, begin
            begin = buffer.find(delimiter, end)
        # A delimiter's first byte occurs in it only there: so only the last one can begin one that is cut off.
        begin = buffer.rfind(delimiter[:1], max(start, len(buffer) - len(delimiter) + 1))
        if begin < 0 or not delimiter.startswith(buffer[begin:]):
            begin = len(buffer)
        return _Line.UNSURE, begin, begin

    def _pass_delimiter(self, line: _Line, end: int) -> None:
        self._position = end
        if line is _Line.CLOSING:
            self._place = _Place.EPILOGUE
            return
        self._place = _Place.HEAD
        self._part += 1
        self._head_bytes = self._header_count = 0
        self._headers, self._last_name = {}, ""

    def _read_head(self) -> PartBegin | None:
        """Read whole lines of the head. None when its blank line has not come yet."""
        while True:
            begin = self._position
            left = HEAD_BYTES_MAX - self._head_bytes
            line_feed = self._buffer.find(b"\n", begin, begin + left)
            if line_feed < 0:
                if len(self._buffer) - begin >= left:
                    raise self._malformed(f"its headers are longer than {HEAD_BYTES_MAX >> 10} KiB; send fewer")
                return None
            line = self._buffer[begin:line_feed].removesuffix(b"\r")
            if not line:
                break
            self._add_header(line)
            self._position = line_feed + 1
            self._head_bytes += self._position - begin
        self._place = _Place.DATA
        # A blank line of CR LF stays in the buffer: when there is no data, it is the next delimiter's.
        self._blank_line_bytes = 2 if line_feed > begin else 0
        self._position = line_feed + 1 - self._blank_line_bytes
        return PartBegin(self._headers)

    def _add_header(self, line: bytes) -> None:
        if self._last_name and _FOLDED.fullmatch(line):
            # A folded header (RFC 5322 section 2.2.3) goes on in this line.
            folded = line.decode("latin-1").strip(" \t")
            self._headers[self._last_name] = f"{self._headers[self._last_name]} {folded}".strip(" ")
            return
        header = _HEADER.fullmatch(line)
        if header is None or line.startswith(self._dashed):
            raise self._malformed(
                f"{_shown(line)} is not a header of the form `Name: value`; a blank line must stand between the part's "
                "headers and its data"
            )
        self._header_count += 1
        if self._header_count > HEADERS_MAX:
            raise self._malformed(f"it has more than {HEADERS_MAX} headers; send fewer")
        name, value = header[1].decode("ascii").lower(), header[2].decode("latin-1").strip(" \t")
        self._headers[name] = f"{self._headers[name]}, {value}" if name in self._headers else value
        self._last_name = name

    def _malformed(self, reason: str) -> MalformedMultipart:
        return MalformedMultipart(f"Part {self._part} of the body: {reason}.", target=f"parts[{self._part - 1}]")


def boundary_of(parameters: Mapping[str, str]) -> str:
    """The boundary among the parameters of a multipart media type (names in lower case, values unquoted).

    Raises MalformedMultipart when there is none, or one that is not 1 to BOUNDARY_CHARACTERS_MAX characters
    long or ends in a space. Of the characters, all of printable ASCII are taken.
    """
    boundary = parameters.get("boundary")
    if boundary is None:
        raise MalformedMultipart(
            "Content-Type has no boundary; give the one that the body uses: multipart/related; boundary=...",
            target="Content-Type",
        )
    return _checked(boundary)


def new_boundary() -> str:
    """A boundary for an answer: needs no quotes, and cannot be foreseen by whoever made the data."""
    return secrets.token_hex(16)


def part_head(boundary: str, headers: Mapping[str, str], *, is_first: bool) -> bytes:
    """What an answer sends before a part's data: the delimiter, headers and a blank line.

    Raises ValueError for a name or value that would end its line or is not Latin-1: no such answer may be sent.
    """
    lines = [b"" if is_first else b"\r\n", b"--", boundary.encode("ascii"), b"\r\n"]
    for name, value in headers.items():
        line = f"{name}: {value}".encode("latin-1")
        if not _HEADER.fullmatch(line):
            raise ValueError(f"{_shown(line)} cannot be sent as a header")
        lines += [line, b"\r\n"]
    return b"".join([*lines, b"\r\n"])


def closing(boundary: str) -> bytes:
    """What an answer sends after its last part's data."""
    return b"\r\n--" + boundary.encode("ascii") + b"--\r\n"


def _checked(boundary: str) -> str:
    if not _BOUNDARY.fullmatch(boundary):
        raise MalformedMultipart(
            f"The boundary in Content-Type must have 1 to {BOUNDARY_CHARACTERS_MAX} printable ASCII characters and not "
            "end in a space.",
            target="Content-Type",
        )
    return boundary


def _shown(line: bytes) -> str:
    """Caller's bytes for a message: printable and short, so that they cannot flood or forge a log."""
    text = ascii(line[:81].decode("latin-1"))
    return text if len(text) <= 82 else text[:78] + "...'"
