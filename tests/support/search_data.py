"""Instances and queries for the tests of search: odd values of every kind, the files that hold them, and what may be
asked of them.
"""

from __future__ import annotations

import struct
import unicodedata
from typing import Any

from tests.support.search_oracle import (
    ATTRIBUTES,
    INSTANCE,
    LEVELS,
    REQUESTS,
    SERIES,
    STUDY,
    Instance,
    Row,
    date,
    integer,
    moment,
)

CLASSES = ("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.2")

_DATES = ("20240102", "20240229 ", "20231231", "19700101", "20240103")
_TIMES = ("10", "1030", "103059", "103059.5 ", "103059.123456", "000000", "235960")
_TEXTS = (
    *("Thorax", "THORAX ", "  thorax", "Thorax Abdomen", "100%", "1000", "a_b", "aXb", "a%b", "[x]", "x", "ab*"),
    *("what?", "whatever", 'O\'Brien "q"', "it's", "A|B", "--", "Ω", "#;,"),
    *("Größe", "GRÖSSE", "Gro\u0308ße", "Κεφαλής", "ΚΕΦΑΛΉΣ", "胸部", "흉부"),
)
_NAMES = (
    *("Müller^Jürgen", "MULLER^JURGEN", "Muller^Jurgen^^Dr.", "Mu\u0308ller^Ju\u0308rgen^ "),
    *("Doe^Jane", "Doe^Jane^^^ ", "Doe_Roe^J", "O'Brien^Mary-Jane", "Mary^O%Brien", "Strauß^Jörg"),
    *("Yamada^Tarou=山田^太郎=やまだ^たろう", "YAMADA^TAROU=山田^太郎=ヤマダ^タロウ", "=山田^花子"),
    *("Hong^Gildong=洪^吉洞=홍^길동", "Παπαδόπουλος^Γιώργος", "ΠΑΠΑΔΟΠΟΥΛΟΣ^ΓΙΩΡΓΟΣ"),
)
_NUMBERS = ("1", "2 ", "007", "-3", "12345")
_CODES = ("CT", "MR", "PT", "SR")

SOUND: dict[str, tuple[str, ...]] = {
    "DA": _DATES,
    "TM": _TIMES,
    "LO": _TEXTS,
    "SH": tuple(each for each in _TEXTS if len(each) <= 16),
    "PN": _NAMES,
    "IS": _NUMBERS,
    "CS": _CODES,
}
"""Values that keep the rules of their VR, by VR."""
ODD: dict[str, tuple[str, ...]] = {
    "DA": ("", "00000000", "20241301", "2024.01.05", "yesterday", "20240102\\20240103", "20240102-20240103", "2024"),
    "TM": ("", "25", "996199", "10:30:59", "noon", "1030\\11", "9", "10.5"),
    "LO": ("", "   ", "A\\B", "\\B", "Thorax\\Abdomen"),
    "SH": ("", "   ", "A\\B", "\\B"),
    "PN": ("", "^^", "Doe^John\\Roe^Jack", "A=B=C=D", "  ", "Solo"),
    "IS": ("", "x", "1.5", "9223372036854775807", "99999999999999999999", "5\\6", "+4", " 1"),
    "CS": ("", "ct", "mr ", "CT\\MR"),
}
"""Values that break them, are empty, or are several."""


def some_of(vr: str, start: int) -> tuple[str, ...]:
    """A few values, of which some can be taken for each other, as neighbours can."""
    sound, odd = SOUND[vr] * 2, ODD[vr]
    return *sound[start % len(SOUND[vr]) :][:4], odd[start % len(odd)]


STORED = tuple(
    each for each in ATTRIBUTES if ATTRIBUTES[each].vr in SOUND and each not in (*REQUESTS, "ModalitiesInStudy")
)

ROUTES = ((STUDY, 0), (SERIES, 0), (SERIES, 1), (INSTANCE, 0), (INSTANCE, 1), (INSTANCE, 2))
"""What is asked for, and how many UIDs stand in the path."""


def searchable(level: str, scope_length: int) -> list[str]:
    """The attributes that may be asked for at a route."""
    wanted = LEVELS[scope_length : LEVELS.index(level) + 1]
    return [keyword for keyword, known in ATTRIBUTES.items() if known.level in wanted]


_TEXT_CHANGES = (
    *("as it is", "upper", "lower", "first half*", "*last half", "*middle*", "a ? for a letter", "*", "decomposed"),
    "list",
)
_NAME_CHANGES = (*_TEXT_CHANGES[:-1], "one group", "bare", "a word", "a word's beginning", "two words")
_RANGES = ("as it is", "from", "to", "between")
CHANGES = {
    **dict.fromkeys(("LO", "SH", "CS"), _TEXT_CHANGES),
    **dict.fromkeys(("DA", "TM"), _RANGES),
    "PN": _NAME_CHANGES,
    "IS": ("as it is",),
    "UI": ("as it is", "list"),
}
"""What a query can make of a stored value, by VR."""


_BARE = str.maketrans("äöüάόύώίή", "aouαουωιη")


