"""UIDs in paths: the only way from a path's text to what it points at."""

from __future__ import annotations

from dicom_depot.domain.errors import InvalidIdentifier, InvalidRequest
from dicom_depot.domain.identifiers import InstanceRef, SeriesRef, StudyRef, Uid, parse_uid

_FRAMES_MAX = 10_000


def study_ref(study: str) -> StudyRef:
    """Raises InvalidIdentifier that names the part of the path, as all of these."""
    return StudyRef(path_uid(study, "study"))


def series_ref(study: str, series: str) -> SeriesRef:
    return SeriesRef(path_uid(study, "study"), path_uid(series, "series"))


def instance_ref(study: str, series: str, instance: str) -> InstanceRef:
    return InstanceRef(path_uid(study, "study"), path_uid(series, "series"), path_uid(instance, "instance"))


def path_uid(text: str, name: str) -> Uid:
    try:
        return parse_uid(text)
    except InvalidIdentifier as error:
        raise InvalidIdentifier(f"The path's {name}: {error.message}", target=name) from None


def frame_numbers(text: str) -> list[int]:
    """`1,3`: frame numbers from 1. Raises InvalidRequest."""
    numbers = text.split(",", _FRAMES_MAX)
    if len(numbers) > _FRAMES_MAX:
        raise InvalidRequest(f"At most {_FRAMES_MAX} frames can be asked for at once.", target="frames")
    if not all(number.isascii() and number.isdecimal() and len(number) < 10 and int(number) for number in numbers):
        raise InvalidRequest("Frames are whole numbers from 1, separated by commas: frames/1,3.", target="frames")
    return [int(number) for number in numbers]
