"""The Python DICOMweb client searches every real file that can be stored, and finds what a plain filter over the files
as pydicom reads them finds; it gets rendered frames too.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from requests import HTTPError

from tests.support.quiet_pydicom import quiet_pydicom
from tests.support.search_data import is_date, is_integer, is_time
from tests.support.search_oracle import ATTRIBUTES, INSTANCE, REQUESTS, SERIES, STUDY, Archive, Instance, words
from tests.support.searched import first
from tests.support.service import RunningService, run_command, running_service

TAGS = {"StudyInstanceUID": "0020000D", "SeriesInstanceUID": "0020000E", "SOPInstanceUID": "00080018"}
UIDS_OF = {level: tuple(TAGS)[: number + 1] for number, level in enumerate((STUDY, SERIES, INSTANCE))}
Uids = tuple[str, str, str]

_KEYWORDS = (
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyDescription", "PatientName"),
    *("PatientID", "PatientBirthDate", "PatientSex", "StudyID", "Modality", "SeriesDescription", "SOPClassUID"),
    *("ManufacturerModelName", "SeriesNumber", "PerformedProcedureStepStartDate", "InstanceNumber"),
    "PerformedProcedureStepStartTime",
)


@pytest.fixture(scope="module")
def service(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("client search")
    run_command("import", str(corpus), data_dir=folder / "data", check=False)
    with running_service(folder / "data") as running:
        yield running


@pytest.fixture(scope="module")
def data_sets(service: RunningService) -> dict[Uids, Dataset]:
    """Every stored instance as pydicom reads the service's bytes, in the order in which they were stored."""
    found: dict[Uids, Dataset] = {}
    with httpx.Client(base_url=service.url, timeout=60) as http:
        results: list[dict[str, Any]] = []
        while answer := http.get("/v2/instances", params={"limit": 200, "offset": len(results)}).content:
            results += json.loads(answer)
        for result in reversed(results):
            study, series, sop = (first(result, tag) for tag in TAGS.values())
            path = f"/v2/studies/{study}/series/{series}/instances/{sop}"
            original = http.get(path, headers={"Accept": "application/dicom; transfer-syntax=*"}).raise_for_status()
            with quiet_pydicom():
                found[study, series, sop] = dcmread(io.BytesIO(original.content), force=True)
    assert len(found) > 200
    return found


@pytest.fixture(scope="module")
def archive(data_sets: dict[Uids, Dataset]) -> Archive:
    """The files as a list, for the plain filter."""
    made = Archive()
    with quiet_pydicom():
        for uids, data_set in data_sets.items():
            values = {keyword: text_of(data_set, keyword) for keyword in _KEYWORDS}
            items = data_set.get("RequestAttributesSequence") or []
            requests = [
                (text_of(each, "ScheduledProcedureStepID"), text_of(each, "RequestedProcedureID")) for each in items
            ]
            made.store(Instance(*uids, values, tuple(requests)), may_replace=False)
    return made


def text_of(data_set: Dataset, keyword: str) -> str:
    """The values of an attribute as one text, as it stands in the file."""
    try:
        value = data_set.get(keyword)
    except Exception:
        return ""
    values = value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
    return "\\".join("" if each is None else str(each).replace("\0", "") for each in values)


@dataclass
class Compared:
    """The client's searches beside the filter's."""

    client: DICOMwebClient
    archive: Archive

    def found(
        self, level: str, filters: dict[str, str], *, is_fuzzy: bool = False, **arguments: Any
    ) -> list[list[str]]:
        """The UIDs of what the client finds, page after page unless it is told otherwise."""
        searches: dict[str, Callable[..., list[dict[str, Any]]]] = {
            STUDY: self.client.search_for_studies,
            SERIES: self.client.search_for_series,
            INSTANCE: self.client.search_for_instances,
        }
        settings = {"get_remaining": True, "limit": 200, "fields": list(UIDS_OF[level])} | arguments
        results = searches[level](search_filters=filters, fuzzymatching=is_fuzzy or None, **settings)
        return [[first(each, TAGS[name]) for name in UIDS_OF[level]] for each in results]

    def expected(
        self, level: str, filters: dict[str, str], scope: Sequence[str] = (), *, is_fuzzy: bool = False
    ) -> Any:
        rows = self.archive.search(level, scope, list(filters.items()), is_fuzzy=is_fuzzy)
        return [list(row.uids) for row in rows]

    def values(self, keyword: str) -> list[str]:
        """What the files say of an attribute, each value once, where it can be asked for."""
        is_sound = {"DA": is_date, "TM": is_time, "IS": is_integer}.get(ATTRIBUTES[keyword].vr, bool)
        texts = dict.fromkeys(text.strip(" ") for each in self.archive.live for text in each.texts(keyword))
        return [text for text in texts if text.strip(" ^=") and is_sound(text)]


@pytest.fixture(scope="module")
def compared(client: DICOMwebClient, archive: Archive) -> Compared:
    return Compared(client, archive)


@pytest.mark.parametrize("keyword", [*_KEYWORDS, *REQUESTS])
def test_every_value_that_is_there_is_found(compared: Compared, keyword: str) -> None:
    level = ATTRIBUTES[keyword].level
    values = compared.values(keyword)[:15]
    hits = 0
    for value in values:
        expected = compared.expected(level, {keyword: value})
        assert compared.found(level, {keyword: value}) == expected, value
        hits += bool(expected)  # what only an older instance of a study says is not found
    assert 2 * hits >= len(values)
    assert values or keyword in REQUESTS


