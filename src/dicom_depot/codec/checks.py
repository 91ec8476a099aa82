"""Which attributes of an instance break the rules for values, and whether that keeps it from being stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from dicom_depot.codec.part10 import RawValue
from dicom_depot.codec.vr import Encodings, choices_of, violation
from dicom_depot.domain.instance import InstanceHeader
from dicom_depot.domain.search import TOP_ATTRIBUTES

PATIENT_ID = 0x00100020


class Check(Enum):
    """Which values are held against the rules."""

    NOTHING = auto()
    INDEXED = auto()
    """The attributes of the index, by the minimum rules of version 1 of the API; each violation is fatal."""
    ALL = auto()
    """Every value; one that breaks a rule is left out of JSON and index, and only a bad Patient ID may be fatal."""


@dataclass(frozen=True, slots=True)
class Violation:
    """An attribute that breaks a rule. `reason` holds no value. `is_fatal`: the instance must not be stored for it.
    `is_nested`: it stands in a sequence's item.
    """

    tag: int
    reason: str
    is_fatal: bool = False
    is_nested: bool = False

    def __str__(self) -> str:
        return f"({self.tag >> 16:04x},{self.tag & 0xFFFF:04x}) - {self.reason}"


def violations_of_indexed(captured: Mapping[int, RawValue], encodings: Encodings) -> list[Violation]:
    """The attributes of the index that break the minimum rules, or have another VR than PS3.6 gives them."""
    found: list[Violation] = []
    for attribute in TOP_ATTRIBUTES:
        tag = attribute.tag
        raw = captured.get(tag)
        if raw is None:
            continue
        if raw.vr is not None and raw.vr not in choices_of(tag):
            found.append(
                Violation(tag, f"{attribute.keyword} has VR {raw.vr}; it must be {attribute.vr}", is_fatal=True)
            )
        elif reason := violation(attribute.vr, raw.value, encodings, is_minimum=True):
            found.append(Violation(tag, f"{attribute.keyword}: {reason}", is_fatal=True))
    return found


def patient_id_violation(
    captured: Mapping[int, RawValue], header: InstanceHeader, *, is_strict: bool
) -> list[Violation]:
    """is_strict: an empty Patient ID is as bad as none."""
    if header.attributes["patient_id"] is not None:
        return []
    raw = captured.get(PATIENT_ID)
    if raw is None:
        return [Violation(PATIENT_ID, "PatientID is missing", is_fatal=True)]
    if not raw.value.strip(b" \0"):
        return [Violation(PATIENT_ID, "PatientID is empty", is_fatal=is_strict)]
    return []
