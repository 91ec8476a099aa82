"""What can be searched for: the searchable attributes as one table, and a query as the index understands it.

The index columns, the codec's reading list and the rules of QIDO-RS are made from the table. Levels and keywords follow
the DICOM service's QIDO-RS tables and PS3.18 section 10.6; tags and VRs follow PS3.6. How values are brought into the
form in which they are compared is in `domain.matching`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from dicom_depot.domain.identifiers import InstanceRef


class Level(StrEnum):
    """A level of the query/retrieve information model (PS3.4 section C.6), below patient."""

    STUDY = "study"
    SERIES = "series"
    INSTANCE = "instance"


class Held(StrEnum):
    """Where the index holds the values of an attribute."""

    COLUMN = "column"
    """One value of a study, series or instance, beside its UID."""
    VALUES = "values"
    """Any number of values, each a row of its own."""
    COUNTED = "counted"
    """Nowhere: it follows from what lies below."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """One searchable attribute.

    `tag` is group << 16 | element; `parent` is the tag of the sequence that it stands in. `column` is its name in the
    database: of a column, or of its values.
    """

    keyword: str
    tag: int
    vr: str
    level: Level
    column: str
    parent: int | None = None
    held: Held = Held.COLUMN

    @property
    def is_integer(self) -> bool:
        """Held as an integer column (US, UL, IS); everything else is text."""
        return self.vr in ("US", "UL", "IS")

    @property
    def name(self) -> str:
        """As it stands in a query."""
        return self.keyword if self.parent is None else f"RequestAttributesSequence.{self.keyword}"


def _study(keyword: str, tag: int, vr: str, column: str) -> Attribute:
    held = Held.VALUES if vr == "PN" else Held.COLUMN
    return Attribute(keyword, tag, vr, Level.STUDY, column, held=held)


def _series(keyword: str, tag: int, vr: str, column: str) -> Attribute:
    return Attribute(keyword, tag, vr, Level.SERIES, column)


def _request(keyword: str, tag: int, vr: str, column: str) -> Attribute:
    return Attribute(keyword, tag, vr, Level.SERIES, column, parent=REQUEST_ATTRIBUTES, held=Held.VALUES)


def _instance(keyword: str, tag: int, vr: str, column: str) -> Attribute:
    return Attribute(keyword, tag, vr, Level.INSTANCE, column)


REQUEST_ATTRIBUTES = 0x00400275
"""RequestAttributesSequence: the one sequence whose items are searched by the standard's rules."""

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
    _request("ScheduledProcedureStepID", 0x00400009, "SH", "scheduled_procedure_step_id"),
    _request("RequestedProcedureID", 0x00401001, "SH", "requested_procedure_id"),
    _instance("InstanceNumber", 0x00200013, "IS", "instance_number"),
    _instance("NumberOfFrames", 0x00280008, "IS", "number_of_frames"),
    _instance("Rows", 0x00280010, "US", "rows"),
    _instance("Columns", 0x00280011, "US", "columns"),
    _instance("BitsAllocated", 0x00280100, "US", "bits_allocated"),
)
"""What an instance tells. All have a column, which is how a change is noticed, also where values are held apart."""

TOP_ATTRIBUTES = tuple(attribute for attribute in ATTRIBUTES if attribute.parent is None)
"""Those that stand in the data set itself and in no sequence."""

STUDY_UID = Attribute("StudyInstanceUID", 0x0020000D, "UI", Level.STUDY, "study_uid")
SERIES_UID = Attribute("SeriesInstanceUID", 0x0020000E, "UI", Level.SERIES, "series_uid")
INSTANCE_UID = Attribute("SOPInstanceUID", 0x00080018, "UI", Level.INSTANCE, "sop_instance_uid")
SOP_CLASS = Attribute("SOPClassUID", 0x00080016, "UI", Level.INSTANCE, "sop_class_uid")

MODALITIES_IN_STUDY = Attribute(
    "ModalitiesInStudy", 0x00080061, "CS", Level.STUDY, "modalities_in_study", held=Held.COUNTED
)
SERIES_IN_STUDY = Attribute(
    "NumberOfStudyRelatedSeries", 0x00201206, "IS", Level.STUDY, "series_count", held=Held.COUNTED
)
INSTANCES_IN_STUDY = Attribute(
    "NumberOfStudyRelatedInstances", 0x00201208, "IS", Level.STUDY, "instance_count", held=Held.COUNTED
)
INSTANCES_IN_SERIES = Attribute(
    "NumberOfSeriesRelatedInstances", 0x00201209, "IS", Level.SERIES, "instance_count", held=Held.COUNTED
)

_NOT_SEARCHED = ("NumberOfFrames", "Rows", "Columns", "BitsAllocated")

SEARCHABLE: tuple[Attribute, ...] = (
    STUDY_UID,
    SERIES_UID,
    INSTANCE_UID,
    SOP_CLASS,
    MODALITIES_IN_STUDY,
    *(attribute for attribute in ATTRIBUTES if attribute.keyword not in _NOT_SEARCHED),
)
"""What may stand in a query without being an extended query tag."""


def attributes_of(level: Level) -> tuple[Attribute, ...]:
    """The attributes with a column that live at `level`, in table order."""
    return tuple(attribute for attribute in ATTRIBUTES if attribute.level is level)


@dataclass(frozen=True, slots=True)
class Exactly:
    """One of these values (PS3.4 sections C.2.2.2.1 and C.2.2.2.2)."""

    values: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Wildcard matching (PS3.4 section C.2.2.2.4): `*` stands for any text, `?` for one character."""

    text: str


@dataclass(frozen=True, slots=True)
class Between:
    """Range matching (PS3.4 section C.2.2.2.5), both ends included; None: open."""

    low: str | None
    high: str | None


@dataclass(frozen=True, slots=True)
class Words:
    """Fuzzy matching of names: each of these begins one of the name's words, in any order."""

    beginnings: tuple[str, ...]


Match = Exactly | Pattern | Between | Words


@dataclass(frozen=True, slots=True)
class Condition:
    """What an attribute must match. Values are in the form that `domain.matching` gives them."""

    attribute: Attribute
    match: Match


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """Which studies, series or instances are wanted: those that meet all conditions."""

    level: Level
    conditions: tuple[Condition, ...] = ()


class Found(NamedTuple):
    """A study, series or instance that a search found.

    What it says of its study, its series and itself is what the instances with these internal ids say: the newest live
    one of each. `ref` is the instance's own; of a study or series, that of its newest instance.
    """

    study_id: int
    ref: InstanceRef
    study_speaker: int
    series_speaker: int
    speaker: int
    instances_in_series: int


class StudyCounts(NamedTuple):
    """What lives below a study."""

    series_count: int
    instance_count: int
    modalities: tuple[str, ...]
