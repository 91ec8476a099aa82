"""Searches (QIDO-RS): each kind of them on an index of a million instances, and side by side with Debian's Orthanc.

`python -m benchmarks.search [--quick] [--rows N] [--rounds N] [--only depot|orthanc] [--folder PATH] [--json PATH]`
prints two tables and writes all figures as JSON, by default into benchmarks/results.

**Big.** A data folder whose index holds N live instances, written by `SqlIndex.add`, as storing and importing do it,
with metadata as large as a scanner's (that of samples.py and what dicomweb_load.HEADER adds). No files lie behind it:
a search opens none. Studies come in the order of their dates, over 15 years, but each tenth is an older one that was
brought in later; a scanner is replaced each five years. What is old therefore lies far from where a walk over the
newest begins. The service has its default settings, as `dicom-depot serve` starts it; its routes without a version
are asked, whose answers are the standard's and the largest. One client asks each search a few times in a row over a
connection that stays open (the request that opens it is not measured), all in turn in each round. Reported are the
median and the slowest of all rounds; how many the answer holds, and how many match; bytes of the body; CPU of the
server for one request.
Before that each search is asked once, unmeasured, and its answer is compared with what a plain filter in Python
(tests/support/search_oracle.py) finds among what was written: the same UIDs in the same order, and as many more.
Memory is the sum of the peaks (VmHWM) of all processes of the server: before the first search, after the rounds, after
as many requests again, and after that many again by several clients at once.

**Side by side.** 10,000 instances of 2 KB, of varied patients, are stored in both servers by STOW-RS, and both are
asked the same, with the same limit, in turns that swap places from round to round. dicomweb.py tells Orthanc's settings
and what a ratio is. What both find is compared as sets of UIDs, ours with the plain filter as well; where the two
differ, it is printed. Of a page of several only how many it holds is compared: Orthanc's order is another.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote, urlencode

import httpx
from pydicom import dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import UID

from benchmarks.dicomweb import (
    METADATA,
    MIB,
    QUIET_CORES,
    REQUEST_SECONDS,
    SIDES,
    Row,
    Side,
    _orthanc_packages,
    _row,
    _say,
    running_sides,
)
from benchmarks.dicomweb_load import BOUNDARY, HEADER, _written
from benchmarks.run import BUILD, HERE, _busy_seconds, _circumstances
from dicom_depot.adapters.catalog_sql import SqlCatalog
from dicom_depot.adapters.database import Database
from dicom_depot.adapters.folder_store import FolderBlobStore
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.codec.dicom_json import read_instance
from dicom_depot.codec.search_values import columns_of, loads
from dicom_depot.config import Settings
from dicom_depot.domain.identifiers import InstanceRef, parse_uid
from dicom_depot.domain.instance import InstanceHeader, InstanceRecord, Metadata
from dicom_depot.testing.samples import ct_volume, make_uid, multiframe, structured_report
from dicom_depot.wiring import migrate
from tests.support.search_oracle import ATTRIBUTES, INSTANCE, LEVELS, REQUESTS, SERIES, STUDY, matcher

ROWS_AT_ONCE = 2000
CLIENTS_AT_ONCE = 8
LISTED_UIDS = 50
LIMIT = 100
SLOW_MILLISECONDS = 300.0
FIRST_DAY, DAYS = date(2011, 1, 1), 15 * 365


@dataclass(frozen=True, slots=True)
class Kind:
    """Studies of one kind: how many series each has, how many instances each of these, and how common they are."""

    modality: str
    sop_class: str
    series: int
    instances: int
    weight: int


BIG = (
    Kind("CR", "1.2.840.10008.5.1.4.1.1.1", 1, 1, 60),
    Kind("CT", "1.2.840.10008.5.1.4.1.1.2", 3, 150, 14),
    Kind("MR", "1.2.840.10008.5.1.4.1.1.4", 5, 60, 12),
    Kind("US", "1.2.840.10008.5.1.4.1.1.3.1", 1, 30, 8),
    Kind("MG", "1.2.840.10008.5.1.4.1.1.1.2", 1, 4, 4),
    Kind("SR", "1.2.840.10008.5.1.4.1.1.88.33", 1, 1, 2),
)
SMALL = tuple(replace(kind, series=min(kind.series, 3), instances=min(kind.instances, 20), weight=1) for kind in BIG)

_FAMILIES = (
    *("Müller", "Schmidt", "Schneider", "Fischer", "Weber", "Meyer", "Wagner", "Becker", "Schulz", "Hoffmann", "Groß"),
    *("Smith", "Jones", "Taylor", "O'Brien", "Garcia", "Martinez", "Núñez", "Dubois", "Lefèvre", "Rossi", "Łukasik"),
    *("Novák", "Nguyễn", "Παπαδόπουλος", "Иванов", "Yamada", "Hong", "Kowalski", "Hansen", "Åberg", "Lindqvist"),
)
_OTHER_WRITING = {"Yamada": "=山田^太郎=やまだ^たろう", "Hong": "=洪^吉洞=홍^길동"}
_GIVEN = (
    *("Anna", "Bernd", "Carla", "Dieter", "Eva", "Franz", "Greta", "Hans", "Ida", "Jörg", "Karl", "Lena", "Max"),
    *("Nina", "Otto", "Paula", "Quentin", "Rosa", "Susanne", "Tomás", "Ute", "Victor", "Wanda", "Xaver", "Zoë"),
)
_DESCRIPTIONS = ("Thorax", "Abdomen", "Knie links", "Schädel nativ", "LWS", "Thorax p.a.", "Becken", "Mamma beidseits")
_MODELS = ("Alpha One", "Beta Two", "Gamma Three")


@dataclass(frozen=True, slots=True)
class Series:
    """`first` is the number of its first instance among all."""

    uid: str
    sop_class: str
    values: Mapping[str, str]
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Study:
    uid: str
    modality: str
    values: Mapping[str, str]
    series: Sequence[Series]


def instance_uid(number: int) -> str:
    return make_uid("search instance", number)


def population(rows: int, kinds: Sequence[Kind], seed: int = 7) -> list[Study]:
    """Studies in the order in which they are stored, with `rows` instances altogether; always the same ones."""
    randomness, weights = random.Random(seed), [kind.weight for kind in kinds]
    chosen: list[Kind] = []
    total = 0
    while total < rows:
        kind = kinds[len(chosen)] if len(chosen) < len(kinds) else randomness.choices(kinds, weights)[0]
        chosen.append(kind)
        total += kind.series * kind.instances
    patients = [_patient(randomness, number) for number in range(1 + len(chosen) // 2)]
    studies, first = [], 0
    for number, kind in enumerate(chosen):
        days = DAYS * number // len(chosen)
        day = FIRST_DAY + timedelta(days if number % 10 else randomness.randint(0, days))
        values = {
            **randomness.choice(patients),
            "StudyDate": f"{day:%Y%m%d}",
            "StudyTime": f"{randomness.randint(0, 23):02}{randomness.randint(0, 59):02}{randomness.randint(0, 59):02}",
            "AccessionNumber": f"A{number:08}",
            "ReferringPhysicianName": f"{randomness.choice(_FAMILIES)}^{randomness.choice(_GIVEN)}",
            "StudyDescription": randomness.choice(_DESCRIPTIONS),
            "StudyID": str(number),
        }
        series = []
        for place in range(kind.series):
            count = min(kind.instances, rows - first)
            if count > 0:
                series.append(_series(kind, number, place, values, first, count))
                first += count
        studies.append(Study(make_uid("search study", number), kind.modality, values, series))
    return studies


def _patient(randomness: random.Random, number: int) -> dict[str, str]:
    family = randomness.choice(_FAMILIES)
    name = f"{family}^{randomness.choice(_GIVEN)}^{randomness.choice('ABCDEFGHIJKLMNOPRSTUVW')}"
    return {
        "PatientName": name + _OTHER_WRITING.get(family, ""),
        "PatientID": f"P{number:07}",
        "PatientBirthDate": f"{FIRST_DAY - timedelta(randomness.randint(0, 33_000)):%Y%m%d}",
        "PatientSex": randomness.choice("MF"),
    }


def _series(kind: Kind, study: int, place: int, values: Mapping[str, str], first: int, count: int) -> Series:
    own = {
        "Modality": kind.modality,
        "SeriesDescription": f"{values['StudyDescription']} {place + 1}",
        "ManufacturerModelName": _MODELS[(int(values["StudyDate"][:4]) - FIRST_DAY.year) // 5],
        "SeriesNumber": str(place + 1),
        "PerformedProcedureStepStartDate": values["StudyDate"],
        "PerformedProcedureStepStartTime": values["StudyTime"],
        REQUESTS[0]: f"SPS{study:08}",
        REQUESTS[1]: f"RP{study:08}",
    }
    return Series(make_uid("search series", study, place), kind.sop_class, own, first, count)


# The index of the big part


def fill(data_dir: Path, studies: Sequence[Study]) -> None:
    """Make a data folder whose index holds these studies."""
    settings = Settings(data_dir=data_dir)
    migrate(settings)
    store = FolderBlobStore(settings.store_path)
    (key,) = store.new_keys(1)
    store.put(key, (b"",))  # which makes the store: an index without one would not be served
    store.delete(key)
    database = Database(settings.database_path)
    index, records = SqlIndex(database), _records(studies)
    began, count = time.monotonic(), 0
    while batch := list(itertools.islice(records, ROWS_AT_ONCE)):
        index.add(batch)
        count += len(batch)
        if count % 100_000 < len(batch):
            print(f"{count:,} rows after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    SqlCatalog(database).add_metadata({}, count)  # the back-fill, which a start goes on with, has nothing to do
    database.close()


def _records(studies: Sequence[Study]) -> Iterator[InstanceRecord]:
    for study in studies:
        for series in study.series:
            template = _template(study.modality)
            content = loads(template.metadata.dicom_json)
            content |= _members({**study.values, **series.values})
            uids = {"StudyInstanceUID": study.uid, "SeriesInstanceUID": series.uid, "SOPInstanceUID": "@sop"}
            content |= _members({**uids, "SOPClassUID": series.sop_class})
            columns = columns_of(content)
            content["00200013"] = {"vr": "IS", "Value": ["@number"]}
            text = json.dumps(dict(sorted(content.items())), ensure_ascii=False, separators=(",", ":"))
            for place in range(series.count):
                uid = instance_uid(series.first + place)
                packed = text.replace("@sop", uid).replace('"@number"', str(place + 1)).encode()
                digest = sha256(packed).digest()
                yield InstanceRecord(
                    InstanceHeader(
                        InstanceRef(parse_uid(study.uid), parse_uid(series.uid), parse_uid(uid)),
                        series.sop_class,
                        template.header.transfer_syntax_uid,
                        columns | {"instance_number": place + 1},
                    ),
                    f"{digest[:2].hex()[:3]}/{digest[:16].hex()}",
                    520_000,
                    digest,
                    int.from_bytes(digest[:8]),
                    Metadata(zlib.compress(packed, 1), template.metadata.layout),
                )


@cache
def _template(modality: str) -> Any:
    """An instance as a scanner writes it, as `read_instance` reads it."""
    sample = {"US": multiframe(frames=1), "SR": structured_report()}.get(modality) or ct_volume(slices=1)[0]
    data_set = dcmread(io.BytesIO(sample.content))
    for keyword, value in {} if modality == "SR" else HEADER.items():
        setattr(data_set, keyword, value)
    content = _written(data_set)
    return read_instance(content, len(content))


def _members(values: Mapping[str, str]) -> dict[str, Any]:
    """The members of a DICOM JSON object (PS3.18 annex F)."""
    members: dict[str, Any] = {}
    for name, value in values.items():
        sequence, _, keyword = name.rpartition(".")
        vr = dictionary_VR(keyword)
        element: dict[str, Any] = {"vr": vr, "Value": [value]}
        if vr == "PN":
            groups = zip(("Alphabetic", "Ideographic", "Phonetic"), value.split("="), strict=False)
            element["Value"] = [{group: text for group, text in groups if text}]
        elif vr == "IS":
            element["Value"] = [int(value)]
        of_item = {_tag(keyword): element}
        if sequence:
            item = members.setdefault(_tag(sequence), {"vr": "SQ", "Value": [{}]})["Value"][0]
            item |= of_item
        else:
            members |= of_item
    return members


def _tag(keyword: str) -> str:
    return f"{tag_for_keyword(keyword):08X}"


# What is asked, and what must be answered


_RESOURCES = {STUDY: "studies", SERIES: "series", INSTANCE: "instances"}


@dataclass(frozen=True, slots=True)
class Search:
    """One search: `filters` are attributes and what they must match, `scope` the UIDs in the path."""

    what: str
    level: str
    filters: Mapping[str, str] = field(default_factory=dict)
    scope: Sequence[str] = ()
    is_fuzzy: bool = False
    includes_all: bool = False
    limit: int = LIMIT
    offset: int = 0

    @property
    def path(self) -> str:
        folders = [f"/{name}/{uid}" for name, uid in zip(("studies", "series"), self.scope, strict=False)]
        parameters = {**self.filters, "limit": str(self.limit)}
        if self.offset:
            parameters["offset"] = str(self.offset)
        if self.is_fuzzy:
            parameters["fuzzymatching"] = "true"
        if self.includes_all:
            parameters["includefield"] = "all"
        # What need not be percent-encoded is not: Debian's Orthanc does not decode it.
        query = urlencode(parameters, safe="*?,^'", quote_via=quote)
        return f"{''.join(folders)}/{_RESOURCES[self.level]}?{query}"


@dataclass(frozen=True, slots=True)
class Expected:
    """The UIDs of the page that is asked for, newest first, and how many match at all."""

    page: Sequence[str]
    total: int


def expected(studies: Sequence[Study], search: Search) -> Expected:
    found = [*_matching(studies, search)]
    page = found[search.offset : search.offset + search.limit]
    return Expected([each if isinstance(each, str) else instance_uid(each) for each in page], len(found))


def _matching(studies: Sequence[Study], search: Search) -> Iterator[str | int]:
    """UIDs of studies or series, numbers of instances."""
    tests: dict[str, list[tuple[str, Callable[[str], bool]]]] = {level: [] for level in LEVELS}
    for keyword, value in search.filters.items():
        test = cache(matcher(keyword, value, is_fuzzy=search.is_fuzzy))
        tests[ATTRIBUTES[keyword].level].append((keyword, test))
    for study in reversed(studies):
        values = {"StudyInstanceUID": study.uid, "ModalitiesInStudy": study.modality, **study.values}
        if search.scope[:1] not in ((), (study.uid,)) or not _meets(values, tests[STUDY]):
            continue
        if search.level == STUDY:
            yield study.uid
            continue
        for series in reversed(study.series):
            values = {"SeriesInstanceUID": series.uid, **series.values}
            if search.scope[1:] not in ((), (series.uid,)) or not _meets(values, tests[SERIES]):
                continue
            if search.level == SERIES:
                yield series.uid
                continue
            for place in reversed(range(series.count)):
                values = {"SOPClassUID": series.sop_class, "InstanceNumber": str(place + 1)}
                if "SOPInstanceUID" in search.filters:
                    values["SOPInstanceUID"] = instance_uid(series.first + place)
                if not tests[INSTANCE] or _meets(values, tests[INSTANCE]):
                    yield series.first + place


def _meets(values: Mapping[str, str], tests: Sequence[tuple[str, Callable[[str], bool]]]) -> bool:
    return all(test(values[keyword]) for keyword, test in tests)


def big_searches(studies: Sequence[Study]) -> list[Search]:
    """Each kind of search, with values of studies that are there."""
    rows = sum(series.count for study in studies for series in study.series)
    many = max(studies[: len(studies) // 2], key=lambda study: sum(series.count for series in study.series))
    some = studies[len(studies) // 3]
    modalities = Counter(study.modality for study in studies)
    rare = min(modalities, key=lambda each: modalities[each])
    classes = {series.values["Modality"]: series.sop_class for study in studies for series in study.series}
    week = f"{some.values['StudyDate']}-{date.fromisoformat(some.values['StudyDate']) + timedelta(6):%Y%m%d}"
    year, years, all_years = "20130101-20131231", "20110101-20151231", "20110101-20251231"
    listed = studies[:: 1 + len(studies) // LISTED_UIDS]
    numbers = range(0, rows, 1 + rows // LISTED_UIDS)
    series_of_many = (many.uid, many.series[0].uid)

    def at(level: str, what: str, filters: Mapping[str, str] | None = None, **more: Any) -> Search:
        return Search(f"{_RESOURCES[level]}: {what}", level, filters or {}, **more)

    found = [
        at(STUDY, "no filter"),
        at(STUDY, "no filter, 200", limit=200),
        at(STUDY, "no filter, 200, all fields", limit=200, includes_all=True),
        at(STUDY, "no filter, deep offset", offset=9 * len(studies) // 10),
        at(STUDY, "UID", {"StudyInstanceUID": some.uid}),
        at(STUDY, "UID list", {"StudyInstanceUID": ",".join(study.uid for study in listed)}),
        at(STUDY, "AccessionNumber", {"AccessionNumber": some.values["AccessionNumber"]}),
        at(STUDY, "StudyDescription, inner *", {"StudyDescription": "*schä*"}),
        at(STUDY, "ReferringPhysicianName", {"ReferringPhysicianName": some.values["ReferringPhysicianName"]}),
        at(STUDY, "ModalitiesInStudy, rare", {"ModalitiesInStudy": rare}),
        at(STUDY, "ModalitiesInStudy, common", {"ModalitiesInStudy": "CT"}),
        at(STUDY, "the same, all fields", {"ModalitiesInStudy": "CT"}, includes_all=True),
        at(STUDY, "three filters", {"ModalitiesInStudy": "CT", "StudyDate": years, "PatientName": "s*"}),
        at(SERIES, "no filter"),
        at(SERIES, "no filter, deep offset", offset=9 * sum(len(study.series) for study in studies) // 10),
        at(SERIES, "of a study", scope=(many.uid,)),
        at(SERIES, "UID list", {"SeriesInstanceUID": ",".join(study.series[0].uid for study in listed)}),
        at(SERIES, "Modality, rare", {"Modality": rare}),
        at(SERIES, "Modality, common", {"Modality": "CT"}),
        at(SERIES, "SeriesDescription, inner *", {"SeriesDescription": "*link*"}),
        at(SERIES, "RequestedProcedureID", {REQUESTS[1]: some.series[0].values[REQUESTS[1]]}),
        at(SERIES, "procedure step in a week", {"PerformedProcedureStepStartDate": week}),
        at(INSTANCE, "no filter"),
        at(INSTANCE, "no filter, 200, all fields", limit=200, includes_all=True),
        at(INSTANCE, "no filter, deep offset", limit=200, offset=9 * rows // 10),
        at(INSTANCE, "of a study", scope=(many.uid,)),
        at(INSTANCE, "of a series", scope=series_of_many),
        at(INSTANCE, "one of a series", {"InstanceNumber": "1"}, scope=series_of_many),
        at(INSTANCE, "UID", {"SOPInstanceUID": instance_uid(rows // 3)}),
        at(INSTANCE, "UID list", {"SOPInstanceUID": ",".join(map(instance_uid, numbers))}),
        at(INSTANCE, "SOPClassUID, rare", {"SOPClassUID": classes[rare]}),
        at(INSTANCE, "SOPClassUID, common", {"SOPClassUID": classes["CT"]}),
        at(INSTANCE, "Modality, rare", {"Modality": rare}),
        at(INSTANCE, "Modality, common", {"Modality": "CT"}),
        at(INSTANCE, "InstanceNumber, rare", {"InstanceNumber": "150"}),
        at(INSTANCE, "InstanceNumber, common", {"InstanceNumber": "1"}),
        at(INSTANCE, "never together", {"Modality": "CT", "SOPClassUID": classes["MR"]}),
        at(INSTANCE, "dates, all years, deep offset", {"StudyDate": all_years}, offset=rows // 2),
        at(INSTANCE, "three filters", {"StudyDate": year, "Modality": "MR", "InstanceNumber": "7"}),
    ]
    for level in LEVELS:
        found += [
            at(level, "the first 1,000 studies", {"AccessionNumber": "A00000*"}),
            at(level, "PatientID", {"PatientID": some.values["PatientID"]}),
            at(level, "PatientID, ?", {"PatientID": some.values["PatientID"][:-1] + "?"}),
            at(level, "PatientName", {"PatientName": some.values["PatientName"].partition("=")[0].upper()}),
            at(level, "PatientName, other writing", {"PatientName": "山田*"}),
            at(level, "PatientName, prefix*", {"PatientName": "mul*"}),
            at(level, "PatientName, *inner*", {"PatientName": "*an*"}),
            at(level, "fuzzy, one word", {"PatientName": "ann"}, is_fuzzy=True),
            at(level, "fuzzy, one letter", {"PatientName": "a"}, is_fuzzy=True),
            at(level, "fuzzy, two words", {"PatientName": "ann schmi"}, is_fuzzy=True),
            at(level, "dates, a week", {"StudyDate": week}),
            at(level, "dates, an old year", {"StudyDate": year}),
            at(level, "dates, old years", {"StudyDate": years}),
            at(level, "dates, all years", {"StudyDate": all_years}),
            at(level, "no hit", {"PatientID": "NOBODY"}),
        ]
        if level != STUDY:
            found.append(at(level, "an old scanner", {"ManufacturerModelName": _MODELS[0]}))
    return sorted(found, key=lambda each: LEVELS.index(each.level))


def _is_accented(name: str) -> bool:
    return not name.isascii() and "=" not in name and name[0].isascii()


def small_searches(studies: Sequence[Study]) -> list[Search]:
    """What both servers understand."""
    some = next(study for study in studies[len(studies) // 3 :] if len(study.series) > 1)
    names = [study.values["PatientName"] for study in studies]
    plain, accented = (next((each for each in names if test(each)), names[0]) for test in (str.isascii, _is_accented))
    month = f"{some.values['StudyDate']}-{date.fromisoformat(some.values['StudyDate']) + timedelta(29):%Y%m%d}"
    of_series = (some.uid, some.series[0].uid)
    return [
        Search("all studies, a page", STUDY),
        Search("all studies, a later page", STUDY, offset=len(studies) // 2, limit=50),
        Search("a study by its UID", STUDY, {"StudyInstanceUID": some.uid}),
        Search("PatientID", STUDY, {"PatientID": some.values["PatientID"]}),
        Search("AccessionNumber", STUDY, {"AccessionNumber": some.values["AccessionNumber"]}),
        Search("PatientName", STUDY, {"PatientName": plain}),
        Search("PatientName, with an accent", STUDY, {"PatientName": accented}),
        Search("PatientName, prefix*", STUDY, {"PatientName": "Schm*"}),
        Search("PatientName, prefix*, lower case", STUDY, {"PatientName": "schm*"}),
        Search("PatientName, prefix*, umlaut", STUDY, {"PatientName": "Mü*"}),
        Search("PatientName, *inner*", STUDY, {"PatientName": "*ber*"}),
        Search("dates, a month", STUDY, {"StudyDate": month}),
        Search("ModalitiesInStudy", STUDY, {"ModalitiesInStudy": "MG"}),
        Search("two filters", STUDY, {"StudyDate": "20110101-20151231", "PatientName": "S*"}),
        Search("no hit", STUDY, {"PatientID": "NOBODY"}),
        Search("series of a study", SERIES, scope=(some.uid,)),
        Search("all series, a page", SERIES),
        Search("series by Modality", SERIES, {"Modality": "MG"}),
        Search("instances of a study", INSTANCE, scope=(some.uid,)),
        Search("instances of a series", INSTANCE, scope=of_series),
        Search("all instances, a page", INSTANCE),
        Search("an instance by its UID", INSTANCE, {"SOPInstanceUID": instance_uid(some.series[0].first)}),
    ]


# Asking


@dataclass(frozen=True, slots=True)
class Answered:
    """`more`: how many results are said to follow; -1 where it is only said that some do."""

    body: bytes
    more: int

    def uids(self, level: str) -> list[str]:
        tag = {STUDY: "0020000D", SERIES: "0020000E", INSTANCE: "00080018"}[level]
        return [each[tag]["Value"][0] for each in json.loads(self.body or b"[]")]


class Client:
    """Asks one server over one connection, which stays open until a new one is asked for."""

    def __init__(self, side: Side) -> None:
        self._root = side.root
        self._connection = http.client.HTTPConnection("127.0.0.1", side.port, timeout=REQUEST_SECONDS)

    def connect_anew(self) -> None:
        """Before requests that follow a pause: servers close connections that are idle."""
        self._connection.close()

    def ask(self, search: Search) -> Answered:
        self._connection.request("GET", self._root + search.path, headers={"Accept": METADATA})
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status not in (200, 204):
            raise RuntimeError(f"{search.what}: {answer.status} {body[:500]!r}")
        said = re.search(r"There are (\d*) ?additional", answer.headers.get("Warning", ""))
        return Answered(body, 0 if said is None else int(said[1] or -1))


def check(search: Search, answered: Answered, wanted: Expected) -> None:
    """Raises RuntimeError unless the answer is what is wanted."""
    uids = answered.uids(search.level)
    if uids != list(wanted.page):
        place = next((n for n, pair in enumerate(zip(uids, wanted.page, strict=False)) if pair[0] != pair[1]), None)
        raise RuntimeError(
            f"{search.what} ({search.path[:200]}): {len(uids)} results instead of {len(wanted.page)}, "
            f"the first other one at {place}"
        )
    more = max(0, wanted.total - search.offset - len(uids))
    if answered.more != more and not (answered.more == -1 and more):
        raise RuntimeError(f"{search.what}: it says that {answered.more} more follow, and {more} do")


def measure(side: Side, client: Client, search: Search, requests: int) -> dict[str, Any]:
    """The first request is not measured: it opens the connection."""
    client.connect_anew()
    client.ask(search)
    server, busy, cpu = side.cpu_seconds(), _busy_seconds(), time.process_time()
    seconds: list[float] = []
    began = time.monotonic()
    for _ in range(requests):
        asked = time.perf_counter()
        answered = client.ask(search)
        seconds.append(time.perf_counter() - asked)
    elapsed = time.monotonic() - began
    cpu, server = time.process_time() - cpu, side.cpu_seconds() - server
    return {
        "requests": requests,
        "milliseconds": round(1000 * median(seconds), 3),
        "slowest_milliseconds": round(1000 * max(seconds), 3),
        "body_bytes": len(answered.body),
        "server_cpu_milliseconds": round(1000 * server / requests, 3),
        "cores_busy_with_other_things": round(max(0.0, _busy_seconds() - busy - server - cpu) / elapsed, 2),
    }


@dataclass(frozen=True, slots=True)
class Plan:
    rows: int
    rounds: int
    requests: int
    small_rows: int
    small_requests: int


def full_plan() -> Plan:
    """About 15 minutes on two cores, of which making the index takes a half."""
    return Plan(rows=1_000_000, rounds=5, requests=4, small_rows=10_000, small_requests=10)


def quick_plan() -> Plan:
    """Enough to see that everything works; its figures mean nothing."""
    return Plan(rows=2000, rounds=1, requests=2, small_rows=100, small_requests=2)


def measure_big(plan: Plan, folder: Path) -> dict[str, Any]:
    """`folder` is filled unless it is already."""
    studies = population(plan.rows, BIG)
    searches = big_searches(studies)
    wanted = [expected(studies, search) for search in searches]
    began = time.monotonic()
    data_dir = folder / "depot"
    if not data_dir.exists():
        fill(data_dir, studies)
    filled_seconds = time.monotonic() - began
    with running_sides(folder, ("depot",)) as (versioned,):
        side = replace(versioned, root="")
        memory = {"idle_bytes": side.peak_memory_bytes()}
        client = Client(side)
        for search, each in zip(searches, wanted, strict=True):
            check(search, client.ask(search), each)
        found: list[list[dict[str, Any]]] = [[] for _ in searches]
        for number in range(plan.rounds):
            for search, rounds in zip(searches, found, strict=True):
                rounds.append(measure(side, client, search, plan.requests))
            total = sum(rounds[-1]["milliseconds"] for rounds in found)
            _say(f"all searches, round {number + 1}", {"depot": {"milliseconds": total}}, "milliseconds")
        memory["peak_bytes"] = side.peak_memory_bytes()
        for search in searches * plan.rounds:
            measure(side, client, search, plan.requests)
        memory["peak_bytes_after_twice_as_many"] = side.peak_memory_bytes()
        _ask_at_once(side, searches, plan.rounds * plan.requests)
        memory["peak_bytes_after_many_clients"] = side.peak_memory_bytes()
    return {
        "rows": plan.rows,
        "studies": len(studies),
        "series": sum(len(study.series) for study in studies),
        "filled_seconds": round(filled_seconds, 1),
        "database_bytes": Settings(data_dir=data_dir).database_path.stat().st_size,
        "searches": [
            {
                "what": search.what,
                "path": search.path[:300],
                "answered": len(each.page),
                "matching": each.total,
                "rounds": rounds,
            }
            for search, each, rounds in zip(searches, wanted, found, strict=True)
        ],
        "memory": memory,
    }


def _ask_at_once(side: Side, searches: Sequence[Search], times: int) -> None:
    """As many requests again, by several clients at once."""
    waiting = iter(list(searches) * times)
    failures: list[Exception] = []

    def ask() -> None:
        client = Client(side)
        try:
            for search in waiting:  # `next` of a list's iterator is one step: no two get the same
                client.ask(search)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# Side by side


def store_all(side: Side, studies: Sequence[Study]) -> float:
    """Store these studies by STOW-RS, one request a study; returns how many seconds that took."""
    seconds = 0.0
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={BOUNDARY.decode()}',
        "Accept": METADATA,
    }
    template = dcmread(io.BytesIO(ct_volume(slices=1, rows=1, columns=1)[0].content))
    with httpx.Client(timeout=REQUEST_SECONDS, trust_env=False) as client:
        for study in studies:
            parts = [
                b"--%s\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % (BOUNDARY, content)
                for content in _files(template, study)
            ]
            body = b"".join([*parts, b"--%s--\r\n" % BOUNDARY])
            began = time.monotonic()
            answer = client.post(f"http://127.0.0.1:{side.port}{side.root}/studies", content=body, headers=headers)
            seconds += time.monotonic() - began
            if len(answer.raise_for_status().json()["00081199"]["Value"]) != len(parts):
                raise RuntimeError(f"{side.name} did not store all of a study")
    return seconds


def _files(template: Dataset, study: Study) -> Iterator[bytes]:
    for series in study.series:
        item = Dataset()
        for name, value in {**study.values, **series.values}.items():
            sequence, _, keyword = name.rpartition(".")
            setattr(item if sequence else template, keyword, value)
        template.RequestAttributesSequence = [item]
        template.StudyInstanceUID, template.SeriesInstanceUID = UID(study.uid), UID(series.uid)
        template.SOPClassUID = template.file_meta.MediaStorageSOPClassUID = UID(series.sop_class)
        for place in range(series.count):
            template.SOPInstanceUID = UID(instance_uid(series.first + place))
            template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID
            template.InstanceNumber = place + 1
            yield _written(template)


def measure_side_by_side(plan: Plan, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    studies = population(plan.small_rows, SMALL)
    searches = small_searches(studies)
    with running_sides(folder, names) as versioned:
        sides = [replace(side, root="" if side.name == "depot" else side.root) for side in versioned]
        stored_seconds = {side.name: round(store_all(side, studies), 1) for side in sides}
        clients = {side.name: Client(side) for side in sides}
        found = []
        for search in searches:
            wanted = expected(studies, search)
            answered = {side.name: Client(side).ask(search) for side in sides}
            if "depot" in answered:
                check(search, answered["depot"], wanted)
            uids = {name: each.uids(search.level) for name, each in answered.items()}
            rounds = []
            for number in range(plan.rounds):
                order = sides if number % 2 == 0 else sides[::-1]
                rounds.append(
                    {side.name: measure(side, clients[side.name], search, plan.small_requests) for side in order}
                )
            _say(search.what, rounds[-1], "milliseconds")
            found.append(
                {
                    "what": search.what,
                    "path": search.path,
                    "matching": wanted.total,
                    "answered": {name: len(each) for name, each in uids.items()},
                    "difference": difference(search, wanted, uids),
                    "rounds": rounds,
                }
            )
        memory = {side.name: {"mib": round(side.peak_memory_bytes() / MIB, 1)} for side in sides}
    return {
        "instances": plan.small_rows,
        "studies": len(studies),
        "stored_seconds": stored_seconds,
        "searches": found,
        "memory": memory,
    }


def difference(search: Search, wanted: Expected, uids: Mapping[str, Sequence[str]]) -> str:
    """How Orthanc's answer differs from what is wanted; empty where it does not."""
    if "orthanc" not in uids:
        return ""
    theirs = uids["orthanc"]
    if len(set(theirs)) != len(theirs):
        return "Orthanc answers some twice"
    if search.offset or wanted.total > search.limit:
        return "" if len(theirs) == len(wanted.page) else f"Orthanc answers {len(theirs)}, not {len(wanted.page)}"
    lacking, more = len(set(wanted.page) - set(theirs)), len(set(theirs) - set(wanted.page))
    return f"Orthanc lacks {lacking} and has {more} others" if lacking or more else ""


