"""The parameters of a search (QIDO-RS, PS3.18 section 8.3.4): from their text to a query, or an error that says which
parameter is wrong and why.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicom_depot.domain.errors import InvalidIdentifier, InvalidRequest
from dicom_depot.domain.identifiers import SeriesRef, StudyRef, parse_uid
from dicom_depot.domain.matching import (
    TIME_VRS,
    date_form,
    date_time_form,
    folded,
    folded_name,
    form_of,
    time_form,
    words_of,
)
from dicom_depot.domain.query_tags import QueryTag, TagStatus
from dicom_depot.domain.search import (
    SEARCHABLE,
    SERIES_UID,
    STUDY_UID,
    Attribute,
    Between,
    Condition,
    Exactly,
    Held,
    Level,
    Match,
    Pattern,
    SearchQuery,
    Words,
)

LIMIT_DEFAULT = 100
LIMIT_MAX = 200
OFFSET_MAX = 2**31 - 1
VALUES_MAX = 1000
"""How many values one parameter may list."""

TagPath = tuple[int, ...]
"""An attribute by its tag, behind those of the sequences that it stands in."""

Extended = Mapping[int, QueryTag]
"""The extended query tags, by their tags."""

_TEXT_VRS = frozenset({"AE", "AS", "CS", "LO", "PN", "SH"})
_BY_PATH: dict[TagPath, Attribute] = {
    ((each.tag,) if each.parent is None else (each.parent, each.tag)): each for each in SEARCHABLE
}
_TAG = re.compile(r"[0-9A-Fa-f]{8}", re.ASCII)
_NUMBER = re.compile(r"[+-]?[0-9]{1,12}", re.ASCII)
_DASHED_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_KEYWORDS = {attribute.keyword.lower(): attribute.keyword for attribute in SEARCHABLE}


@dataclass(frozen=True, slots=True)
class SearchResource:
    """What a search asks for: studies, series or instances, of all studies, of one study or of one series."""

    level: Level
    scope: StudyRef | SeriesRef | None = None

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels from below the scope down to what is asked for: their attributes are searched and answered."""
        order = (Level.STUDY, Level.SERIES, Level.INSTANCE)
        first = {type(None): 0, StudyRef: 1, SeriesRef: 2}[type(self.scope)]
        return order[first : order.index(self.level) + 1]

    def conditions(self) -> list[Condition]:
        """That what is found lies within the scope."""
        match self.scope:
            case None:
                return []
            case StudyRef(study):
                return [Condition(STUDY_UID, Exactly((study,)))]
            case SeriesRef(study, series):
                return [Condition(STUDY_UID, Exactly((study,))), Condition(SERIES_UID, Exactly((series,)))]


@dataclass(frozen=True, slots=True)
class Search:
    """A search as it was asked for. `matched` are the attributes that it names, which are answered too."""

    resource: SearchResource
    query: SearchQuery
    limit: int = LIMIT_DEFAULT
    offset: int = 0
    matched: tuple[TagPath, ...] = ()
    included: tuple[TagPath, ...] = ()
    includes_all: bool = False


def parse_search(parameters: Iterable[tuple[str, str]], resource: SearchResource, extended: Extended) -> Search:
    """Read the parameters of a search's URL. Raises InvalidRequest with the parameter's name as its target."""
    filters: list[tuple[str, str]] = []
    included: list[str] = []
    settings: dict[str, str] = {}
    for name, value in parameters:
        match name.lower():
            case "includefield":
                included += value.split(",")
            case "limit" | "offset" | "fuzzymatching" as setting:
                if setting in settings:
                    raise InvalidRequest(f"The parameter {setting} must be given once.", target=setting)
                settings[setting] = value
            case _:
                filters.append((name, value))
    is_fuzzy = _boolean(settings.get("fuzzymatching", "false"), "fuzzymatching")
    conditions, matched = parse_filters(filters, resource.levels, extended, is_fuzzy=is_fuzzy)
    paths, includes_all = _included(included)
    return Search(
        resource,
        SearchQuery(resource.level, (*resource.conditions(), *conditions)),
        _number(settings.get("limit"), "limit", 1, LIMIT_MAX, LIMIT_DEFAULT),
        _number(settings.get("offset"), "offset", 0, OFFSET_MAX, 0),
        matched,
        paths,
        includes_all,
    )


