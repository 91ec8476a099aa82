"""Value representations (PS3.5 section 6.2): raw values to DICOM JSON values (PS3.18 section F.2), and their rules.

Pure functions of one element's bytes. Messages never repeat a value: it may be a patient's.
"""

from __future__ import annotations

import functools
import json
import math
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

from pydicom._dicom_dict import DicomDictionary  # the table itself: the functions around it are slow
from pydicom.datadict import dictionary_VR, private_dictionary_VR

from dicom_depot.codec.values import decode_value

Encodings = tuple[str, ...]
ToJson = Callable[[bytes, Encodings, bool], str]
"""Bytes, character sets and byte order (True: little endian) to the text of a JSON array; "" for no value."""

BULK_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
"""What DICOM JSON points at instead of holding it."""
LONG_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
"""VRs whose length has four bytes in explicit VR encodings (PS3.5 section 7.1.2)."""
LONG_VR_CODES = frozenset(vr.encode() for vr in LONG_VRS)
"""The same, as they stand in files."""
WORD_BYTES = {
    **dict.fromkeys(("AT", "OW", "SS", "US"), 2),
    **dict.fromkeys(("FL", "OF", "OL", "SL", "UL"), 4),
    **dict.fromkeys(("FD", "OD", "OV", "SV", "UV"), 8),
}
"""How many bytes of a value of these VRs change places together between byte orders (PS3.5 section 7.3)."""

_quote = json.encoder.encode_basestring
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_EXACT_INTEGER_MAX = 1 << 53
"""Larger integers lose digits in many JSON readers; PS3.18 section F.2.3 allows strings for them."""


def _texts(value: bytes, encodings: Encodings, _is_little: bool) -> str:
    """Values separated by backslashes; an empty one is null."""
    text = decode_value(value, encodings)
    if "\\" not in text:
        text = text.rstrip(" \0")
        return f"[{_quote(text)}]" if text else ""
    parts = [part.rstrip(" \0") for part in text.split("\\")]
    return "[" + ",".join(_quote(part) if part else "null" for part in parts) + "]" if any(parts) else ""


def _stripped_texts(value: bytes, encodings: Encodings, _is_little: bool) -> str:
    """As `_texts`, for VRs whose leading spaces mean nothing either."""
    parts = [part.strip(" \0") for part in decode_value(value, ()).split("\\")]
    return "[" + ",".join(_quote(part) if part else "null" for part in parts) + "]" if any(parts) else ""


def _one_text(value: bytes, encodings: Encodings, _is_little: bool) -> str:
    text = decode_value(value, encodings).rstrip(" \0")
    return f"[{_quote(text)}]" if text else ""


_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def _names(value: bytes, encodings: Encodings, _is_little: bool) -> str:
    """Person names: an object with up to three component groups each (PS3.5 section 6.2.1)."""
    values = []
    is_any = False
    for part in decode_value(value, encodings).split("\\"):
        groups = [group.rstrip(" \0") for group in part.split("=", 2)]
        members = [f'"{kind}":{_quote(group)}' for kind, group in zip(_GROUPS, groups, strict=False) if group]
        is_any |= bool(members)
        values.append("{" + ",".join(members) + "}" if members else "null")
    return "[" + ",".join(values) + "]" if is_any else ""


def _decimals(value: bytes, _encodings: Encodings, _is_little: bool) -> str:
    """Decimal strings as JSON numbers, digit by digit; what is no number stays a string."""
    text = decode_value(value, ())
    parts = [part.strip(" \0") for part in text.split("\\")] if "\\" in text else [text.strip(" \0")]
    return "[" + ",".join([_decimal(part) for part in parts]) + "]" if any(parts) else ""


