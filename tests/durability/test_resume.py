"""Resuming as a caller sees it: the service in its own processes, a storage endpoint that withdraws rights, a real
Azurite with signatures that expire, and deaths.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dicom_depot.testing.samples import many_small
from tests.support.archive import Archive, import_in_process, instance_keys, log_lines, read_folder
from tests.support.azurite import ACCOUNT_NAME, Azurite
from tests.support.fault_endpoint import Attempt, Delay, FaultEndpoint, Respond, Rule
from tests.support.service import RunningService, azure_destination, export_body, file_destination, running_service
from tests.support.slow_proxy import SlowProxy

_COUNT = 60
_CORRUPT, _MISSING = 7, 33
_SETTINGS: dict[str, object] = {"chunk_instances": 8, "export_concurrency": 4}
_SIGNATURE = "sv=x&sig=a-first-secret"
_FRESH_SIGNATURE = "sv=x&sig=a-fresh-secret"


@dataclass
class Withdrawal:
    """The right to write to one container, lost after some instances were written. `grant()` gives it back."""

    container: str
    after: int
    is_withdrawn: bool = True
    written: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refuses(self, attempt: Attempt) -> bool:
        if attempt.container != self.container or not self.is_withdrawn:
            return False
        with self._lock:
            if attempt.blob.endswith(".dcm"):
                self.written += 1
                return self.written > self.after
            return self.written >= max(1, self.after)  # the log, but not its creation

    def grant(self) -> None:
        self.is_withdrawn = False


@dataclass
class Place:
    """The running service, its archive, and the endpoint that it may export to."""

    service: RunningService
    archive: Archive
    endpoint: FaultEndpoint
    sources: list[str]

    def withdraw(self, container: str, after: int) -> Withdrawal:
        withdrawal = Withdrawal(container, after)
        self.endpoint.add_rule(Rule(Respond(403, "AuthorizationPermissionMismatch"), when=withdrawal.refuses))
        return withdrawal

    def delay(self, container: str, seconds: float) -> Rule:
        return self.endpoint.add_rule(
            Rule(Delay(seconds), blob="*.dcm", when=lambda attempt: attempt.container == container)
        )

    def destination(self, container: str, signature: str = _SIGNATURE) -> dict[str, Any]:
        return azure_destination(self.endpoint.container_url(container, signature))

    def start(self, destination: dict[str, Any]) -> str:
        answer = self.service.export(export_body(destination, *self.sources))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def resume(self, operation_id: str, destination: dict[str, Any] | None = None) -> httpx.Response:
        return _resume(self.service, operation_id, destination)

    def assert_exact(self, operation_id: str, container: str, expected: Expected) -> None:
        """Wait for the end, and compare what lies in a container of the endpoint."""
        state = self.service.wait(operation_id)
        _assert_exact(state, self.endpoint.read_tree(container), expected, self.archive)

    def failed(self, container: str, after: int = 20) -> tuple[str, Withdrawal]:
        """An operation that lost its right to write."""
        withdrawal = self.withdraw(container, after)
        operation_id = self.start(self.destination(container))
        assert self.service.wait(operation_id)["status"] == "failed"
        return operation_id, withdrawal


def _resume(service: RunningService, operation_id: str, destination: dict[str, Any] | None = None) -> httpx.Response:
    url = f"{service.url}/v2/operations/{operation_id}/resume"
    if destination is None:
        return httpx.post(url, timeout=60)
    return httpx.post(url, json={"destination": destination}, timeout=60)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    samples = many_small(_COUNT, 1200, instances_per_series=10, series_per_study=2)
    made = import_in_process(tmp_path_factory.mktemp("archive"), samples)
    made.damage(corrupt=[made.identifiers[_CORRUPT]], missing=[made.identifiers[_MISSING]])
    return made


@pytest.fixture(scope="module")
def sources(archive: Archive) -> list[str]:
    studies = list(dict.fromkeys(identifier.split("/")[0] for identifier in archive.identifiers))
    return [*studies, "1.2.3", f"{studies[0]}/1.2.3"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[FaultEndpoint]:
    with FaultEndpoint() as running:
        yield running


@pytest.fixture(scope="module")
def slow_azurite(azurite: Azurite) -> Iterator[SlowProxy]:
    with SlowProxy(urlsplit(azurite.account_url).port or 0) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def place(
    archive: Archive,
    sources: list[str],
    endpoint: FaultEndpoint,
    slow_azurite: SlowProxy,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "out").mkdir()
    with running_service(
        archive.copy_to(folder / "data").data_dir,
        **_SETTINGS,
        export_root=folder / "out",
        export_allowed_endpoints=f"{endpoint.account_url},http://127.0.0.1:{slow_azurite.port}/{ACCOUNT_NAME}",
    ) as service:
        yield Place(service, archive, endpoint, sources)


@dataclass(frozen=True)
class Expected:
    """How an undisturbed export of the same identifiers ended."""

    results: dict[str, Any]
    log: list[tuple[str, str]]
    operation_id: str


@pytest.fixture(scope="module")
def expected(place: Place) -> Expected:
    operation_id = place.start(place.destination("undisturbed"))
    state = place.service.wait(operation_id)
    assert state["status"] == "succeeded"
    log = place.endpoint.read_tree("undisturbed")[f"{operation_id}/errors.log"]
    counts = {name: state["results"][name] for name in ("total", "exported", "skipped", "bytes")}
    assert (counts["total"], counts["exported"], counts["skipped"]) == (_COUNT + 2, _COUNT - 2, 4)
    return Expected(counts, log_lines(log), operation_id)


def _assert_exact(state: dict[str, Any], tree: dict[str, bytes], expected: Expected, archive: Archive) -> None:
    """Counts, copies and log are those of an undisturbed export: each failure once, in the same order."""
    assert state["status"] == "succeeded", state
    assert "error" not in state
    assert state["percentComplete"] == 100
    assert {name: state["results"][name] for name in expected.results} == expected.results
    operation_id = state["operationId"]
    skipped = {archive.identifiers[_CORRUPT], archive.identifiers[_MISSING]}
    keys = instance_keys(operation_id, set(archive.identifiers) - skipped)
    log = tree.pop(f"{operation_id}/errors.log")
    assert tree == {key: archive.contents[identifier] for identifier, key in keys.items()}
    assert log_lines(log) == expected.log


@pytest.mark.parametrize("after", [0, 23, _COUNT - 2])
def test_a_right_that_is_withdrawn_and_granted_again(place: Place, expected: Expected, after: int) -> None:
    """In the middle of the first chunk, in a later one, and when only the log was left to write."""
    container = f"withdrawn-{after}"
    operation_id, withdrawal = place.failed(container, after)
    state = place.service.operation(operation_id)
    assert state["results"]["exported"] <= after
    refused = place.service.export(export_body(place.destination(container)))
    assert refused.status_code == 400
    assert state["error"] == {name: refused.json()[name] for name in ("code", "message")}
    assert state["error"]["code"] == "AuthorizationPermissionMismatch"

    still_refused = place.resume(operation_id, place.destination(container, _FRESH_SIGNATURE))
    assert still_refused.status_code == 400
    assert {name: still_refused.json()[name] for name in ("code", "message")} == state["error"]
    assert place.service.operation(operation_id) == state

    withdrawal.grant()
    accepted = place.resume(operation_id, place.destination(container, _FRESH_SIGNATURE))
    assert accepted.status_code == 202, accepted.text
    assert accepted.headers["Location"] == f"{place.service.url}/v2/operations/{operation_id}"
    assert int(accepted.headers["Retry-After"]) > 0
    assert accepted.json()["status"] == "running"
    assert accepted.json()["operationId"] == operation_id
    assert accepted.json()["createdTime"] == state["createdTime"]
    assert "error" not in accepted.json()
    place.assert_exact(operation_id, container, expected)


def test_a_signature_that_expires_is_replaced_by_a_fresh_one(
    place: Place, azurite: Azurite, slow_azurite: SlowProxy, expected: Expected
) -> None:
    container = azurite.create_container()

    def destination(permissions: str, lifetime: timedelta) -> dict[str, Any]:
        sas = azurite.container_sas(container, permissions, expires_in=lifetime)
        return azure_destination(f"http://127.0.0.1:{slow_azurite.port}/{ACCOUNT_NAME}/{container}?{sas}")

    expiring = destination("cw", timedelta(seconds=5))
    operation_id = place.start(expiring)
    slow_azurite.seconds = 0.7
    state = place.service.wait(operation_id)
    slow_azurite.seconds = 0.0
    assert state["status"] == "failed"
    assert 0 < state["results"]["exported"] < expected.results["exported"]
    assert container in state["error"]["message"]

    for unfit in (expiring, destination("r", timedelta(hours=1)), destination("c", timedelta(hours=1))):
        refused = place.resume(operation_id, unfit)
        assert refused.status_code == 400
        assert refused.json()["target"] == "destination.settings"
        assert place.service.operation(operation_id) == state
    assert place.resume(operation_id, destination("cw", timedelta(hours=1))).status_code == 202
    end = place.service.wait(operation_id)
    _assert_exact(end, azurite.read_tree(container), expected, place.archive)


def test_one_that_was_canceled_midway_goes_on(place: Place, expected: Expected) -> None:
    container = "canceled"
    slowness = place.delay(container, 0.1)
    operation_id = place.start(place.destination(container))
    _wait_until(lambda: place.service.operation(operation_id)["results"]["exported"] > 0)
    canceled = httpx.post(f"{place.service.url}/v2/operations/{operation_id}/cancel", timeout=30)
    assert canceled.status_code == 202
    stopping = place.resume(operation_id, place.destination(container))
    assert stopping.status_code in (202, 409)
    if stopping.status_code == 409:
        assert "still stopping" in stopping.json()["message"]
        state = place.service.wait(operation_id)
        assert state["status"] == "canceled"
        assert 0 < state["results"]["exported"] < expected.results["exported"]
        assert place.resume(operation_id, place.destination(container)).status_code == 202
    assert httpx.get(f"{place.service.url}/v1/operations/{operation_id}").status_code == 202
    slowness.enabled = False
    place.assert_exact(operation_id, container, expected)


def test_of_two_requests_at_once_one_resumes_it(place: Place, expected: Expected) -> None:
    operation_id, withdrawal = place.failed("twice")
    withdrawal.grant()
    slowness = place.delay("twice", 0.05)
    destinations = [place.destination("twice", f"sv=x&sig=secret-{number}") for number in range(4)]
    with ThreadPoolExecutor(len(destinations)) as pool:
        answers = list(pool.map(lambda destination: place.resume(operation_id, destination), destinations))
    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409]
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"Conflict"}
    slowness.enabled = False
    place.assert_exact(operation_id, "twice", expected)


def test_what_runs_or_succeeded_is_not_resumed(place: Place, expected: Expected) -> None:
    place.delay("running", 0.2)
    operation_id = place.start(place.destination("running"))
    running = place.resume(operation_id, place.destination("running"))
    assert (running.status_code, running.json()["code"]) == (409, "Conflict")
    assert "running already" in running.json()["message"]
    httpx.post(f"{place.service.url}/v2/operations/{operation_id}/cancel", timeout=30)

    before = place.service.operation(expected.operation_id)
    succeeded = place.resume(expected.operation_id, place.destination("undisturbed"))
    assert (succeeded.status_code, succeeded.json()["code"]) == (409, "Conflict")
    assert "nothing to resume" in succeeded.json()["message"]
    assert place.service.operation(expected.operation_id) == before

    assert place.resume("0" * 32).status_code == 404
    assert place.resume("no id").status_code == 404


def test_only_the_same_place_with_a_fresh_secret_is_taken(place: Place, expected: Expected) -> None:
    operation_id, withdrawal = place.failed("moved")
    withdrawal.grant()
    state = place.service.operation(operation_id)

    without = place.resume(operation_id)
    assert (without.status_code, without.json()["code"]) == (409, "SecretErased")
    assert "fresh" in without.json()["message"]
    for elsewhere in (place.destination("elsewhere"), file_destination("moved")):
        differs = place.resume(operation_id, elsewhere)
        assert (differs.status_code, differs.json()["code"]) == (409, "DestinationDiffers")
        assert "container 'moved'" in differs.json()["message"]
        assert "secret" not in differs.text
    assert place.service.operation(operation_id) == state
    assert place.endpoint.read_tree("elsewhere") == {}
    assert place.resume(operation_id, place.destination("moved")).status_code == 202
    place.assert_exact(operation_id, "moved", expected)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 409),
        (b"{}", 409),
        (b"{", 400),
        (b"[]", 400),
        (b'{"destination": null}', 400),
        (b'{"destination": {"type": "file"}}', 400),
        (b'{"destination": {"type": "file", "settings": {"folder": ""}}, "source": null}', 400),
        (b'{"source": {"type": "identifiers", "settings": {"values": ["1"]}}}', 400),
    ],
)
def test_the_body_is_optional_and_strict(place: Place, expected: Expected, content: bytes, status: int) -> None:
    url = f"{place.service.url}/v1/operations/{expected.operation_id}/resume"
    answer = httpx.post(url, content=content, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"code", "message", "target"}
    if content:
        assert httpx.post(url, content=content, timeout=30).status_code == 415


def test_a_folder_needs_no_secret(place: Place, expected: Expected) -> None:
    root = Path(str(place.service.settings["export_root"]))
    operation_id = place.start(file_destination("research"))
    httpx.post(f"{place.service.url}/v2/operations/{operation_id}/cancel", timeout=30)
    if place.service.wait(operation_id)["status"] == "canceled":
        assert place.resume(operation_id).status_code == 202
    end = place.service.wait(operation_id)
    _assert_exact(end, read_folder(root / "research"), expected, place.archive)


def test_secrets_are_nowhere(place: Place) -> None:
    """Runs after the others: neither the first nor the fresh secrets are in the log, the trail or the databases."""
    folder = place.service.data_dir
    for path in [place.service.log_path, *(each for each in folder.iterdir() if each.is_file())]:
        content = path.read_bytes()
        for secret in (b"a-first-secret", b"a-fresh-secret", b"sig="):
            assert secret not in content, path


def test_deaths_after_the_resume(
    archive: Archive, sources: list[str], endpoint: FaultEndpoint, expected: Expected, tmp_path: Path
) -> None:
    """Right after the answer, and when the new attempt has copied something."""
    data = archive.copy_to(tmp_path / "data").data_dir
    with running_service(data, **_SETTINGS, export_allowed_endpoints=endpoint.account_url) as service:
        place = Place(service, archive, endpoint, sources)
        operation_id, withdrawal = place.failed("deaths")
        exported = service.operation(operation_id)["results"]["exported"]
        withdrawal.grant()
        slowness = place.delay("deaths", 0.1)
        assert place.resume(operation_id, place.destination("deaths", _FRESH_SIGNATURE)).status_code == 202
        _kill(service)
        service.start()
        _wait_until(lambda: service.operation(operation_id)["results"]["exported"] > exported)
        _kill(service)
        slowness.enabled = False
        service.start()
        place.assert_exact(operation_id, "deaths", expected)


def _kill(service: RunningService) -> None:
    """End all of its processes at once, without a chance to say goodbye."""
    workers = service.workers()
    service.kill_parent()
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
