"""kill -9 while clients store over HTTP: what was acknowledged is there, and of the rest nothing half."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.testing.samples import Sample, many_small
from tests.durability.processes import is_alive
from tests.support.service import RunningService, run_command

_CLIENTS = 4
_LARGE_BYTES = 1_500_000
"""More than what is kept in memory until it is whole: such an instance goes to the store as it arrives."""
_AS_STORED = {"Accept": "application/dicom; transfer-syntax=*"}
_ALREADY_THERE = 45070


def _body(samples: Sequence[Sample]) -> tuple[bytes, dict[str, str]]:
    """One instance as it is, more of them as parts (PS3.18 section 10.5.1)."""
    if len(samples) == 1:
        return samples[0].content, {"Content-Type": "application/dicom"}
    parts = [b"--cut\r\nContent-Type: application/dicom\r\n\r\n" + each.content + b"\r\n" for each in samples]
    return b"".join([*parts, b"--cut--\r\n"]), {
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=cut'
    }


def _path(ref: InstanceRef) -> str:
    return f"/v2/studies/{ref.study_uid}/series/{ref.series_uid}/instances/{ref.sop_instance_uid}"


def _requests(client: int) -> Iterator[list[Sample]]:
    """Requests of one instance and of five in turn; each twentieth instance is large."""
    samples = many_small(10**6, 1200, seed=client)
    large = many_small(10**6, _LARGE_BYTES, seed=1000 + client)
    for number in itertools.count():
        request = list(itertools.islice(samples, 5 if number % 2 else 1))
        if number % 7 == 3:
            request[-1] = next(large)
        yield request


@dataclass
class Clients:
    """Threads that store, whatever happens to the service, until they are told to stop."""

    url: str
    acknowledged: list[list[Sample]] = field(default_factory=list)
    unknown: list[list[Sample]] = field(default_factory=list)
    """Requests that had been begun and got no answer."""
    unexpected: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, number: int) -> None:
        requests = _requests(number)
        request = next(requests)
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self.stopped.is_set():
                content, headers = _body(request)
                try:
                    answer = client.post("/v2/studies", content=content, headers=headers)
                except httpx.ConnectError:
                    time.sleep(0.02)
                    continue
                except httpx.TransportError as error:
                    self.errors[type(error).__name__] += 1
                    self.unknown.append(request)
                else:
                    if answer.status_code == 200:
                        self.acknowledged.append(request)
                    else:
                        self.unexpected.append(f"{answer.status_code}: {answer.text[:300]}")
                request = next(requests)


def _kill_all(service: RunningService) -> None:
    workers = service.workers()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    service.kill_parent()
    deadline = time.monotonic() + 5
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _check(service: RunningService, *arguments: str) -> dict[str, Any]:
    ended = run_command("check", "--json", *arguments, data_dir=service.data_dir, check=False)
    assert ended.returncode in {0, 3}, ended.stderr
    return dict(json.loads(ended.stdout))


def _row_count(service: RunningService, table: str, where: str = "1") -> int:
    with closing(sqlite3.connect(service.data_dir / "depot.sqlite")) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0])  # noqa: S608


def _object_count(service: RunningService) -> int:
    """Every file in the store's folders, leftovers too."""
    return sum(path.is_file() for path in (service.data_dir / "store").glob("*/*"))