def parse_filters(
    filters: Iterable[tuple[str, str]], levels: Sequence[Level], extended: Extended, *, is_fuzzy: bool = False
) -> tuple[tuple[Condition, ...], tuple[TagPath, ...]]:
    """Attributes and what they must match, as they stand in a query. Raises InvalidRequest."""
    conditions: list[Condition] = []
    matched: dict[TagPath, str] = {}
    for name, value in filters:
        path = tag_path(name)
        attribute = _BY_PATH.get(path) or (_extended(name, extended.get(path[0])) if len(path) == 1 else None)
        if attribute is None or attribute.level not in levels:
            raise InvalidRequest(_not_searchable(name, attribute, levels), target=name[:200])
        if path in matched:
            raise InvalidRequest(
                f"The attribute {attribute.name} is given twice ({matched[path]}, {name}); keep one.", target=name
            )
        matched[path] = name
        match = _match(attribute, name, value, is_fuzzy=is_fuzzy)
        if match is not None:
            conditions.append(Condition(attribute, match))
    return tuple(conditions), tuple(matched)


def _extended(name: str, tag: QueryTag | None) -> Attribute | None:
    if tag is None:
        return None
    if tag.status is not TagStatus.READY:
        raise InvalidRequest(
            f"The extended query tag {tag.path} is still being added by operation {tag.operation_id}.", target=name
        )
    if not tag.is_enabled:
        raise InvalidRequest(
            f"The extended query tag {tag.path} is disabled: {tag.error_count} instances could not be indexed by it. "
            "Enable it to search without them.",
            target=name,
        )
    return tag.attribute


def tag_path(name: str) -> TagPath:
    """The tags that a name stands for: eight hexadecimal digits or a keyword, behind sequences and a dot each.

    Raises InvalidRequest.
    """
    parts = name.split(".", 9)
    tags = tuple(_tag(part, name) for part in parts)
    for part, tag in zip(parts[:-1], tags, strict=False):
        if not tag >> 16 & 1 and dictionary_VR(tag) != "SQ":
            raise InvalidRequest(f"{_shown(part)} in {_shown(name)} is no sequence.", target=name[:200])
    return tags


def _tag(part: str, name: str) -> int:
    if _TAG.fullmatch(part):
        tag = int(part, 16)
        if tag >> 16 & 1 or _is_in_dictionary(tag):
            return tag
        raise InvalidRequest(f"{_shown(part)} is the tag of no attribute of PS3.6.", target=name[:200])
    found = tag_for_keyword(part) if part else None  # attributes without a keyword all have the empty one
    if found is not None:
        return int(found)
    near = _KEYWORDS.get(part.lower())
    if near is None and len(part) <= 64:
        near = next(iter(difflib.get_close_matches(part, _KEYWORDS.values(), n=1, cutoff=0.8)), None)
    hint = f" Did you mean {near}?" if near else ""
    raise InvalidRequest(
        f"{_shown(part)} is no attribute: name one by its keyword, whose letter case matters, or by its tag as eight "
        f"hexadecimal digits.{hint}",
        target=name[:200],
    )


def _is_in_dictionary(tag: int) -> bool:
    try:
        dictionary_VR(tag)
    except KeyError:
        return False
    return True


def _not_searchable(name: str, attribute: Attribute | None, levels: Sequence[Level]) -> str:
    known = ", ".join(each.name for each in SEARCHABLE if each.level in levels)
    if attribute is None:
        return (
            f"The attribute {_shown(name)} cannot be searched. Searched are: {known}; others when they are extended "
            "query tags that are ready and enabled."
        )
    place = " and ".join(levels) if levels else "this"
    return (
        f"The attribute {attribute.name} belongs to the {attribute.level}; this search takes attributes of {place}: "
        f"{known}. Keywords are case-sensitive."
    )


def _match(attribute: Attribute, name: str, value: str, *, is_fuzzy: bool) -> Match | None:
    """What the value asks for; None where everything matches (PS3.4 section C.2.2.2.3)."""
    value = value.strip(" ")
    vr = attribute.vr
    if not value:
        raise InvalidRequest(f"{name}: the value is empty. Leave the parameter out to match everything.", target=name)
    if vr == "UI":
        return Exactly(_uids(name, value))
    if vr in TIME_VRS:
        return _moment(vr, name, value)
    if vr == "PN" and is_fuzzy:
        return _words(name, value)
    if vr in _TEXT_VRS and value.strip("*") == "":
        return None
    form = folded_name(value) if vr == "PN" else folded(value)
    if vr in _TEXT_VRS and ("*" in form or "?" in form):
        return Pattern(re.sub(r"\*+", "*", form))
    # No text holds a backslash and no code string a comma: viewers list modalities with either.
    if vr in _TEXT_VRS and ("\\" in form or (vr == "CS" and "," in form)):
        parts = re.split(r"[,\\]" if vr == "CS" else r"\\", value, maxsplit=VALUES_MAX)
        if len(parts) > VALUES_MAX:
            raise InvalidRequest(f"{name}: at most {VALUES_MAX} values can be listed.", target=name)
        forms = [form_of(vr, part) for part in parts]
        return Exactly(tuple(each for each in forms if each is not None))
    exact = form_of(vr, value)
    if exact is None:
        raise InvalidRequest(f"{name}: the value is no {_KINDS.get(vr, vr)}.", target=name)
    return Exactly((exact if attribute.held is Held.COLUMN else str(exact),))


