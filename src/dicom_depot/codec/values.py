"""Raw element values to text and integers (PS3.5 section 6). Pure functions; nothing here reads a stream."""

from __future__ import annotations

import re
import struct

from pydicom.charset import CODES_TO_ENCODINGS, python_encoding

TEXT_CHARACTERS_MAX = 1024
"""Longer text is cut to this many characters; no value representation of the index allows as many in one value."""

_CHARACTER_SET_NAME = re.compile(r"ISO[-_ ]?(2022)?[-_ ]?IR[-_ ]?(\d+)", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}(?:\.0*)?", re.ASCII)
_BINARY_INTEGERS = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "UV": "Q", "SV": "q"}
_FRAGMENT = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*", re.DOTALL)
_DELIMITER = re.compile(rb"[\\^=\r\n\t\f]")
# Python's codecs read the escapes of these encodings themselves.
_SELF_ESCAPING = frozenset({"iso2022_jp", "iso2022_jp_2"})
_ASCII_CODECS = frozenset({"ascii", "iso8859"})


def encodings_of(specific_character_set: bytes) -> tuple[str, ...]:
    """The Python codecs of a Specific Character Set (0008,0005) value (PS3.3 section C.12.1.1.2).

    Unknown names are left out, common misspellings (`ISO-IR 100`) are understood; never raises.
    """
    codecs: list[str] = []
    for name in specific_character_set.decode("latin-1").replace("\0", "").split("\\"):
        spelled = name.strip().upper()
        if match := _CHARACTER_SET_NAME.fullmatch(spelled):
            spelled = f"ISO 2022 IR {match[2]}" if match[1] else f"ISO_IR {match[2]}"
        codec = "utf8" if spelled in ("UTF-8", "UTF8") else python_encoding.get(spelled)
        if codec is not None:
            codecs.append(codec)
    return tuple(codecs)


def decode_text(value: bytes, encodings: tuple[str, ...], *, is_cut: bool = False) -> str | None:
    """Text without padding and NULs, several values joined by backslashes, at most TEXT_CHARACTERS_MAX characters.

    Bytes that do not fit `encodings` are read as UTF-8 or else as Latin-1, so that every value is some text. Empty
    text is None. `is_cut`: the value's end is missing, perhaps in the middle of a character.
    """
    text = _decode(value, encodings, is_cut=is_cut).replace("\0", "")
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")  # Some codecs make surrogates, which are no text.
    text = "\\".join(part.strip(" ") for part in text.split("\\"))[:TEXT_CHARACTERS_MAX].rstrip(" ")
    return text or None


def decode_value(value: bytes, encodings: tuple[str, ...]) -> str:
    """All text of a value, padding, backslashes and NULs included; bytes that do not fit as in `decode_text`."""
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii")
    text = _decode(value, encodings, is_cut=False)
    return text.encode("utf-8", "replace").decode("utf-8")  # Some codecs make surrogates, which are no text.


def decode_integer(value: bytes, vr: str, is_little_endian: bool) -> int | None:
    """The first value of an integer attribute, by the VR that the file uses; None when it is not one of 64 bits."""
    code = _BINARY_INTEGERS.get(vr)
    if code is not None:
        packed = struct.Struct(("<" if is_little_endian else ">") + code)
        if len(value) < packed.size:
            return None
        number: int = packed.unpack_from(value)[0]
    else:
        text = value.split(b"\\", 1)[0].decode("latin-1").strip(" \0")
        if not _INTEGER.fullmatch(text):
            return None
        number = int(text.split(".", 1)[0])
    return number if -(2**63) <= number < 2**63 else None


def _decode(value: bytes, encodings: tuple[str, ...], *, is_cut: bool) -> str:
    if value.isascii() and b"\x1b" not in value:
        # JIS X 0201 shows a yen sign where ASCII has the backslash; both are the delimiter of values.
        return value.decode("ascii")
    attempts = [*encodings[:1], "utf-8"] if encodings else ["utf-8"]
    if is_cut and encodings:
        return value.decode(encodings[0], "ignore")
    if b"\x1b" in value and encodings:
        try:
            return "".join(_decode_fragment(part, encodings) for part in _FRAGMENT.findall(value))
        except (UnicodeError, LookupError):
            pass
    for encoding in attempts:
        try:
            return value.decode(encoding)
        except (UnicodeError, LookupError):
            continue
    return value.decode("latin-1")


def _decode_fragment(fragment: bytes, encodings: tuple[str, ...]) -> str:
    """Decode a piece that begins with at most one escape sequence (PS3.5 section 6.1.2.5).

    The escape chooses among the character sets that were announced; a delimiter returns to the first one.
    Raises UnicodeError.
    """
    if not fragment.startswith(b"\x1b"):
        return fragment.decode(encodings[0])
    escape_bytes = 4 if fragment.startswith((b"\x1b$(", b"\x1b$)")) else 3
    encoding = CODES_TO_ENCODINGS.get(fragment[:escape_bytes], "")
    if encoding not in encodings and encoding not in _ASCII_CODECS:
        return fragment.decode(encodings[0])
    if encoding in _SELF_ESCAPING:
        return fragment.decode(encoding)
    text = fragment[escape_bytes:]
    delimiter = _DELIMITER.search(text)
    end = delimiter.start() if delimiter else len(text)
    return text[:end].decode(encoding) + text[end:].decode(encodings[0])