def _fetched(service: RunningService, samples: Sequence[Sample]) -> list[bytes | None]:
    """Each as it is stored; None where there is none."""

    def fetch(some: Sequence[Sample]) -> list[bytes | None]:
        found: list[bytes | None] = []
        with httpx.Client(base_url=service.url, timeout=30) as client:
            for each in some:
                answer = client.get(_path(each.ref), headers=_AS_STORED)
                assert answer.status_code in {200, 404}, answer.text
                found.append(answer.content if answer.status_code == 200 else None)
        return found

    cut = -(-len(samples) // _CLIENTS) or 1
    with ThreadPoolExecutor(_CLIENTS) as pool:
        parts = pool.map(fetch, [samples[start : start + cut] for start in range(0, len(samples), cut)])
        return [content for part in parts for content in part]


def _change_feed(service: RunningService) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    with httpx.Client(base_url=service.url, timeout=30) as client:
        while True:
            last = entries[-1]["sequence"] if entries else 0
            parameters = {"offset": last, "limit": 200, "includeMetadata": "false"}
            page = client.get("/v2/changefeed", params=parameters).raise_for_status().json()
            if not page:
                return entries
            entries += page


def _described(service: RunningService, samples: Sequence[Sample]) -> set[str]:
    """The instances that the metadata of their studies names."""
    found: set[str] = set()
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for study in {str(each.ref.study_uid) for each in samples}:
            answer = client.get(f"/v2/studies/{study}/metadata")
            if answer.status_code != 404:
                found.update(each["00080018"]["Value"][0] for each in answer.raise_for_status().json())
    return found


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 1), pytest.param(20, None, marks=pytest.mark.long)], ids=["4 kills", "20 kills"]
)
def test_what_was_acknowledged_is_there_after_every_kill_and_of_the_rest_nothing_half(
    tmp_path: Path, kills: int, seed: int | None
) -> None:
    seed = seed if seed is not None else Random().randrange(1 << 32)
    print(f"seed {seed}")
    randomness = Random(seed)
    service = RunningService(tmp_path / "data")
    service.start()
    clients = Clients(service.url)
    hits = 0
    try:
        with ThreadPoolExecutor(_CLIENTS) as pool:
            threads = [pool.submit(clients.run, number) for number in range(_CLIENTS)]
            try:
                for _ in range(kills):
                    done = len(clients.acknowledged)
                    while len(clients.acknowledged) < done + 10 and not any(thread.done() for thread in threads):
                        time.sleep(0.01)
                    time.sleep(randomness.uniform(0, 1))
                    unknown = len(clients.unknown)
                    _kill_all(service)
                    time.sleep(0.05)
                    hits += len(clients.unknown) > unknown
                    service.start()
            finally:
                clients.stopped.set()
            for thread in threads:
                thread.result()
        assert clients.unexpected == []
        assert hits >= kills * 0.8, "most kills must meet a request"
        _assert_whole(service, clients)
    finally:
        service.stop()


def _assert_whole(service: RunningService, clients: Clients) -> None:
    acknowledged = [each for request in clients.acknowledged for each in request]
    unknown = [each for request in clients.unknown for each in request]
    service.stop()

    repaired = _check(service, "--repair", "--older-than", "0")
    found = {kind: count for kind, count in repaired["found"].items() if count}
    print(f"{len(acknowledged)} acknowledged, {len(unknown)} unknown, found by the check: {found}")
    print(f"errors that the clients saw: {dict(clients.errors)}")
    assert found.keys() <= {"orphan", "leftover"}, "a live row without its whole object"
    assert repaired["remaining"] == repaired["young"] == 0
    assert _object_count(service) == _row_count(service, "instances") == repaired["instances"]

    service.start()
    assert _fetched(service, acknowledged) == [each.content for each in acknowledged]
    present = []
    for request in clients.unknown:
        contents = _fetched(service, request)
        assert contents in ([each.content for each in request], [None] * len(request)), "a request that is half there"
        present += request if contents[0] is not None else []
    print(f"{len(present)} of the unknown were stored")
    stored = Counter(str(each.ref.sop_instance_uid) for each in (*acknowledged, *present))
    assert set(stored.values()) == {1}
    assert _described(service, [*acknowledged, *unknown]) == stored.keys()
    feed = _change_feed(service)
    assert [entry["sequence"] for entry in feed] == list(range(1, len(feed) + 1))
    assert {(entry["action"], entry["state"]) for entry in feed} == {("Create", "Current")}
    assert Counter(entry["sopInstanceUid"] for entry in feed) == stored

    _send_again(service, clients.unknown)
    everything = [*acknowledged, *unknown]
    assert _fetched(service, everything) == [each.content for each in everything]
    assert len(_change_feed(service)) == _row_count(service, "instances", "deleted_sequence = 0") == len(everything)
    again = _check(service, "--older-than", "0")
    assert (sum(again["found"].values()), again["young"], again["instances"]) == (0, 0, len(everything))


def _send_again(service: RunningService, requests: Sequence[Sequence[Sample]]) -> None:
    """What is there already is said to be, and is no reason to refuse the others."""
    with httpx.Client(base_url=service.url, timeout=30) as client:
        for request in requests:
            content, headers = _body(request)
            answer = client.post("/v2/studies", content=content, headers=headers)
            assert answer.status_code in {200, 202, 409}, answer.text
            reasons = re.findall(r'"00081197":\{"vr":"US","Value":\[(\d+)\]\}', answer.text)
            assert set(reasons) <= {str(_ALREADY_THERE)}, answer.text
            assert (answer.status_code == 409) == (len(reasons) == len(request))
