"""The form in which values are compared, for the index and for queries alike: two values match where their forms do.

    text        letter case means nothing, nor does the way in which Unicode composes a character
    PN          as text, without accents; a name's component groups (PS3.5 section 6.2.1) stand for it, each alone
    DA, TM, DT  all digits that the VR has room for, so that the order of text is the order of time
    numbers     as an integer, or as the shortest text of the binary number

What is no value of its VR has no form: it is in no index, and no query finds it.
"""

from __future__ import annotations

import re
import struct
import unicodedata
from collections.abc import Iterable, Iterator

from dicom_depot.domain.search import Attribute, Held, Level, attributes_of

TEXT_CHARACTERS_MAX = 1024
"""How much of a text is compared."""

_MONTH, _DAY = r"0[1-9]|1[0-2]", r"0[1-9]|[12]\d|3[01]"
_HOUR, _MINUTE, _SECOND = r"[01]\d|2[0-3]", r"[0-5]\d", r"[0-5]\d|60"
_DATE = re.compile(rf"(\d{{4}})(\.?)({_MONTH})\2({_DAY})", re.ASCII)
_TIME = re.compile(rf"({_HOUR})(?::?({_MINUTE})(?::?({_SECOND})(?:\.(\d{{1,6}}))?)?)?", re.ASCII)
_DATE_TIME = re.compile(
    rf"(\d{{4}}(?:(?:{_MONTH})(?:(?:{_DAY})(?:(?:{_HOUR})(?:(?:{_MINUTE})(?:(?:{_SECOND})(?:\.\d{{1,6}})?)?)?)?)?)?)"
    r"(?:[+-]\d{4})?",
    re.ASCII,
)
_INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_FLOAT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
_WORD = re.compile(r"[^\W_]+")
_ACCENTS = re.compile("[\u0300-\u036f]")

_DATE_TIME_EMPTY = "00000101000000000000"
_INTEGER_VRS = frozenset({"IS", "SL", "SS", "UL", "US", "SV", "UV"})
_FLOAT_VRS = frozenset({"FD", "FL"})
TIME_VRS = frozenset({"DA", "TM", "DT"})
"""VRs that ranges can be asked of."""


def folded(text: str) -> str:
    """Text as it is compared: without padding, without letter case."""
    text = text.strip(" \0")
    if text.isascii():
        return text.lower()[:TEXT_CHARACTERS_MAX]
    # Twice: folding composes some characters differently than it found them.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return text.strip(" ")[:TEXT_CHARACTERS_MAX]


def folded_name(text: str) -> str:
    """A name as it is compared: also without accents, and without components that are empty at the end of a group."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _ACCENTS.sub("", unicodedata.normalize("NFKD", text)))
    return "=".join(group.rstrip(" ^") for group in folded(text).split("=")).rstrip("=")


def name_forms(name: str) -> set[str]:
    """What stands for a folded name: itself, and each of its component groups."""
    return {name, *name.split("=")} - {""}


def words_of(text: str) -> list[str]:
    """The words of a folded name."""
    return _WORD.findall(text)


def date_form(text: str) -> str | None:
    """YYYYMMDD; also of the dotted form of ACR-NEMA."""
    found = _DATE.fullmatch(text)
    return None if found is None else "".join(found.group(1, 3, 4))


def time_form(text: str, filler: str = "0") -> str | None:
    """HHMMSSFFFFFF; what the value leaves open is filled: with 0 for its first moment, with 9 for its last."""
    found = _TIME.fullmatch(text)
    return None if found is None else "".join(part or "" for part in found.groups()).ljust(12, filler)


def date_time_form(text: str, filler: str = "") -> str | None:
    """YYYYMMDDHHMMSSFFFFFF, in the time zone of the value; filled as `time_form`, by default as its first moment."""
    found = _DATE_TIME.fullmatch(text)
    if found is None:
        return None
    digits = found[1].replace(".", "")
    return digits.ljust(20, filler) if filler else digits + _DATE_TIME_EMPTY[len(digits) :]


def form_of(vr: str, text: str) -> str | int | None:
    """The form of one value; None where it has none."""
    text = text.strip(" \0")
    if vr == "DA":
        return date_form(text)
    if vr == "TM":
        return time_form(text)
    if vr == "DT":
        return date_time_form(text)
    if vr in _INTEGER_VRS:
        number = int(text) if _INTEGER.fullmatch(text) else None
        return number if number is not None and -(2**63) <= number < 2**63 else None
    if vr in _FLOAT_VRS:
        return _float_form(vr, text)
    return (folded_name(text) if vr == "PN" else folded(text)) or None


def _float_form(vr: str, text: str) -> str | None:
    if not _FLOAT.fullmatch(text):
        return None
    number = float(text)
    if vr == "FL":
        try:
            (number,) = struct.unpack("<f", struct.pack("<f", number))
        except OverflowError:
            return None
    return repr(number + 0.0)


def column_form(attribute: Attribute, value: str | int | None) -> str | int | None:
    """What the column of an attribute holds: the form of its first value, or of values that are held apart the text
    with all of them.
    """
    if value is None or attribute.is_integer:
        return value
    if attribute.held is Held.VALUES:
        return str(value)
    return form_of(attribute.vr, str(value).split("\\", 1)[0])


_HELD_APART = {level: tuple(each for each in attributes_of(level) if each.held is Held.VALUES) for level in Level}


def values_apart(level: Level, columns: dict[str, str | int | None]) -> Iterator[tuple[str, str]]:
    """(Name of the values, value) for each value of a level that is held apart."""
    for attribute in _HELD_APART[level]:
        text = columns.get(attribute.column)
        if text is not None:
            yield from value_rows(attribute.column, attribute.vr, str(text).split("\\"))


def value_rows(column: str, vr: str, values: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(Name, value) for each row that holds these values; names also by their words."""
    rows: dict[tuple[str, str], None] = {}
    for text in values:
        form = form_of(vr, text)
        if form is None:
            continue
        if vr == "PN":
            rows |= {(column, each): None for each in sorted(name_forms(str(form)))}
            rows |= {(words_name(column), word): None for word in words_of(str(form))}
        else:
            rows[column, str(form)] = None
    yield from rows


def words_name(column: str) -> str:
    """The name under which the words of names are held."""
    return f"{column}:words"
