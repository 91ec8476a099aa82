"""Pages of a search over thousands of instances, while other clients store more that match."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from dicomweb_client.api import DICOMwebClient

from dicom_depot.testing.samples import make_uid, many_small
from tests.http.dicomweb.conftest import RELATED, multipart
from tests.support.searched import first
from tests.support.service import RunningService, run_command, running_service

INSTANCES, SERIES, STUDIES = 5000, 100, 25
WRITERS = 3
TAGS = {"studies": "0020000D", "series": "0020000E", "instances": "00080018"}
SEARCHES: tuple[tuple[str, int, dict[str, str]], ...] = (
    ("instances", 200, {"PatientID": "SYNTHETIC*"}),
    ("instances", 200, {"Modality": "CT"}),
    ("instances", 200, {}),
    ("series", 9, {"PatientID": "SYNTHETIC*", "Modality": "CT"}),
    ("studies", 4, {"ModalitiesInStudy": "CT"}),
)
"""What is searched, the size of a page, and the query."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """5,000 instances in 100 series of 25 studies."""
    folder = tmp_path_factory.mktemp("paging")
    for sample in many_small(INSTANCES, size_bytes=0):
        path = folder / "files" / sample.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.content)
    run_command("import", str(folder / "files"), data_dir=folder / "data")
    with running_service(folder / "data") as running:
        yield running


@pytest.fixture(scope="module")
def quiet(service: RunningService) -> dict[str, list[str]]:
    """What each resource's pages hold while nobody stores."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        found = {name: read_all(client, name, 200, {}) for name in TAGS}
    assert {name: len(set(uids)) for name, uids in found.items()} == {
        "studies": STUDIES,
        "series": SERIES,
        "instances": INSTANCES,
    }
    return found


def read_all(client: httpx.Client, name: str, limit: int, query: dict[str, str]) -> list[str]:
    """Page after page until there is none, as a client does."""
    found: list[str] = []
    while True:
        answer = client.get(f"/v2/{name}", params={"limit": limit, "offset": len(found), **query})
        if answer.status_code == 204:
            return found
        page = [first(each, TAGS[name]) for each in answer.raise_for_status().json()]
        assert len(page) <= limit
        assert "Warning" not in answer.headers or len(page) == limit
        found += page


@dataclass
class Writers:
    """Clients that store instances that match too, in new studies and in those that are there."""

    service: RunningService
    stored: int = 0
    is_done: threading.Event = field(default_factory=threading.Event)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _runs: int = 0

    @contextmanager
    def storing(self) -> Iterator[None]:
        """They are at it before the block begins and until it ends."""
        self.is_done.clear()
        before = self.stored
        with ThreadPoolExecutor(WRITERS) as pool:
            self._runs += 1
            running = [pool.submit(self._write, WRITERS * self._runs + number) for number in range(WRITERS)]
            try:
                while self.stored == before and not any(each.done() for each in running):
                    self.is_done.wait(0.01)
                yield
            finally:
                self.is_done.set()
            for each in running:
                each.result()

    def _write(self, writer: int) -> None:
        known, fresh = many_small(INSTANCES, size_bytes=0), many_small(INSTANCES, 0, 1, 1, seed=writer)
        with httpx.Client(base_url=self.service.url, timeout=60) as client:
            while not self.is_done.is_set():
                sample = next(known)
                sop = sample.ref.sop_instance_uid
                beside = sample.content.replace(sop.encode(), make_uid("writer", writer, sop).encode())
                answer = client.post(
                    "/v2/studies",
                    content=multipart(beside, next(fresh).content),
                    headers={"Content-Type": RELATED},
                )
                assert "00081198" not in answer.raise_for_status().json()
                with self._turn:
                    self.stored += 2


@pytest.fixture(scope="module")
def writers(service: RunningService) -> Writers:
    return Writers(service)


@pytest.mark.parametrize(("name", "limit", "query"), SEARCHES, ids=str)
def test_pages_hold_each_result_once_and_in_order_while_others_store(
    service: RunningService,
    quiet: dict[str, list[str]],
    writers: Writers,
    name: str,
    limit: int,
    query: dict[str, str],
) -> None:
    before = writers.stored
    with writers.storing(), httpx.Client(base_url=service.url, timeout=60) as client:
        found = read_all(client, name, limit, query)
    assert writers.stored > before + 2, "they stored while the pages were read"
    assert len(set(found)) == len(found)
    assert found[-len(quiet[name]) :] == quiet[name], "what came later stands before it, and nothing between"


def test_the_python_client_gets_the_remaining_ones_while_others_store(
    service: RunningService, quiet: dict[str, list[str]], writers: Writers
) -> None:
    client = DICOMwebClient(f"{service.url}/v2")
    with writers.storing():
        results: list[dict[str, Any]] = client.search_for_instances(
            search_filters={"PatientID": "SYNTHETIC*"}, limit=200, get_remaining=True
        )
    found = [first(each, "00080018") for each in results]
    assert len(set(found)) == len(found)
    assert found[-INSTANCES:] == quiet["instances"]


def test_a_page_has_100_results_unless_another_limit_is_given(
    service: RunningService, quiet: dict[str, list[str]]
) -> None:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        answer = client.get("/v2/instances", params={"PatientID": "SYNTHETIC000000"})
        assert len(answer.json()) == 100
        count = int(answer.headers["Warning"].split(" additional ")[0].rpartition(" ")[2])
        assert count >= INSTANCES - 100
        last = client.get("/v2/instances", params={"PatientID": "SYNTHETIC000000", "offset": count})
        assert [first(each, "00080018") for each in last.json()] == quiet["instances"][-100:]
        assert "Warning" not in last.headers


def test_another_client_that_asks_the_same_does_not_move_the_pages(
    service: RunningService, quiet: dict[str, list[str]], writers: Writers
) -> None:
    """Where nobody signs in, all are one caller; they are told apart by their connections."""
    with (
        writers.storing(),
        httpx.Client(base_url=service.url, timeout=60) as client,
        httpx.Client(base_url=service.url, timeout=60) as other,
    ):
        found: list[str] = []
        while len(found) < 1000:
            page = client.get("/v2/instances", params={"limit": 200, "offset": len(found)})
            found += [first(each, "00080018") for each in page.json()]
            other.get("/v2/instances", params={"limit": 200}).raise_for_status()
    assert len(set(found)) == len(found)