def run(plan: Plan, names: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    result = {**_circumstances(), "method": "benchmarks/search.py", "orthanc": _orthanc_packages()}
    BUILD.mkdir(exist_ok=True)
    if "depot" in names:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        kept = (
            nullcontext(str(folder)) if folder is not None else tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD)
        )
        with kept as name:
            result["big"] = measure_big(plan, Path(name))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as name:
        result["side_by_side"] = measure_side_by_side(plan, Path(name), names)
    return result


# Tables


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the big part's table. `cpu` is milliseconds of the server's CPU for one request."""

    what: str
    matching: int
    answered: int
    milliseconds: float
    slowest: float
    cpu: float
    body_bytes: int


def lines(big: Mapping[str, Any]) -> list[Line]:
    return [
        Line(
            each["what"],
            each["matching"],
            each["answered"],
            median(one["milliseconds"] for one in each["rounds"]),
            max(one["slowest_milliseconds"] for one in each["rounds"]),
            sum(one["server_cpu_milliseconds"] for one in each["rounds"]) / len(each["rounds"]),
            each["rounds"][-1]["body_bytes"],
        )
        for each in big["searches"]
    ]


def tabulate(side_by_side: Mapping[str, Any]) -> list[Row]:
    rows = [_row(each["what"], "ms", each["rounds"], "milliseconds") for each in side_by_side["searches"]]
    return [*rows, _row("peak memory", "MiB", [side_by_side["memory"]], "mib")]


def print_tables(result: Mapping[str, Any]) -> None:
    if "big" in result:
        _print_big(result["big"])
    _print_side_by_side(result["side_by_side"])
    parts = [result[name]["searches"] for name in ("big", "side_by_side") if name in result]
    rounds = [one for part in parts for each in part for one in each["rounds"]]
    measured = [of_side for one in rounds for of_side in (one.values() if "requests" not in one else (one,))]
    busy = median(each["cores_busy_with_other_things"] for each in measured)
    if busy > QUIET_CORES:
        print(f"The machine was not quiet: {busy:.2f} cores were busy with other things (median).")


def _print_big(big: Mapping[str, Any]) -> None:
    print(f"{big['rows']:,} instances in {big['series']:,} series of {big['studies']:,} studies", end=", ")
    print(f"a database of {big['database_bytes'] / MIB:,.0f} MiB")
    print(f"{'':<42} {'match':>9} {'answered':>8} {'ms':>8} {'slowest':>8} {'CPU ms':>8} {'KB':>7}")
    for line in lines(big):
        print(
            f"{line.what:<42} {line.matching:>9,} {line.answered:>8} {line.milliseconds:>8.1f} {line.slowest:>8.1f} "
            f"{line.cpu:>8.1f} {line.body_bytes / 1000:>7.1f}"
        )
    slow = [line.what for line in lines(big) if line.milliseconds > SLOW_MILLISECONDS]
    print(f"Slower than {SLOW_MILLISECONDS:.0f} ms: {'; '.join(slow) or 'none'}.")
    print("Every answer held the UIDs that a plain filter finds, in their order.")
    idle, peak, twice, many = (f"{value / MIB:.0f}" for value in big["memory"].values())
    print(f"Peak memory: {idle} MiB before, {peak} MiB after the rounds, {twice} MiB after as many requests again,")
    print(f"{many} MiB after that many again by {CLIENTS_AT_ONCE} clients at once.")


def _print_side_by_side(found: Mapping[str, Any]) -> None:
    print(f"\n{found['instances']:,} instances in {found['studies']:,} studies, stored in {found['stored_seconds']} s")
    print(f"{'':<36} {'match':>7} {'':>4} {'ours':>9} {'Orthanc':>9} {'ratio':>7}  the answers")
    searches = [*found["searches"], {"matching": "", "difference": ""}]
    for row, each in zip(tabulate(found), searches, strict=True):
        ours, theirs = (f"{value:,.1f}" if value is not None else "-" for value in (row.depot, row.orthanc))
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else "-"
        note = f"{each['matching']:>7} {row.unit:>4} {ours:>9} {theirs:>9} {ratio:>7}  {each['difference']}"
        print(f"{row.what:<36} {note}".rstrip())
    print("A ratio above 1 is in our favour. Ours answered exactly what a plain filter finds.")


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only show that it works, in seconds")
    parser.add_argument("--rows", type=int, help="instances in the index of the big part")
    parser.add_argument("--rounds", type=int, help="rounds of each search")
    parser.add_argument("--only", choices=SIDES, help="measure one side alone; the big part is of ours")
    parser.add_argument("--folder", type=Path, help="where the big index is made and kept; it is used if it is there")
    parser.add_argument("--json", type=Path, help="where to write the figures (--quick and --only alone write none)")
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    plan = quick_plan() if arguments.quick else full_plan()
    return replace(plan, rows=arguments.rows or plan.rows, rounds=arguments.rounds or plan.rounds)


def json_path_of(arguments: argparse.Namespace, result: Mapping[str, Any]) -> Path | None:
    if arguments.json is not None or arguments.quick or arguments.only:
        return Path(arguments.json) if arguments.json is not None else None
    return HERE / "results" / f"search-{result['date'][:10]}-{(result['commit'] or 'unknown')[:10]}.json"


def main() -> None:
    arguments = arguments_parser().parse_args()
    result = run(plan_of(arguments), (arguments.only,) if arguments.only else SIDES, arguments.folder)
    print_tables(result)
    if arguments.quick:
        print("This was a quick run, which shows that everything works: its figures mean nothing.")
    path = json_path_of(arguments, result)
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"All figures are in {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
