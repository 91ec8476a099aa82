"""From the DICOM JSON of an instance (PS3.18 annex F) to what the index searches in: the same columns as its header
gives, and the values of extended query tags.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from dicom_depot.codec.values import TEXT_CHARACTERS_MAX
from dicom_depot.codec.vr import violation
from dicom_depot.domain.instance import AttributeValues
from dicom_depot.domain.matching import form_of
from dicom_depot.domain.query_tags import NewQueryTag
from dicom_depot.domain.search import ATTRIBUTES, REQUEST_ATTRIBUTES, Attribute

_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_LINK_MARK = b"\x01"
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}(?:\.0*)?", re.ASCII)

DicomJson = Mapping[str, Mapping[str, Any]]


def loads(packed: bytes) -> dict[str, dict[str, Any]]:
    """The JSON object that is packed in `Metadata.dicom_json`, its links relative to the instance."""
    text = zlib.decompress(packed).replace(_LINK_MARK, b"")
    content: dict[str, dict[str, Any]] = json.loads(text, parse_float=_number)
    return content


def _number(text: str) -> float | str:
    """What is too large for a number stays text: JSON has no infinity."""
    number = float(text)
    return number if math.isfinite(number) else text


def columns_of(content: DicomJson) -> AttributeValues:
    """What `InstanceHeader.attributes` holds, read from JSON."""
    return {attribute.column: _column(attribute, content) for attribute in ATTRIBUTES}


def request_columns(member: str | None) -> AttributeValues:
    """The columns of what stands in RequestAttributesSequence, given as the text of its JSON member."""
    content = {} if member is None else {f"{REQUEST_ATTRIBUTES:08X}": json.loads(member.replace("\x01", ""))}
    return {each.column: _column(each, content) for each in ATTRIBUTES if each.parent is not None}


def texts_of(element: Mapping[str, Any] | None) -> list[str]:
    """The values of an element as text; empty ones and what is no text are left out."""
    values = (element or {}).get("Value", ())
    return [text for value in values if (text := _text(value))]


def _column(attribute: Attribute, content: DicomJson) -> str | int | None:
    if attribute.parent is None:
        element = content.get(f"{attribute.tag:08X}")
        if attribute.is_integer:
            return _integer(element)
        return _joined([_text(value) for value in (element or {}).get("Value", ())])
    found: dict[str, None] = {}
    for item in content.get(f"{attribute.parent:08X}", {}).get("Value", ()):
        if isinstance(item, dict):
            found |= dict.fromkeys(texts_of(item.get(f"{attribute.tag:08X}")))
    return _joined(found)


def _joined(texts: Iterable[str]) -> str | None:
    return "\\".join(texts)[:TEXT_CHARACTERS_MAX].rstrip(" ") or None


def _integer(element: Mapping[str, Any] | None) -> int | None:
    """Of the first value, as `codec.values.decode_integer` reads it."""
    first = next(iter((element or {}).get("Value", ())), None)
    if isinstance(first, int | float) and first == first // 1:
        number = int(first)
    elif isinstance(first, str) and _INTEGER.fullmatch(first):
        number = int(first.partition(".")[0])
    else:
        return None
    return number if -(2**63) <= number < 2**63 else None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        groups = [str(value.get(group, "")) for group in _GROUPS]
        value = "=".join(groups).rstrip("=")
    return "" if value is None else str(value).replace("\0", "").strip(" ")


def tag_values(tag: NewQueryTag, content: DicomJson) -> tuple[list[str], str | None]:
    """The values of an extended query tag, or why they cannot be indexed. The reason holds no value."""
    element = content.get(_place_of(tag, content) or "")
    if element is None:
        return [], None
    vr = str(element.get("vr", ""))
    if vr != tag.vr:
        return [], f"It has VR {vr}; the extended query tag has {tag.vr}."
    texts = texts_of(element)
    for text in texts:
        reason = violation(vr, text.encode(), ("utf8",), is_minimum=True) if vr in _TEXT_VRS else None
        if reason is not None or form_of(vr, text) is None:
            return [], f"Its value is none of VR {vr}: {reason or 'it cannot be read'}."
    return texts, None


_TEXT_VRS = frozenset({"AE", "AS", "CS", "LO", "PN", "SH", "UI"})


def _place_of(tag: NewQueryTag, content: DicomJson) -> str | None:
    """Where a tag stands. A private one stands in the block that its creator reserved (PS3.5 section 7.8.1)."""
    if tag.private_creator is None:
        return tag.path
    group = tag.tag >> 16
    for block in range(0x10, 0x100):
        if texts_of(content.get(f"{group:04X}00{block:02X}")) == [tag.private_creator]:
            return f"{group:04X}{block:02X}{tag.tag & 0xFF:02X}"
    return None
