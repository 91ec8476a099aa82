"""The searchable attributes: one table from which the index columns and the codec's reading list are made.

Levels and keywords follow the DICOM service's QIDO-RS tables (PS3.18 section 10.6); tags and VRs follow PS3.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """A level of the query/retrieve information model (PS3.4 section C.6), below patient."""

    STUDY = "study"
    SERIES = "series"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute that the index holds. `column` is its name in the database, `tag` is group << 16 | element."""

    keyword: str
    tag: int
    vr: str
    level: Level
    column: str

    @property
    def is_integer(self) -> bool:
        """Held as an integer column (US, UL, IS); everything else is text."""
        return self.vr in ("US", "UL", "IS")


def _study(keyword: str, tag: int, vr: str, column: str) -> Attribute:
    return Attribute(keyword, tag, vr, Level.STUDY, column)


def _series(keyword: str, tag: int, vr: str, column: str) -> Attribute:
    return Attribute(keyword, tag, vr, Level.SERIES, column)


def _instance(keyword: str, tag: int, vr: str, column: str) -> Attribute:
    return Attribute(keyword, tag, vr, Level.INSTANCE, column)


ATTRIBUTES: tuple[Attribute, ...] = (
    _study("StudyDate", 0x00080020, "DA", "study_date"),
    _study("StudyTime", 0x00080030, "TM", "study_time"),
    _study("AccessionNumber", 0x00080050, "SH", "accession_number"),
    _study("ReferringPhysicianName", 0x00080090, "PN", "referring_physician_name"),
    _study("StudyDescription", 0x00081030, "LO", "study_description"),
    _study("PatientName", 0x00100010, "PN", "patient_name"),
    _study("PatientID", 0x00100020, "LO", "patient_id"),
    _study("PatientBirthDate", 0x00100030, "DA", "patient_birth_date"),
    _study("PatientSex", 0x00100040, "CS", "patient_sex"),
    _study("StudyID", 0x00200010, "SH", "dicom_study_id"),
    _series("Modality", 0x00080060, "CS", "modality"),
    _series("SeriesDescription", 0x0008103E, "LO", "series_description"),
    _series("ManufacturerModelName", 0x00081090, "LO", "manufacturer_model_name"),
    _series("SeriesNumber", 0x00200011, "IS", "series_number"),
    _series("PerformedProcedureStepStartDate", 0x00400244, "DA", "performed_procedure_step_start_date"),
    _series("PerformedProcedureStepStartTime", 0x00400245, "TM", "performed_procedure_step_start_time"),
    _instance("InstanceNumber", 0x00200013, "IS", "instance_number"),
    _instance("NumberOfFrames", 0x00280008, "IS", "number_of_frames"),
    _instance("Rows", 0x00280010, "US", "rows"),
    _instance("Columns", 0x00280011, "US", "columns"),
    _instance("BitsAllocated", 0x00280100, "US", "bits_allocated"),
)


def attributes_of(level: Level) -> tuple[Attribute, ...]:
    """The attributes that live at `level`, in table order."""
    return tuple(attribute for attribute in ATTRIBUTES if attribute.level is level)
