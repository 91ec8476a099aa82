"""Which attributes a search answers with, and the DICOM JSON object (PS3.18 annex F) that holds them.

Attributes of a study come from the instance that speaks for the study, those of a series from the one that speaks for
the series, all others from the one that speaks for what was found. Bulk data is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydicom.datadict import tag_for_keyword

from dicom_depot.codec.qido import Search, TagPath
from dicom_depot.codec.search_values import DicomJson
from dicom_depot.domain.search import (
    ATTRIBUTES,
    INSTANCES_IN_SERIES,
    INSTANCES_IN_STUDY,
    MODALITIES_IN_STUDY,
    SERIES_IN_STUDY,
    Found,
    Level,
    StudyCounts,
)

AnswerSet = Literal["standard", 1, 2]
"""Which attributes are answered without being asked for: those of PS3.18 section 10.6, or those of a version of the
DICOM service's API."""


def _tags(*keywords: str) -> tuple[TagPath, ...]:
    tags = [tag_for_keyword(keyword) for keyword in " ".join(keywords).split()]
    return tuple((int(tag),) for tag in tags if tag is not None)


_VERSION_1 = {
    Level.STUDY: _tags(
        "SpecificCharacterSet StudyDate StudyTime AccessionNumber InstanceAvailability ReferringPhysicianName",
        "TimezoneOffsetFromUTC PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyID",
    ),
    Level.SERIES: _tags(
        "SpecificCharacterSet Modality TimezoneOffsetFromUTC SeriesDescription SeriesInstanceUID",
        "PerformedProcedureStepStartDate PerformedProcedureStepStartTime RequestAttributesSequence",
    ),
    Level.INSTANCE: _tags(
        "SpecificCharacterSet SOPClassUID SOPInstanceUID InstanceAvailability TimezoneOffsetFromUTC InstanceNumber",
        "Rows Columns BitsAllocated NumberOfFrames",
    ),
}
_VERSION_2 = {
    Level.STUDY: _tags(
        "StudyInstanceUID StudyDate StudyDescription AccessionNumber ReferringPhysicianName PatientName PatientID",
        "PatientBirthDate",
    ),
    Level.SERIES: _tags("SeriesInstanceUID Modality PerformedProcedureStepStartDate ManufacturerModelName"),
    Level.INSTANCE: _tags("SOPInstanceUID"),
}
_STANDARD = {
    Level.STUDY: _tags("StudyDescription ModalitiesInStudy NumberOfStudyRelatedSeries NumberOfStudyRelatedInstances"),
    Level.SERIES: _tags("SeriesNumber NumberOfSeriesRelatedInstances"),
    Level.INSTANCE: (),
}
_DEFAULTS: Mapping[AnswerSet, Mapping[Level, tuple[TagPath, ...]]] = {
    1: _VERSION_1,
    2: _VERSION_2,
    "standard": {level: _VERSION_1[level] + _STANDARD[level] for level in Level},
}
_ALL = {
    Level.STUDY: _tags(
        "StudyDescription AnatomicRegionsInStudyCodeSequence ProcedureCodeSequence NameOfPhysiciansReadingStudy",
        "AdmittingDiagnosesDescription ReferencedStudySequence PatientAge PatientSize PatientWeight Occupation",
        "AdditionalPatientHistory",
    ),
    Level.SERIES: _tags("SeriesNumber Laterality SeriesDate SeriesTime"),
    Level.INSTANCE: (),
}

_CHARACTER_SET, _TIME_ZONE, _AVAILABILITY, _RETRIEVE_URL = (0x00080005,), (0x00080201,), (0x00080056,), 0x00081190
_OF_ANY_LEVEL = {_CHARACTER_SET, _TIME_ZONE, _AVAILABILITY}
_LEVEL_OF: dict[int, Level] = {
    path[0]: level
    for sets in (_VERSION_1, _VERSION_2, _STANDARD, _ALL)
    for level, paths in sets.items()
    for path in paths
    if path not in _OF_ANY_LEVEL and level is not Level.INSTANCE
} | {each.parent or each.tag: each.level for each in ATTRIBUTES}
_COUNTED = {each.tag for each in (MODALITIES_IN_STUDY, SERIES_IN_STUDY, INSTANCES_IN_STUDY, INSTANCES_IN_SERIES)}


