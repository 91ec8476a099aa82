"""Readers of the change feed beside writers over HTTP: each change once, in order, none missed."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from dicom_depot.testing.samples import Sample, many_small
from tests.support.service import RunningService, running_service

_WRITERS = 4
_SECONDS = 6.0
_PAGE = 37
_Story = dict[str, list[str]]
"""By SOP instance UID: what happened to it, in order."""


@pytest.fixture
def service(tmp_path: Path) -> Any:
    with running_service(tmp_path / "data") as running:
        yield running


class Writer:
    """Stores, replaces and deletes instances of its own study, and remembers what it did."""

    def __init__(self, url: str, number: int, until: float) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self._randomness = Random(number)
        self._until = until
        self._fresh = list(many_small(2000, 1000, series_per_study=1000, seed=number))
        self._live: dict[str, Sample] = {}
        self._gone: list[Sample] = []
        self.story: _Story = defaultdict(list)

    def run(self) -> _Story:
        with self._client:
            while time.monotonic() < self._until and self._fresh:
                self._randomness.choices(
                    [self._store, self._store_again, self._replace, self._delete, self._delete_study],
                    [50, 8, 25, 16, 1],
                )[0]()
        return self.story

    def _send(self, method: str, samples: list[Sample]) -> None:
        parts = [b"--cut\r\n\r\n" + each.content + b"\r\n" for each in samples]
        headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=cut'}
        answer = self._client.request(
            method, "/v2/studies", content=b"".join([*parts, b"--cut--\r\n"]), headers=headers
        )
        assert answer.status_code == 200, answer.text
        for each in samples:
            uid = str(each.ref.sop_instance_uid)
            self.story[uid].append("Update" if uid in self._live else "Create")
            self._live[uid] = each

    def _store(self) -> None:
        count = self._randomness.choice([1, 1, 1, 4])
        self._send("POST", [self._fresh.pop() for _ in range(count) if self._fresh])

    def _store_again(self) -> None:
        if self._gone:
            self._send("POST", [self._gone.pop()])

    def _replace(self) -> None:
        if self._live:
            chosen = self._randomness.choice(list(self._live.values()))
            change = self._randomness.randbytes(8)  # the last bytes are pixels
            changed = [Sample(chosen.ref, "", chosen.content[:-8] + bytes([n, *change[1:]])) for n in (1, 2)]
            self._send("PUT", changed[: self._randomness.choice([1, 2])])

    def _delete(self) -> None:
        if self._live:
            self._delete_at(self._randomness.choice(list(self._live.values())), is_study=False)

    def _delete_study(self) -> None:
        if self._live:
            self._delete_at(next(iter(self._live.values())), is_study=True)

    def _delete_at(self, chosen: Sample, *, is_study: bool) -> None:
        ref = chosen.ref
        path = f"/v2/studies/{ref.study_uid}"
        if not is_study:
            path += f"/series/{ref.series_uid}/instances/{ref.sop_instance_uid}"
        assert self._client.delete(path).status_code == 204
        for each in list(self._live.values()) if is_study else [chosen]:
            uid = str(each.ref.sop_instance_uid)
            self.story[uid].append("Delete")
            self._gone.append(self._live.pop(uid))


def _poll(client: httpx.Client, **parameters: object) -> httpx.Response:
    given = {"limit": _PAGE, "includeMetadata": "false"} | parameters
    return client.get("/v2/changefeed", params={name: str(value) for name, value in given.items()}).raise_for_status()


def _read_by_number(url: str, is_done: threading.Event) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    with httpx.Client(base_url=url, timeout=30) as client:
        while True:
            is_last = is_done.is_set()
            page = _poll(client, offset=entries[-1]["sequence"] if entries else 0).json()
            entries += page
            if is_last and not page:
                return entries


Clock = Callable[[httpx.Client], datetime]


def _own_clock(client: httpx.Client) -> datetime:
    return datetime.now(UTC)


def _service_date(client: httpx.Client) -> datetime:
    return parsedate_to_datetime(client.get("/health/check").headers["Date"])


def _last_entry(client: httpx.Client) -> datetime:
    latest = client.get("/v2/changefeed/latest", params={"includeMetadata": "false"})
    return datetime.fromisoformat(latest.json()["timestamp"]) if latest.content else datetime(2000, 1, 2, tzinfo=UTC)


def _read_by_time(url: str, is_done: threading.Event, clock: Clock) -> list[dict[str, Any]]:
    """Window after window, each up to what the clock says, and at the end one that takes the rest."""
    entries: list[dict[str, Any]] = []
    since = datetime(2000, 1, 1, tzinfo=UTC)
    with httpx.Client(base_url=url, timeout=30) as client:
        while True:
            is_last = is_done.is_set()
            before = datetime.now(UTC) + timedelta(days=1) if is_last else clock(client)
            if before <= since:
                time.sleep(0.01)
                continue
            found: list[dict[str, Any]] = []
            while page := _poll(
                client, startTime=since.isoformat(), endTime=before.isoformat(), offset=len(found)
            ).json():
                found += page
            assert all(since <= datetime.fromisoformat(each["timestamp"]) < before for each in found)
            entries += found
            since = before
            if is_last:
                return entries


def _story(entries: list[dict[str, Any]]) -> _Story:
    story: _Story = defaultdict(list)
    for entry in entries:
        story[entry["sopInstanceUid"]].append(entry["action"])
    return story


def test_readers_by_number_and_by_time_see_each_change_once_in_order(service: RunningService) -> None:
    is_done = threading.Event()
    readers: dict[str, Future[list[dict[str, Any]]]] = {}
    with ThreadPoolExecutor(_WRITERS + 4) as pool:
        readers["by number"] = pool.submit(_read_by_number, service.url, is_done)
        for clock in (_own_clock, _service_date, _last_entry):
            readers[clock.__name__] = pool.submit(_read_by_time, service.url, is_done, clock)
        try:
            until = time.monotonic() + _SECONDS
            writers = [pool.submit(Writer(service.url, number, until).run) for number in range(_WRITERS)]
            told: _Story = {uid: story for writer in writers for uid, story in writer.result().items()}
        finally:
            is_done.set()
        seen = {name: reader.result() for name, reader in readers.items()}
    count = sum(map(len, told.values()))
    print(f"{count} changes of {len(told)} instances")
    assert count > 100
    assert {action for story in told.values() for action in story} == {"Create", "Update", "Delete"}
    for name, entries in seen.items():
        assert [entry["sequence"] for entry in entries] == list(range(1, count + 1)), name
        assert _story(entries) == told, name
    _assert_states(service, told)


def _assert_states(service: RunningService, told: _Story) -> None:
    """At the end, each entry says what became of its version."""
    is_over = threading.Event()
    is_over.set()
    entries = _read_by_number(service.url, is_over)
    last = {entry["sopInstanceUid"]: entry["sequence"] for entry in entries}
    for entry in entries:
        uid = entry["sopInstanceUid"]
        if told[uid][-1] == "Delete":
            assert entry["state"] == "Deleted"
        else:
            assert entry["state"] == ("Current" if entry["sequence"] == last[uid] else "Replaced")
    times = [datetime.fromisoformat(entry["timestamp"]) for entry in entries]
    assert times == sorted(times)