_KINDS = dict.fromkeys(("IS", "SL", "SS", "UL", "US"), "whole number") | dict.fromkeys(("FD", "FL"), "number")


def _uids(name: str, value: str) -> tuple[str, ...]:
    texts = re.split(r"[,\\]", value, maxsplit=VALUES_MAX)
    if len(texts) > VALUES_MAX:
        raise InvalidRequest(f"{name}: at most {VALUES_MAX} UIDs can be listed.", target=name)
    try:
        return tuple(dict.fromkeys(parse_uid(text.strip()) for text in texts))
    except InvalidIdentifier as error:
        raise InvalidRequest(f"{name}: {error.message} UIDs are separated by commas.", target=name) from None


def _words(name: str, value: str) -> Words:
    if '"' in value:
        raise InvalidRequest(f"{name}: a quotation mark cannot be matched fuzzily.", target=name)
    words = words_of(folded_name(value.replace("*", " ").replace("?", " ")))
    if not words:
        raise InvalidRequest(f"{name}: the value has no word to be matched fuzzily.", target=name)
    return Words(tuple(dict.fromkeys(words)))


def _moment(vr: str, name: str, value: str) -> Match:
    """A moment, or a range of them. A moment with less precision than the VR has room for stands for all within it."""
    low, dash, high = value.partition("-")
    if not dash:
        first, last = _ends(vr, name, value)
        return Exactly((first,)) if first == last else Between(first, last)
    if "-" in high:
        if vr != "TM" and _DASHED_DATE.match(value):
            raise InvalidRequest(f"{name}: dates are written without dashes, as 20240131.", target=name)
        reason = "write <from>-<to>, <from>- or -<to>" + (", without time zones" if vr == "DT" else "")
        raise InvalidRequest(f"{name}: the value has more than one '-': {reason}.", target=name)
    if not low.strip() and not high.strip():
        raise InvalidRequest(f"{name}: the range has no end; write <from>-<to>, <from>- or -<to>.", target=name)
    first_of_low = _ends(vr, name, low.strip())[0] if low.strip() else None
    last_of_high = _ends(vr, name, high.strip())[1] if high.strip() else None
    if first_of_low is not None and last_of_high is not None and first_of_low > last_of_high:
        raise InvalidRequest(f"{name}: the range ends before it begins.", target=name)
    return Between(first_of_low, last_of_high)


_MOMENTS = {
    "DA": "date (YYYYMMDD)",
    "TM": "time (HH, HHMM, HHMMSS or HHMMSS.FFFFFF)",
    "DT": "date and time (YYYY to YYYYMMDDHHMMSS.FFFFFF, without time zone)",
}


def _ends(vr: str, name: str, text: str) -> tuple[str, str]:
    """The first and the last moment that a text stands for."""
    ends: tuple[str | None, str | None]
    match vr:
        case "DA":
            ends = (date_form(text), date_form(text)) if _is_date(text) else (None, None)
        case "TM":
            ends = time_form(text), time_form(text, "9")
        case _:
            ends = (None, None) if "+" in text else (date_time_form(text), date_time_form(text, "9"))
    first, last = ends
    if first is None or last is None or ":" in text:
        raise InvalidRequest(f"{name}: {_shown(text)} is no {_MOMENTS[vr]}.", target=name)
    return first, last


def _is_date(text: str) -> bool:
    if len(text) != 8 or not (text.isascii() and text.isdecimal()):
        return False
    return 1 <= int(text[4:6]) <= 12 and 1 <= int(text[6:]) <= 31


def _included(names: Sequence[str]) -> tuple[tuple[TagPath, ...], bool]:
    if any(name.strip().lower() == "all" for name in names):
        if len(names) > 1:
            raise InvalidRequest(
                "includefield: 'all' stands alone; leave the other attributes out.", target="includefield"
            )
        return (), True
    paths: dict[TagPath, None] = {}
    for name in names:
        try:
            paths[tag_path(name.strip())] = None
        except InvalidRequest as error:
            raise InvalidRequest(f"includefield: {error.message}", target="includefield") from None
    return tuple(paths), False


def _number(text: str | None, name: str, lowest: int, highest: int, default: int) -> int:
    if text is None:
        return default
    if not _NUMBER.fullmatch(text.strip()) or not lowest <= int(text) <= highest:
        raise InvalidRequest(
            f"{name.capitalize()}: {_shown(text)} is no whole number from {lowest} to {highest}.", target=name
        )
    return int(text)


def _boolean(text: str, name: str) -> bool:
    match text.strip().lower():
        case "true":
            return True
        case "false":
            return False
    raise InvalidRequest(f"{name} must be true or false, not {_shown(text)}.", target=name)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:77] + "...")
