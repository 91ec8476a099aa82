"""Study, series and instance identifiers: the only way from text to a UID. Nothing here knows storage or HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from dicom_depot.domain.errors import InvalidIdentifier

Uid = NewType("Uid", str)
"""A DICOM unique identifier (PS3.5 section 9.1), in the relaxed form that archives hold; see `parse_uid`."""

UID_LENGTH_MAX = 64

_UID = re.compile(r"[0-9.]{0,63}[0-9]", re.ASCII)


def parse_uid(text: str) -> Uid:
    """Return the UID in `text`, without its trailing padding.

    Real archives hold UIDs with leading zeros and empty components, so the rule is looser than PS3.5: trailing
    spaces and NULs are removed, then 1 to 64 digits and dots must remain, ending in a digit.

    Raises InvalidIdentifier that names what is wrong.
    """
    uid = text.rstrip(" \0")
    if _UID.fullmatch(uid):
        return Uid(uid)
    if not uid:
        reason = "it is empty"
    elif len(uid) > UID_LENGTH_MAX:
        reason = f"it has {len(uid)} characters; {UID_LENGTH_MAX} are allowed"
    elif uid.endswith(".") and _UID.fullmatch(uid[:-1]):
        reason = "it ends in a dot; it must end in a digit"
    else:
        reason = "it must hold digits and dots only and end in a digit"
    raise InvalidIdentifier(f"{_shown(uid)} is not a UID: {reason}.")


@dataclass(frozen=True, slots=True)
class StudyRef:
    """Points at a study, whether or not it is stored."""

    study_uid: Uid

    def __str__(self) -> str:
        return self.study_uid


@dataclass(frozen=True, slots=True)
class SeriesRef:
    """Points at a series."""

    study_uid: Uid
    series_uid: Uid

    def __str__(self) -> str:
        return f"{self.study_uid}/{self.series_uid}"


@dataclass(frozen=True, slots=True)
class InstanceRef:
    """Points at a SOP instance."""

    study_uid: Uid
    series_uid: Uid
    sop_instance_uid: Uid

    def __str__(self) -> str:
        return f"{self.study_uid}/{self.series_uid}/{self.sop_instance_uid}"


Ref = StudyRef | SeriesRef | InstanceRef


def parse_identifier(text: str) -> Ref:
    """Read `<study>[/<series>[/<instance>]]`. White space around a part is ignored.

    Raises InvalidIdentifier whose message holds the offending text (shortened) and the reason.
    """
    parts = text.split("/", 4)
    if len(parts) > 3:
        raise InvalidIdentifier(
            f"{_shown(text)} has more than three parts; the form is <study>[/<series>[/<instance>]]."
        )
    try:
        uids = [parse_uid(part.strip()) for part in parts]
    except InvalidIdentifier as error:
        if len(parts) == 1:
            raise
        raise InvalidIdentifier(f"{_shown(text)}: {error.message}") from None
    match uids:
        case [study]:
            return StudyRef(study)
        case [study, series]:
            return SeriesRef(study, series)
        case _:
            return InstanceRef(uids[0], uids[1], uids[2])


def parent_refs(ref: Ref) -> tuple[Ref, ...]:
    """The study and series that contain `ref`, without `ref` itself."""
    match ref:
        case StudyRef():
            return ()
        case SeriesRef(study, _):
            return (StudyRef(study),)
        case InstanceRef(study, series, _):
            return (StudyRef(study), SeriesRef(study, series))


def _shown(text: str) -> str:
    """Quote caller's text for a message: printable and short, so that it cannot flood or forge a log."""
    quoted = ascii(text[:81])
    return quoted if len(quoted) <= 82 else quoted[:78] + "...'"
