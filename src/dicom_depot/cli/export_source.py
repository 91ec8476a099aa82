"""What an export is about, from the command line: identifiers, a list of them, filters, or everything.

A filter's value is patient data: nothing here repeats one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicom_depot.codec.qido import tag_path
from dicom_depot.config import PREFIX
from dicom_depot.domain.errors import InvalidIdentifier, InvalidRequest
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.search import SEARCHABLE, Level

STDIN = "-"

_INSTANCE_TAGS = frozenset(attribute.tag for attribute in SEARCHABLE if attribute.level is Level.INSTANCE)


@dataclass(frozen=True, slots=True)
class Asked:
    """The options and arguments that say what to export, as they were given."""

    identifiers: Sequence[str] = ()
    list_file: str | None = None
    everything: bool = False
    filters: Sequence[str] = ()
    level: Level | None = None
    is_fuzzy: bool = False


def read_source(asked: Asked, *, is_stdin_taken: bool) -> dict[str, Any] | None:
    """The request's `source`; None for everything, which must be asked for. Raises InvalidRequest."""
    names_identifiers = bool(asked.identifiers) or asked.list_file is not None
    if asked.filters:
        if names_identifiers or asked.everything:
            raise InvalidRequest("Give either --where or identifiers (--from, --all), not both.")
        return {"type": "query", "settings": _query(asked)}
    if asked.level is not None or asked.is_fuzzy:
        raise InvalidRequest("--level and --fuzzy say how --where is meant: add --where NAME=VALUE.")
    if asked.everything:
        if names_identifiers:
            raise InvalidRequest("Give either identifiers or --all, not both.")
        return None
    if not names_identifiers:
        raise InvalidRequest(
            "Say what to export: identifiers (STUDY[/SERIES[/INSTANCE]]), --from FILE, --where NAME=VALUE, or --all. "
            "Nothing is exported by default, so that a forgotten argument does not copy a whole archive."
        )
    return listed_source(_read_identifiers(asked.identifiers, asked.list_file, is_stdin_taken=is_stdin_taken))


def listed_source(identifiers: Sequence[str]) -> dict[str, Any]:
    """The request's `source` for these identifiers."""
    return {"type": "identifiers", "settings": {"values": list(identifiers)}}


def _query(asked: Asked) -> dict[str, Any]:
    filters: dict[str, str] = {}
    for text in asked.filters:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name or not value.strip():
            raise InvalidRequest("--where takes an attribute and its value: --where Modality=CT")
        tag_path(name)
        if name.lower() in map(str.lower, filters):
            raise InvalidRequest(f"--where names {name} twice; keep one.")
        filters[name] = value
    level = asked.level or _level_of(filters)
    return {"level": level.value, "filters": filters} | ({"fuzzymatching": True} if asked.is_fuzzy else {})


def _level_of(names: Iterable[str]) -> Level:
    """The highest level that takes these attributes. What they ask of studies and series, whole series meet."""
    is_of_instances = any(len(path) == 1 and path[0] in _INSTANCE_TAGS for path in map(tag_path, names))
    return Level.INSTANCE if is_of_instances else Level.SERIES


def _read_identifiers(given: Sequence[str], list_file: str | None, *, is_stdin_taken: bool) -> list[str]:
    """The identifiers, checked."""
    named = [text for text in given if text != STDIN]
    reads_stdin = len(named) < len(given) or list_file == STDIN
    if reads_stdin and is_stdin_taken:
        raise InvalidRequest(
            f"Identifiers and --to cannot both come from standard input: set {PREFIX}EXPORT_TO, or put the identifiers "
            "into a file (--from FILE)."
        )
    for text in named:
        _check_identifier(text, "")
    if list_file is not None and list_file != STDIN:
        try:
            named += _parse_list(Path(list_file).read_text(encoding="utf-8").splitlines(), list_file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InvalidRequest(f"{list_file} cannot be read: {reason}.") from None
    if reads_stdin:
        named += _parse_list(sys.stdin, "standard input")
    if not named:
        raise InvalidRequest("The list has no identifiers. --all exports everything.")
    return named


def _parse_list(lines: Iterable[str], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            _check_identifier(text, f"{name}, line {number}: ")
            yield text


def _check_identifier(text: str, place: str) -> None:
    try:
        parse_identifier(text)
    except InvalidIdentifier as error:
        raise InvalidRequest(place + error.message) from None