def test_parts_of_values_are_found_by_wildcards(compared: Compared) -> None:
    asked = 0
    for keyword in ("PatientName", "StudyDescription", "PatientID", "Modality", "ManufacturerModelName"):
        level = ATTRIBUTES[keyword].level
        for value in compared.values(keyword)[:8]:
            for part in (f"{value[:3]}*", f"*{value[-2:]}", f"?{value[1:].upper()}", f"*{value[1:4].lower()}*"):
                expected = compared.expected(level, {keyword: part})
                assert compared.found(level, {keyword: part}) == expected, part
                asked += bool(expected)
    assert asked > 80


def test_words_of_names_are_found_fuzzily(compared: Compared) -> None:
    asked = 0
    for value in compared.values("PatientName")[::2]:
        for word in words(value):
            for beginning in {word, word[:3].upper()}:
                expected = compared.expected(STUDY, {"PatientName": beginning}, is_fuzzy=True)
                assert compared.found(STUDY, {"PatientName": beginning}, is_fuzzy=True) == expected, beginning
                asked += bool(expected)
    assert asked > 40


def test_ranges_of_dates_and_times_are_found(compared: Compared) -> None:
    for keyword in ("StudyDate", "StudyTime", "PatientBirthDate"):
        values = sorted(compared.values(keyword))[::5]
        for low, high in itertools.pairwise(values):
            for value in (f"{low}-{high}", f"{high}-", f"-{low}"):
                assert compared.found(STUDY, {keyword: value}) == compared.expected(STUDY, {keyword: value}), value


def test_attributes_of_all_levels_are_asked_for_together(compared: Compared) -> None:
    for each in compared.archive.live[::11]:
        filters = {
            "StudyInstanceUID": each.study,
            "SeriesInstanceUID": each.series,
            "SOPClassUID": each.values["SOPClassUID"],
            "ModalitiesInStudy": each.told("Modality"),
        }
        filters = {keyword: value for keyword, value in filters.items() if value}
        assert each.uids in [tuple(uids) for uids in compared.expected(INSTANCE, filters)]
        assert compared.found(INSTANCE, filters) == compared.expected(INSTANCE, filters)


def test_series_and_instances_of_one_study_are_found(compared: Compared, client: DICOMwebClient) -> None:
    for study, series in sorted({each.uids[:2] for each in compared.archive.live})[::3]:
        for level, scope, results in (
            (SERIES, (study,), client.search_for_series(study)),
            (INSTANCE, (study,), client.search_for_instances(study, limit=200)),
            (INSTANCE, (study, series), client.search_for_instances(study, series, limit=200)),
        ):
            found = [first(each, TAGS[UIDS_OF[level][-1]]) for each in results]
            assert found == [uids[-1] for uids in compared.expected(level, {}, scope)]


def test_pages_make_the_whole(compared: Compared) -> None:
    for level in (STUDY, SERIES, INSTANCE):
        whole = compared.expected(level, {})
        assert compared.found(level, {}) == whole
        pages = [compared.found(level, {}, get_remaining=False, limit=7, offset=n) for n in range(0, len(whole) + 7, 7)]
        assert list(itertools.chain(*pages)) == whole
        assert [len(page) for page in pages[:-2]] == [7] * (len(pages) - 2)
    assert (
        compared.found(INSTANCE, {}, get_remaining=False, limit=None, offset=None)
        == compared.expected(INSTANCE, {})[:100]
    )


def test_fields_are_what_the_files_say(client: DICOMwebClient, data_sets: dict[Uids, Dataset]) -> None:
    fields = ["Manufacturer", "00080070", "PatientAge", "ImageType", "PixelSpacing", "Rows", "WindowCenter"]
    results = client.search_for_instances(fields=fields, limit=200, get_remaining=True)
    assert len(results) == len(data_sets)
    seen = 0
    for result, (uids, data_set) in zip(results, reversed(data_sets.items()), strict=True):
        assert first(result, "00080018") == uids[2]
        for keyword in ("Manufacturer", "ImageType", "Rows"):
            tag = f"{tag_for_keyword(keyword):08X}"
            with quiet_pydicom():
                expected = text_of(data_set, keyword)
            found = "\\".join("" if value is None else str(value) for value in result.get(tag, {}).get("Value", ()))
            if tag in result:
                assert found.strip(" ") == expected.strip(" "), (uids, keyword)
                seen += bool(found)
    assert seen > 400


def test_what_the_service_refuses_the_client_raises(client: DICOMwebClient) -> None:
    for arguments in ({"limit": 201}, {"search_filters": {"patientid": "x"}}, {"fields": ["all", "PatientAge"]}):
        with pytest.raises(HTTPError, match="400"):
            client.search_for_studies(**arguments)
    assert client.search_for_studies(search_filters={"PatientID": "nobody at all"}) == []
    assert len(client.search_for_studies(additional_params={"limit": 1})) == 1


def test_rendered_instances_and_frames_are_pictures_of_their_size(
    client: DICOMwebClient, data_sets: dict[Uids, Dataset]
) -> None:
    rendered = 0
    for uids, data_set in data_sets.items():
        size = (data_set.get("Columns"), data_set.get("Rows"))
        if "PixelData" not in data_set or rendered >= 10:
            continue
        try:
            for media_type, form in (("image/png", "PNG"), ("image/jpeg", "JPEG")):
                whole = client.retrieve_instance_rendered(*uids, media_types=(media_type,))
                frame = client.retrieve_instance_frames_rendered(*uids, frame_numbers=[1], media_types=(media_type,))
                assert whole == frame
                picture = PIL.Image.open(io.BytesIO(whole))
                assert (picture.format, picture.size) == (form, size)
        except HTTPError as error:
            assert "406" in str(error), uids  # noqa: PT017
            continue
        rendered += 1
    assert rendered == 10
