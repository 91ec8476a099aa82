"""Exports by query while instances are stored, studies change what they say, and instances are deleted: what matched
at the cut-off is exported, exactly.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.http.dicomweb.conftest import Made, make
from tests.support.azurite import Azurite
from tests.support.service import RunningService, azure_destination, running_service

STUDIES, SERIES, FIRST = 6, 3, 6
SECONDS = 4.0
QUERIES: list[tuple[str, dict[str, str]]] = [
    ("series", {"Modality": "CT", "StudyDate": "20240101-20241231"}),
    ("study", {"StudyDate": "20240101-20241231"}),
    ("study", {"ModalitiesInStudy": "MR", "PatientID": "even"}),
    ("instance", {"StudyDate": "20250101-", "InstanceNumber": "2"}),
]


class Stored(NamedTuple):
    """What one instance says."""

    date: str
    modality: str
    patient: str
    number: int
    content: bytes


class Busy:
    """A service and everything that was ever stored in it, each under UIDs of its own."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        self.known: dict[str, Stored] = {}
        self.done = threading.Event()
        self._lock = threading.Lock()

    def make(self, randomness: random.Random, study: int, series: int) -> Made:
        date, modality = randomness.choice(["20240315", "20250315"]), randomness.choice(["CT", "MR"])
        patient, number = randomness.choice(["even", "odd"]), randomness.randint(1, 3)
        made = make(
            study=f"1.2.{study}",
            series=f"1.2.{study}.{series}",
            StudyDate=date,
            Modality=modality,
            PatientID=patient,
            InstanceNumber=number,
        )
        with self._lock:
            self.known[f"{made.study}/{made.series}/{made.sop}"] = Stored(date, modality, patient, number, made.content)
        return made

    def disturb(self, seed: int) -> int:
        """Store and delete until it is enough; how often."""
        randomness, count = random.Random(seed), 0
        with httpx.Client(base_url=self.service.url, timeout=60) as client:
            while not self.done.is_set():
                study, series = randomness.randint(1, STUDIES + 1), randomness.randint(1, SERIES + 1)
                match randomness.choice(["store", "store", "store", "delete", "delete series"]):
                    case "store":
                        made = self.make(randomness, study, series)
                        headers = {"Content-Type": "application/dicom"}
                        client.post("/v2/studies", content=made.content, headers=headers).raise_for_status()
                    case "delete":
                        with self._lock:
                            place = randomness.choice(list(self.known)).split("/")
                        client.delete("/v2/studies/{}/series/{}/instances/{}".format(*place))
                    case _:
                        client.delete(f"/v2/studies/1.2.{study}/series/1.2.{study}.{series}")
                count += 1
        return count

    def changes(self) -> list[tuple[int, str, str]]:
        """The whole change feed: (number, action, identifier)."""
        found: list[tuple[int, str, str]] = []
        while True:
            after = found[-1][0] if found else 0
            parameters = f"offset={after}&limit=200&includeMetadata=false"
            page = httpx.get(f"{self.service.url}/v2/changefeed?{parameters}", timeout=60).json()
            if not page:
                return found
            uids = ("studyInstanceUid", "seriesInstanceUid", "sopInstanceUid")
            found += [(each["sequence"], each["action"], "/".join(each[uid] for uid in uids)) for each in page]

    def cutoff(self, operation_id: str) -> int:
        database = sqlite3.connect(f"file:{self.service.data_dir / 'depot.sqlite'}?mode=ro", uri=True)
        [(cutoff,)] = database.execute("SELECT cutoff FROM operations WHERE id = ?", (operation_id,)).fetchall()
        database.close()
        return int(cutoff)

    def matching(self, number: int, live: list[str]) -> set[str]:
        """What a query finds among `live`, which is in the order of storing: the last one speaks for its study and its
        series.
        """
        of_study = {each.split("/")[0]: self.known[each] for each in live}
        of_series = {each.split("/")[1]: self.known[each] for each in live}
        modalities = {(each.split("/")[0], of_series[each.split("/")[1]].modality) for each in live}

        def is_wanted(each: str) -> bool:
            study, series, _ = each.split("/")
            match number:
                case 0:
                    return of_series[series].modality == "CT" and of_study[study].date < "2025"
                case 1:
                    return of_study[study].date < "2025"
                case 2:
                    return (study, "MR") in modalities and of_study[study].patient == "even"
                case _:
                    return of_study[study].date > "2025" and self.known[each].number == 2

        return {each for each in live if is_wanted(each)}


@pytest.fixture
def busy(tmp_path: Path, azurite: Azurite) -> Iterator[Busy]:
    settings = {"chunk_instances": 2, "export_allowed_endpoints": azurite.account_url, "delete_delay_seconds": 0}
    with running_service(tmp_path / "data", **settings) as service:
        busy = Busy(service)
        randomness = random.Random(0)
        made = [
            busy.make(randomness, study, series)
            for study in range(1, STUDIES + 1)
            for series in range(1, SERIES + 1)
            for _ in range(FIRST)
        ]
        with httpx.Client(base_url=service.url, timeout=60) as client:
            for each in made:
                headers = {"Content-Type": "application/dicom"}
                client.post("/v2/studies", content=each.content, headers=headers).raise_for_status()
        yield busy


def test_what_matched_at_the_cut_off_is_exported(busy: Busy, azurite: Azurite) -> None:
    container = azurite.create_container()
    destination = azure_destination(azurite.container_url(container, azurite.container_sas(container, "cw")))
    started: list[tuple[str, int]] = []
    with ThreadPoolExecutor(3) as pool:
        disturbing = [pool.submit(busy.disturb, seed) for seed in range(3)]
        until = time.monotonic() + SECONDS
        while time.monotonic() < until or len(started) < len(QUERIES):
            number = len(started) % len(QUERIES)
            level, filters = QUERIES[number]
            source = {"type": "query", "settings": {"level": level, "filters": filters}}
            answer = busy.service.export({"source": source, "destination": destination})
            assert answer.status_code == 202, answer.text
            started.append((answer.json()["id"], number))
            time.sleep(SECONDS / 8)
        states = [busy.service.wait(operation_id) for operation_id, _ in started]
        busy.done.set()
        assert min(each.result() for each in disturbing) > 0

    changes = busy.changes()
    tree = azurite.read_tree(container)
    found = 0
    for (operation_id, number), state in zip(started, states, strict=True):
        cutoff = busy.cutoff(operation_id)
        assert cutoff < changes[-1][0], "something happened after it"
        live: dict[str, None] = {}
        for sequence, action, identifier in changes:
            if sequence <= cutoff and action == "Create":
                live[identifier] = None
            elif sequence <= cutoff:
                live.pop(identifier, None)
        expected = busy.matching(number, list(live))
        exported = {
            key.removeprefix(f"{operation_id}/results/").removesuffix(".dcm"): content
            for key, content in tree.items()
            if key.startswith(f"{operation_id}/results/")
        }
        assert exported == {each: busy.known[each].content for each in expected}, QUERIES[number]
        assert tree[f"{operation_id}/errors.log"] == b""
        results = state["results"]
        assert (results["exported"], results["total"], results["skipped"]) == (len(expected), len(expected), 0)
        assert results["bytes"] == sum(map(len, exported.values()))
        found += len(expected)
    assert found > 0
