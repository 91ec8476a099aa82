"""Reading request bodies: bounded while they arrive, strict JSON, members in any letter case, nothing unknown.

An export without a `source` exports everything. That is why an unknown member is an error here and not ignored: a
misspelt `sources` must never export an archive.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from starlette.requests import ClientDisconnect, Request

from dicom_depot.codec.qido import Extended, SearchResource, parse_filters
from dicom_depot.codec.query_tags import new_query_tag
from dicom_depot.domain.errors import InvalidIdentifier, InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from dicom_depot.domain.export import DestinationSpec, Everything, Listed, Matching, Source
from dicom_depot.domain.identifiers import Ref, parse_identifier
from dicom_depot.domain.query_tags import TAGS_MAX, NewQueryTag
from dicom_depot.domain.search import Level
from dicom_depot.ports import DestinationFactory

_DESTINATION_MEMBERS: Mapping[str, Mapping[str, type]] = {
    "azureBlob": {
        "blobContainerUri": str,
        "connectionString": str,
        "blobContainerName": str,
        "useManagedIdentity": bool,
    },
    "file": {"folder": str},
}
_SOURCE_TYPES = ("identifiers", "query")
_SETTING_LENGTH_MAX = 8192
_FILTER_LENGTH_MAX = 65_536
"""A thousand UIDs."""
_TARGET_LENGTH_MAX = 200
_NAME_LENGTH_MAX = 256
_NAME_LENGTH_SHOWN = 60
_STATUSES: tuple[Literal["On"], Literal["Off"]] = ("On", "Off")


async def read_optional_body(request: Request, bytes_max: int) -> bytes:
    """As `read_body`; without a body its content type does not matter."""
    if "transfer-encoding" not in request.headers and request.headers.get("content-length", "0").strip() == "0":
        return b""
    return await read_body(request, bytes_max)


async def read_body(request: Request, bytes_max: int) -> bytes:
    """The body, never more than `bytes_max` of it. Raises UnsupportedMediaType, PayloadTooLarge."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaType("The body must be sent as Content-Type: application/json.", target="Content-Type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("The body must be sent uncompressed.", target="Content-Encoding")
    too_large = PayloadTooLarge(
        f"The body is larger than {bytes_max} bytes (DICOM_DEPOT_MAX_BODY_BYTES). "
        "Name studies instead of their instances, or split the export.",
        target="body",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > bytes_max:
        raise too_large
    blocks: list[bytes] = []
    size = 0
    try:
        async for block in request.stream():
            size += len(block)
            if size > bytes_max:
                raise too_large
            blocks.append(block)
    except ClientDisconnect:
        raise InvalidRequest("The client went away before the body was complete.", target="body") from None
    return b"".join(blocks)


def parse_json(body: bytes) -> Any:
    """Strict JSON (RFC 8259, UTF-8). Raises InvalidRequest with line and column."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_repetition)
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not UTF-8.", target="body") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            target="body",
        ) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.", target="body") from None
    except ValueError as error:
        raise InvalidRequest(f"The body is not acceptable as JSON: {error}.", target="body") from None


def parse_source(body: Any, identifiers_max: int, extended: Callable[[], Extended]) -> Source:
    """What to export: everything, when the body has no `source`. `extended` is asked where there is a query.

    The number of identifiers is checked here too, before any of them is read and before the destination is looked at.
    """
    top = _members(body, "", ("source", "destination"))
    if "source" not in top:
        return Everything()
    source = _members(top["source"], "source", ("type", "settings"))
    type_ = _type(source, "source", _SOURCE_TYPES)
    settings = _required(source, "source", "settings")
    return _query(settings, extended()) if type_ == "query" else _listed(settings, identifiers_max)


def _listed(value: Any, identifiers_max: int) -> Listed:
    settings = _members(value, "source.settings", ("values",))
    place = "source.settings.values"
    values = _required(settings, "source.settings", "values")
    if not isinstance(values, list):
        raise InvalidRequest(f"{place} must be a list of identifiers, not {_kind(values)}.", target=place)
    if not values:
        raise InvalidRequest(
            f"{place} is empty. Name at least one study, series or instance, or leave `source` out for everything.",
            target=place,
        )
    if len(values) > identifiers_max:
        raise InvalidRequest(
            f"{place} has {len(values)} entries; at most {identifiers_max} are allowed (DICOM_DEPOT_MAX_IDENTIFIERS). "
            "Split the list, or name studies instead of their instances.",
            target=place,
        )
    return Listed(tuple(_identifier(value, f"{place}[{number}]") for number, value in enumerate(values)))


def _query(value: Any, extended: Extended) -> Matching:
    """A query whose filters are those of a search, and are understood. One that restricts nothing is refused: it would
    be an export of everything.
    """
    settings = _members(value, "source.settings", ("level", "filters", "fuzzymatching"))
    level = Level(_word(settings, "source.settings", "level", tuple(Level)))
    is_fuzzy = settings.get("fuzzymatching", False)
    if not isinstance(is_fuzzy, bool):
        place = "source.settings.fuzzymatching"
        raise InvalidRequest(f"{place} must be true or false, not {_kind(is_fuzzy)}.", target=place)
    place = "source.settings.filters"
    filters = _required(settings, "source.settings", "filters")
    if not isinstance(filters, dict):
        raise InvalidRequest(
            f"{place} must be an object of attributes and the values that they must match, not {_kind(filters)}.",
            target=place,
        )
    for name, text in filters.items():
        where = f"{place}.{name}"[:_TARGET_LENGTH_MAX]
        if not isinstance(text, str):
            raise InvalidRequest(f"{where} must be a string, not {_kind(text)}.", target=where)
        if len(text) > _FILTER_LENGTH_MAX:
            raise InvalidRequest(
                f"{where} has {len(text)} characters; at most {_FILTER_LENGTH_MAX} are allowed.", target=where
            )
        if not _is_text(text):
            raise InvalidRequest(f"{where} holds a control character or half of a surrogate pair.", target=where)
    try:
        conditions, _ = parse_filters(filters.items(), SearchResource(level).levels, extended, is_fuzzy=is_fuzzy)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, target=f"{place}.{error.target}"[:_TARGET_LENGTH_MAX]) from None
    if not conditions:
        raise InvalidRequest(
            f"{place} has no filter that restricts anything. Name at least one, or leave `source` out for everything.",
            target=place,
        )
    return Matching(level, filters, is_fuzzy)


def parse_resume(body: bytes, destinations: DestinationFactory) -> DestinationSpec | None:
    """The destination of a request to resume; None when it has none. A `source` is not known here: what is exported
    was decided when the operation was created.
    """
    content = parse_json(body) if body else {}
    members = ("destination",)
    return parse_destination(content, destinations, members) if _members(content, "", members) else None


def parse_destination(
    body: Any, destinations: DestinationFactory, members: Sequence[str] = ("source", "destination")
) -> DestinationSpec:
    """The destination, checked against the service's settings but not yet reached. `members` are the body's."""
    top = _members(body, "", members)
    destination = _members(_required(top, "", "destination"), "destination", ("type", "settings"))
    type_ = _type(destination, "destination", tuple(_DESTINATION_MEMBERS))
    kinds = _DESTINATION_MEMBERS[type_]
    place = "destination.settings"
    settings = _members(_required(destination, "destination", "settings"), place, tuple(kinds))
    for name, value in settings.items():
        if value is not None and not isinstance(value, kinds[name]):
            wanted = "true or false" if kinds[name] is bool else "a string"
            raise InvalidRequest(f"{place}.{name} must be {wanted}, not {_kind(value)}.", target=f"{place}.{name}")
        if isinstance(value, str) and len(value) > _SETTING_LENGTH_MAX:
            raise InvalidRequest(
                f"{place}.{name} has {len(value)} characters; at most {_SETTING_LENGTH_MAX} are allowed.",
                target=f"{place}.{name}",
            )
        if isinstance(value, str) and not _is_text(value):
            raise InvalidRequest(
                f"{place}.{name} holds a control character or half of a surrogate pair.", target=f"{place}.{name}"
            )
    return destinations.parse(type_, {name: value for name, value in settings.items() if value is not None})


def parse_status(body: Any) -> Literal["On", "Off"]:
    """The wanted position of a switch: `{"status": "On"}`."""
    members = _members(body, "", ("status",))
    wanted = _required(members, "", "status")
    for status in _STATUSES:
        if isinstance(wanted, str) and wanted.lower() == status.lower():
            return status
    raise InvalidRequest("'status' must be 'On' or 'Off'.", target="status")


def parse_query_tags(body: Any) -> list[NewQueryTag]:
    """The extended query tags of a request to add some: `[{"path", "level", "vr"?, "privateCreator"?}]`."""
    if not isinstance(body, list):
        raise InvalidRequest(f"The body must be a list of extended query tags, not {_kind(body)}.", target="body")
    if not 0 < len(body) <= TAGS_MAX:
        raise InvalidRequest(f"The body must name 1 to {TAGS_MAX} extended query tags.", target="body")
    found: dict[int, NewQueryTag] = {}
    for number, entry in enumerate(body):
        place = f"[{number}]"
        members = _members(entry, place, ("path", "vr", "privateCreator", "level"))
        texts: dict[str, str | None] = {"vr": None, "privateCreator": None}
        for name in ("path", "level"):
            _required(members, place, name)
        for name, value in members.items():
            if value is not None and not isinstance(value, str):
                raise InvalidRequest(f"{place}.{name} must be a string, not {_kind(value)}.", target=f"{place}.{name}")
            texts[name] = value
        try:
            tag = new_query_tag(str(texts["path"]), texts["vr"], texts["privateCreator"], str(texts["level"]))
        except InvalidRequest as error:
            raise InvalidRequest(f"{place}.{error.target}: {error.message}", target=f"{place}.{error.target}") from None
        if tag.tag in found:
            raise InvalidRequest(
                f"{place}.path: {tag.path} stands twice in the body; keep one.", target=f"{place}.path"
            )
        found[tag.tag] = tag
    return list(found.values())


def parse_query_status(body: Any) -> bool:
    """Whether searches may name the tag: `{"queryStatus": "enabled"}`."""
    wanted = _required(_members(body, "", ("queryStatus",)), "", "queryStatus")
    for status, is_enabled in (("enabled", True), ("disabled", False)):
        if isinstance(wanted, str) and wanted.lower() == status:
            return is_enabled
    raise InvalidRequest("'queryStatus' must be 'enabled' or 'disabled'.", target="queryStatus")


def _identifier(value: Any, place: str) -> Ref:
    if not isinstance(value, str):
        raise InvalidIdentifier(f"{place} must be a string, not {_kind(value)}.", target=place)
    try:
        return parse_identifier(value)
    except InvalidIdentifier as error:
        raise InvalidIdentifier(f"{place}: {error.message}", target=place) from None


def _members(value: Any, place: str, known: Sequence[str]) -> dict[str, Any]:
    """The members of an object under their proper names, whatever the letter case they were sent in."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place or 'The body'} must be an object, not {_kind(value)}.", target=place or "body")
    proper = {name.lower(): name for name in known}
    found: dict[str, Any] = {}
    for name, content in value.items():
        where = f"{place}.{name}" if place else name
        canonical = proper.get(name.lower())
        if canonical is None:
            raise InvalidRequest(f"{_unknown(name, proper, place)}", target=where[:200])
        if canonical in found:
            raise InvalidRequest(f"'{canonical}' stands twice in {place or 'the body'}; keep one.", target=where)
        found[canonical] = content
    return found