def asked(keyword: str, value: str, change: str, other: str) -> tuple[str, bool] | None:
    """A query's value made of a stored one, and whether it is fuzzy; None where that makes no valid query."""
    vr = ATTRIBUTES[keyword].vr
    value, other = value.strip(" "), other.strip(" ")
    half = len(value) // 2
    is_sound = {"DA": is_date, "TM": is_time, "IS": is_integer}.get(vr, bool)
    if not is_sound(value):
        return None
    other = other if is_sound(other) else value
    match vr, change:
        case "UI", "list":
            return f"{value},{other}\\1.9", False
        case _, "as it is":
            made, is_fuzzy = value, False
        case "DA" | "TM", "from":
            made, is_fuzzy = f"{value}-", False
        case "DA" | "TM", "to":
            made, is_fuzzy = f"-{value}", False
        case "DA" | "TM", "between":
            made, is_fuzzy = "-".join(sorted((value, other))), False
        case (("DA" | "TM" | "IS" | "UI"), _):
            return None
        case "PN", "a word" | "a word's beginning" | "two words":
            parts = value.replace("=", "^").replace(" ", "^").split("^")
            first, last = next((each for each in parts if each), ""), parts[-1]
            made = {"a word": last or first, "two words": f"{last} {first.upper()}"}.get(change, first[:2])
            is_fuzzy = True
        case _, "list" if vr != "PN":
            made, is_fuzzy = f"{value}\\{other}", False
        case _:
            texts = {
                "upper": value.upper(),
                "lower": value.lower(),
                "first half*": f"{value[:half]}*",
                "*last half": f"*{value[half:]}",
                "*middle*": f"*{value[half : half + 2]}*",
                "a ? for a letter": f"{value[:half]}?{value[half + 1 :]}",
                "*": "*",
                "decomposed": unicodedata.normalize("NFD", value),
                "one group": value.split("=")[half % (value.count("=") + 1)],
                "bare": value.translate(_BARE),
            }
            made, is_fuzzy = texts.get(change, ""), False
    is_meaningful = any(each.isalnum() or each in "*?#%-" for each in made) and made.strip(" ^=\\") != ""
    if not is_meaningful or (is_fuzzy and ('"' in made or not any(each.isalnum() for each in made))):
        return None
    return made, is_fuzzy


ROW_FIELDS = "0020000D,0020000E,00080018,00201206,00201208,00201209,00080061,00100020"
"""What must be included for `row_of` to find it at every route."""


def is_date(text: str) -> bool:
    return "." not in text and date(text) is not None


def is_time(text: str) -> bool:
    return ":" not in text and moment(text) is not None


def is_integer(text: str) -> bool:
    return integer(text) is not None


def row_of(level: str, result: dict[str, Any]) -> Row:
    """What a result of the unversioned root says."""

    def value(tag: str) -> Any:
        return (result.get(tag, {}).get("Value") or [None])[0]

    uids = [value(tag) for tag in ("0020000D", "0020000E", "00080018")[: LEVELS.index(level) + 1]]
    return Row(
        tuple(uids),
        value("00201206"),
        value("00201208"),
        value("00201209") if level != STUDY else None,
        tuple(result["00080061"].get("Value", ())),
        "\\".join(each or "" for each in result.get("00100020", {}).get("Value", ())),
    )


# Files


def file_of(instance: Instance) -> bytes:
    """Part 10, explicit VR little endian, text as UTF-8: with whatever values the instance has."""
    elements = {ATTRIBUTES[keyword].tag: (ATTRIBUTES[keyword].vr, text) for keyword, text in instance.values.items()}
    elements |= {
        "00080005": ("CS", "ISO_IR 192"),
        "0020000D": ("UI", instance.study),
        "0020000E": ("UI", instance.series),
        "00080018": ("UI", instance.sop),
    }
    elements.setdefault("00080016", ("UI", CLASSES[0]))
    elements.setdefault("00100020", ("LO", ""))
    content = {tag: _element(tag, vr, _padded(text, vr)) for tag, (vr, text) in elements.items()}
    if instance.requests:
        items = b""
        for step, procedure in instance.requests:
            item = _element("00400009", "SH", _padded(step, "SH")) + _element(
                "00401001", "SH", _padded(procedure, "SH")
            )
            items += struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item
        content["00400275"] = _element("00400275", "SQ", items)
    syntax = _element("00020010", "UI", b"1.2.840.10008.1.2.1\0")
    meta = _element("00020000", "UL", struct.pack("<L", len(syntax))) + syntax
    return bytes(128) + b"DICM" + meta + b"".join(content[tag] for tag in sorted(content))


def _padded(text: str, vr: str) -> bytes:
    value = text.encode()
    return value + (b"\0" if vr == "UI" else b" ") * (len(value) % 2)


def _element(tag: str, vr: str, value: bytes) -> bytes:
    length = struct.pack("<2xL" if vr == "SQ" else "<H", len(value))
    return struct.pack("<HH", int(tag[:4], 16), int(tag[4:], 16)) + vr.encode() + length + value