def _decimal(text: str) -> str:
    if _JSON_NUMBER.fullmatch(text):
        return text if len(text) <= _DIGITS_MAX else _quote(text)
    if not text:
        return "null"
    if not _DECIMAL.fullmatch(text) or len(text) > _DIGITS_MAX:
        return _quote(text)
    digits, _, exponent = text.lower().partition("e")
    whole, _, fraction = digits.lstrip("+-").partition(".")
    number = ("-" if digits.startswith("-") else "") + (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    return f"{number}e{exponent}" if exponent else number


_DIGITS_MAX = 64


def _integers(value: bytes, _encodings: Encodings, _is_little: bool) -> str:
    parts = [part.strip(" \0") for part in decode_value(value, ()).split("\\")]
    return "[" + ",".join([_integer(part) for part in parts]) + "]" if any(parts) else ""


def _integer(text: str) -> str:
    if not text:
        return "null"
    if _INTEGER.fullmatch(text) and len(text) <= _DIGITS_MAX:
        return str(int(text))
    return _decimal(text)


def _binary(code: str) -> ToJson:
    size = struct.calcsize(f"<{code}")

    def to_json(value: bytes, _encodings: Encodings, is_little: bool) -> str:
        count = len(value) // size
        numbers = struct.unpack_from(f"{'<' if is_little else '>'}{count}{code}", value)
        return f"[{','.join(map(str, numbers))}]" if count else ""

    return to_json


def _wide(code: str) -> ToJson:
    def to_json(value: bytes, _encodings: Encodings, is_little: bool) -> str:
        numbers = struct.unpack_from(f"{'<' if is_little else '>'}{len(value) // 8}{code}", value)
        texts = [str(number) if abs(number) <= _EXACT_INTEGER_MAX else f'"{number}"' for number in numbers]
        return f"[{','.join(texts)}]" if texts else ""

    return to_json


def _floats(code: str) -> ToJson:
    size = struct.calcsize(f"<{code}")

    def to_json(value: bytes, _encodings: Encodings, is_little: bool) -> str:
        count = len(value) // size
        numbers = struct.unpack_from(f"{'<' if is_little else '>'}{count}{code}", value)
        # JSON knows neither NaN nor infinity.
        return "[" + ",".join(repr(each) if math.isfinite(each) else "null" for each in numbers) + "]" if count else ""

    return to_json


def _tags(value: bytes, _encodings: Encodings, is_little: bool) -> str:
    count = len(value) // 4
    numbers = struct.unpack_from(f"{'<' if is_little else '>'}{2 * count}H", value)
    return (
        "[" + ",".join(f'"{numbers[n]:04X}{numbers[n + 1]:04X}"' for n in range(0, 2 * count, 2)) + "]" if count else ""
    )


TO_JSON: dict[str, ToJson] = {
    **dict.fromkeys(("LO", "SH", "UC"), _texts),
    **dict.fromkeys(("AE", "AS", "CS", "DA", "DT", "TM", "UI"), _stripped_texts),
    **dict.fromkeys(("LT", "ST", "UT", "UR"), _one_text),
    "PN": _names,
    "DS": _decimals,
    "IS": _integers,
    "US": _binary("H"),
    "SS": _binary("h"),
    "UL": _binary("L"),
    "SL": _binary("l"),
    "UV": _wide("Q"),
    "SV": _wide("q"),
    "FL": _floats("f"),
    "FD": _floats("d"),
    "AT": _tags,
}
"""Every VR that DICOM JSON holds values of; the others are sequences and bulk data."""


def is_vr_code(text: bytes) -> bool:
    """Whether this is two capital letters, as a VR is, be it known or not."""
    return len(text) == 2 and text.isalpha() and text.isupper()


@functools.lru_cache(maxsize=8192)
def vr_of(tag: int, creator: str | None = None, is_signed: bool = False) -> str:
    """The VR that an implicit VR element has by PS3.6; UN for what is not in the data dictionary (PS3.5 section 6.2.2).

    Where the dictionary leaves a choice, the one that fits most: OW for anything or OW; for US or SS the one that has
    the sign of the instance's pixels.
    """
    if is_signed and tag in SIGN_FOLLOWS_PIXELS and vr_of(tag, creator) == "US":
        return "SS"
    group, element = tag >> 16, tag & 0xFFFF
    if element == 0:
        return "UL"
    if group % 2:
        if 0x10 <= element <= 0xFF:
            return "LO"
        if creator is None:
            return "UN"
        try:
            return _chosen(private_dictionary_VR(tag, creator))
        except KeyError:
            return "UN"
    try:
        return _chosen(DicomDictionary[tag][0] if tag in DicomDictionary else dictionary_VR(tag))
    except KeyError:
        return "UN"


SIGN_FOLLOWS_PIXELS = frozenset(tag for tag, entry in DicomDictionary.items() if "US or SS" in entry[0])
"""Attributes whose values are signed where the pixels are (PS3.5 section A.1)."""


def choices_of(tag: int) -> tuple[str, ...]:
    """The VRs that PS3.6 allows for a tag; none for private and unknown ones."""
    if tag >> 16 & 1 or (tag not in DicomDictionary and tag >> 16 not in _REPEATING_GROUPS):
        return ()
    try:
        return tuple(dictionary_VR(tag).split(" or "))
    except KeyError:
        return ()


_REPEATING_GROUPS = frozenset(
    {0x5000 + n for n in range(0, 256, 2)} | {0x6000 + n for n in range(0, 256, 2)} | {0x0020}
)


def _chosen(vr: str) -> str:
    if " or " not in vr:
        return vr
    return "OW" if "OW" in vr else "US" if "US" in vr else vr.split(" ", maxsplit=1)[0]


class Rule(NamedTuple):
    """What a text value of a VR must look like: `pattern` matches each value, `wording` says it in words."""

    pattern: re.Pattern[str]
    wording: str
    is_single: bool = False


_NO_CONTROL = r"[^\x00-\x1a\x1c-\x1f\\]"
_TEXT = r"[^\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]"

_RULES: dict[str, Rule] = {
    "AE": Rule(re.compile(_NO_CONTROL + r"{0,16}"), "at most 16 characters, no control characters"),
    "AS": Rule(re.compile(r"[0-9]{3}[DWMY]"), "three digits and one of D, W, M, Y"),
    "CS": Rule(re.compile(r"[A-Z0-9 _]{0,16}"), "at most 16 characters: capital letters, digits, space, underscore"),
    "DA": Rule(re.compile(r"[0-9]{4}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"), "a date YYYYMMDD"),
    "DS": Rule(
        re.compile(r" *(?=.{0,16} *$)[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? *"),
        "a decimal of at most 16 characters",
    ),
    "DT": Rule(
        re.compile(
            r"[0-9]{4}(?:(?:0[1-9]|1[0-2])(?:(?:0[1-9]|[12][0-9]|3[01])(?:[01][0-9]|2[0-3])?(?:[0-5][0-9](?:[0-5][0-9]|60)?)?"
            r"(?:\.[0-9]{1,6})?)?)?(?:[+-][0-9]{4})?"
        ),
        "a date and time YYYYMMDDHHMMSS.FFFFFF&ZZXX",
    ),
    "IS": Rule(re.compile(r" *[+-]?[0-9]{1,11} *"), "an integer of at most 12 characters"),
    "LO": Rule(re.compile(_NO_CONTROL + r"{0,64}"), "at most 64 characters, no control characters"),
    "LT": Rule(re.compile(_TEXT + r"{0,10240}"), "at most 10240 characters", is_single=True),
    "SH": Rule(re.compile(_NO_CONTROL + r"{0,16}"), "at most 16 characters, no control characters"),
    "ST": Rule(re.compile(_TEXT + r"{0,1024}"), "at most 1024 characters", is_single=True),
    "TM": Rule(
        re.compile(r"(?:[01][0-9]|2[0-3])(?:[0-5][0-9](?:(?:[0-5][0-9]|60)(?:\.[0-9]{1,6})?)?)?"),
        "a time HHMMSS.FFFFFF",
    ),
    "UI": Rule(re.compile(r"[0-9.]{0,64}"), "at most 64 digits and dots"),
}
_SIZES = {vr: size for vr, size in WORD_BYTES.items() if vr not in BULK_VRS} | {"AT": 4}


_MINIMUM_RULES = _RULES | {
    "AS": Rule(re.compile(r".{4}", re.DOTALL), "exactly 4 characters"),
    "CS": Rule(re.compile(r".{0,16}", re.DOTALL), "at most 16 characters"),
    "SH": Rule(re.compile(r".{0,16}", re.DOTALL), "at most 16 characters"),
    "AE": Rule(re.compile(r".{0,16}", re.DOTALL), "at most 16 characters"),
}
"""What version 1 of the API asks of the attributes that it indexes."""


def violation(vr: str, value: bytes, encodings: Encodings, *, is_minimum: bool = False) -> str | None:
    """What a value breaks of its VR's rules (PS3.5 table 6.2-1), in words; None when nothing. Empty is always fine."""
    if not value:
        return None
    size = _SIZES.get(vr)
    if size is not None:
        return f"its length is not a multiple of {size} bytes" if len(value) % size else None
    if vr == "PN":
        return _name_violation(decode_value(value, encodings))
    rule = (_MINIMUM_RULES if is_minimum else _RULES).get(vr)
    if rule is None:
        return None
    text = decode_value(value, encodings)
    matches = rule.pattern.fullmatch
    if rule.is_single:
        return None if matches(text.rstrip(" \0")) else f"it is not {vr}: {rule.wording}"
    for part in text.split("\\"):
        trimmed = part.strip(" \0") if vr in ("CS", "AE", "AS") else part.rstrip(" \0")
        if trimmed and not matches(trimmed):
            return f"it is not {vr}: {rule.wording}"
    return None


def _name_violation(text: str) -> str | None:
    for part in text.split("\\"):
        groups = part.rstrip(" \0").split("=")
        if len(groups) > 3:
            return "it is not PN: at most 3 component groups"
        for group in groups:
            if len(group) > 64 or group.count("^") > 4:
                return "it is not PN: at most 64 characters and 5 components in each group"
    return None