def _unknown(name: str, proper: Mapping[str, str], place: str) -> str:
    is_short = len(name) <= _NAME_LENGTH_SHOWN  # comparing takes time that grows with the square of the length
    near = difflib.get_close_matches(name.lower(), proper, n=1, cutoff=0.5) if is_short else []
    hint = f"Did you mean '{proper[near[0]]}'?" if near else f"Known members: {', '.join(proper.values())}."
    shown = ascii(name if is_short else name[: _NAME_LENGTH_SHOWN - 3] + "...")
    return f"{shown} is not a member of {place or 'the body'}. {hint}"


def _is_text(value: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value)


def _required(members: Mapping[str, Any], place: str, name: str) -> Any:
    where = f"{place}.{name}" if place else name
    if members.get(name) is None:
        raise InvalidRequest(f"'{where}' is required.", target=where)
    return members[name]


def _type(members: Mapping[str, Any], place: str, known: Sequence[str]) -> str:
    return _word(members, place, "type", known)


def _word(members: Mapping[str, Any], place: str, name: str, known: Sequence[str]) -> str:
    """One of the words that are known, in any letter case."""
    value = _required(members, place, name)
    where = f"{place}.{name}"
    if not isinstance(value, str):
        raise InvalidRequest(f"'{where}' must be a string, not {_kind(value)}.", target=where)
    for word in known:
        if word.lower() == value.lower():
            return word
    raise InvalidRequest(f"'{where}' must be one of: {', '.join(sorted(known))}.", target=where)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a name twice and then the last one wins silently; here it is an error, in any letter case."""
    members: dict[str, Any] = {}
    seen: set[str] = set()
    for name, value in pairs:
        if len(name) > _NAME_LENGTH_MAX:
            raise ValueError(f"a member name has {len(name)} characters; at most {_NAME_LENGTH_MAX} are allowed")
        if not _is_text(name):
            raise ValueError(
                f"the member name {name[:_NAME_LENGTH_SHOWN]!a} holds a control character or half of a surrogate pair"
            )
        if name.lower() in seen:
            raise ValueError(f"the member {name[:_NAME_LENGTH_SHOWN]!a} stands twice in one object")
        seen.add(name.lower())
        members[name] = value
    return members