@dataclass(frozen=True, slots=True)
class Answer:
    """Which attributes a search answers with, in the order of their tags."""

    paths: tuple[TagPath, ...]
    is_standard: bool

    @property
    def wants_counts(self) -> bool:
        """Whether it needs to be known what lies below studies."""
        return any(path[0] in _COUNTED - {INSTANCES_IN_SERIES.tag} for path in self.paths)


def answer_of(search: Search, answer_set: AnswerSet) -> Answer:
    """The default set of each level between the scope and what is asked for, the UIDs in the URL, what is matched and
    what is included.
    """
    wanted: dict[TagPath, None] = {(each.attribute.tag,): None for each in search.resource.conditions()}
    for level in search.resource.levels:
        wanted |= dict.fromkeys(_DEFAULTS[answer_set][level])
        if search.includes_all:
            wanted |= dict.fromkeys((*_DEFAULTS[1][level], *_DEFAULTS[2][level], *_ALL[level]))
    wanted |= dict.fromkeys((*search.matched, *search.included))
    return Answer(tuple(sorted(wanted)), answer_set == "standard")


def result_of(
    answer: Answer, found: Found, contents: Mapping[int, DicomJson], counts: StudyCounts | None, url: str
) -> dict[str, Any]:
    """One found resource as a DICOM JSON object. `contents`: the JSON of the instances that speak for it; `url`: from
    where it is retrieved.
    """
    speakers = {Level.STUDY: found.study_speaker, Level.SERIES: found.series_speaker}
    result: dict[str, Any] = {}
    for tag, paths in _by_first(answer.paths):
        if tag in _COUNTED:
            value = _counted(tag, found, counts)
        else:
            speaker = speakers.get(_LEVEL_OF.get(tag, Level.INSTANCE), found.speaker)
            value = _picked(contents.get(speaker, {}).get(f"{tag:08X}"), paths)
        if value is not None:
            result[f"{tag:08X}"] = value
    if answer.is_standard:
        result[f"{_AVAILABILITY[0]:08X}"] = {"vr": "CS", "Value": ["ONLINE"]}
        result[f"{_RETRIEVE_URL:08X}"] = {"vr": "UR", "Value": [url]}
    return dict(sorted(result.items()))


def _by_first(paths: Iterable[TagPath]) -> Iterable[tuple[int, list[TagPath]]]:
    """The paths below each first tag; an empty one stands for the whole."""
    below: dict[int, list[TagPath]] = {}
    for path in paths:
        below.setdefault(path[0], []).append(path[1:])
    return below.items()


def _picked(element: Mapping[str, Any] | None, paths: list[TagPath]) -> dict[str, Any] | None:
    """What the paths name of an element, without bulk data; None where there is nothing of it."""
    if element is None or "BulkDataURI" in element:
        return None
    if element.get("vr") != "SQ":
        return dict(element) if () in paths else None
    is_whole = () in paths
    items = []
    for item in element.get("Value", ()):
        wanted = _by_first([(int(tag, 16),) for tag in item] if is_whole else paths)
        picked = {f"{tag:08X}": _picked(item.get(f"{tag:08X}"), below) for tag, below in wanted}
        items.append({tag: each for tag, each in picked.items() if each is not None})
    return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}


def _counted(tag: int, found: Found, counts: StudyCounts | None) -> dict[str, Any] | None:
    if tag == INSTANCES_IN_SERIES.tag:
        return {"vr": "IS", "Value": [found.instances_in_series]}
    if counts is None:
        return None
    if tag == MODALITIES_IN_STUDY.tag:
        return {"vr": "CS", "Value": list(counts.modalities)} if counts.modalities else {"vr": "CS"}
    return {"vr": "IS", "Value": [counts.series_count if tag == SERIES_IN_STUDY.tag else counts.instance_count]}
