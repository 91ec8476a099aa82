"""kill -9 at any moment, start again: the export goes on by itself and ends like one that nothing disturbed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dicom_depot.testing.samples import many_small
from tests.durability.processes import is_alive
from tests.support.archive import Archive, import_by_command, instance_keys, log_lines, read_folder
from tests.support.fault_endpoint import Delay, FaultEndpoint, Hang, Respond, Rule
from tests.support.service import RunningService, azure_destination, file_destination

_COUNT = 5000
_CORRUPT = range(100, _COUNT, 900)
_MISSING = range(555, _COUNT, 1000)
_CONTAINER = "exports"
_CRASH_LOOP_SECONDS = 5.5
"""The parent takes a worker that dies sooner for one that will die always, and ends."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    archive = import_by_command(tmp_path_factory.mktemp("kill"), many_small(_COUNT, 1200))
    archive.damage(
        corrupt=[archive.identifiers[n] for n in _CORRUPT], missing=[archive.identifiers[n] for n in _MISSING]
    )
    return archive


@dataclass(frozen=True)
class Place:
    """A running service with everything around it."""

    archive: Archive
    service: RunningService
    endpoint: FaultEndpoint
    root: Path

    def tree(self, operation_id: str) -> dict[str, bytes]:
        """What an operation left at either destination, hidden and temporary files too."""
        return self.endpoint.read_tree(_CONTAINER, operation_id) or {
            f"{operation_id}/{path}": content for path, content in read_folder(self.root / operation_id).items()
        }


@pytest.fixture
def place(imported: Archive, tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "out").mkdir()
    archive = imported.copy_to(tmp_path / "data")
    with FaultEndpoint() as endpoint:
        settings = {
            "chunk_instances": 100,
            "export_concurrency": 4,
            "export_root": tmp_path / "out",
            "export_allowed_endpoints": endpoint.account_url,
        }
        service = RunningService(archive.data_dir, dict(settings))
        service.start()
        try:
            yield Place(archive, service, endpoint, tmp_path / "out")
        finally:
            service.stop()


def _sources(archive: Archive) -> list[str]:
    """Everything, by studies, series and instances, with six identifiers that match nothing in between."""
    refs = archive.identifiers
    studies = dict.fromkeys(ref.split("/")[0] for ref in refs[:2000])
    series = dict.fromkeys(ref.rpartition("/")[0] for ref in refs[2000:3000])
    unmatched = iter(_unmatched(archive))
    parts = (studies, series, refs[3000:4000], refs[4000:], (), ())
    return [ref for part in parts for ref in (next(unmatched), *part)]


def _unmatched(archive: Archive) -> list[str]:
    """Of every kind, three of them below an identifier that is listed too."""
    study, series = archive.identifiers[0].split("/")[0], archive.identifiers[2000].rpartition("/")[0]
    return ["1.2.3", "1.2.4/1.2.5", f"{study}/1.2.6", f"{series}/1.2.7", "1.2.3/1.2.8/1.2.9", f"{study}/1.2.6/1.2.10"]


@dataclass(frozen=True)
class End:
    """How an export ended, in terms that do not depend on its id and its times."""

    status: str
    results: dict[str, int]
    copies: dict[str, bytes]
    log: list[tuple[str, str]]


def _end(place: Place, operation_id: str) -> End:
    state = place.service.wait(operation_id)
    results = {name: value for name, value in state["results"].items() if name != "errorHref"}
    tree = {key.removeprefix(f"{operation_id}/"): content for key, content in place.tree(operation_id).items()}
    return End(state["status"], results, tree, log_lines(tree.pop("errors.log")))


def _assert_is_whole(end: End, archive: Archive) -> None:
    refs = archive.identifiers
    damaged = {refs[n] for n in (*_CORRUPT, *_MISSING)}
    keys = instance_keys("", archive.contents)
    assert end.status == "succeeded"
    assert end.results["total"] == end.results["exported"] + end.results["skipped"] == _COUNT + 6
    assert end.results["skipped"] == len(damaged) + 6
    assert end.copies == {keys[ref][1:]: archive.contents[ref] for ref in refs if ref not in damaged}
    assert {ref for ref, _ in end.log} == damaged | set(_unmatched(archive))
    assert len(end.log) == len(set(end.log)) == len(damaged) + 6


class Killer:
    """Kills the service's processes at random moments and, unless the parent does, brings it back."""

    def __init__(self, service: RunningService, randomness: Random) -> None:
        self._service = service
        self._randomness = randomness
        self._respawned_at = -_CRASH_LOOP_SECONDS

    def kill(self, kind: str, *, seconds_max: float = 1.0) -> None:
        """Kill once the service has run for a moment and, one time in four, again in the middle of its start."""
        service, randomness = self._service, self._randomness
        moment = randomness.uniform(0, seconds_max)
        if kind == "worker":
            time.sleep(max(moment, self._respawned_at + _CRASH_LOOP_SECONDS + 0.5 - time.monotonic()))
        else:
            time.sleep(moment)
        workers = service.workers()
        print(f"{kind} after {moment:.3f} s")
        match kind:
            case "worker":
                self._kill_worker(workers)
                return
            case "parent":
                service.kill_parent()
            case "both":
                self._kill_both(workers)
        _assert_gone(workers, within_seconds=2)
        if randomness.random() < 0.25:
            service.launch()
            time.sleep(randomness.uniform(0, 3))
            print("and in the middle of the start")
            self._kill_both(service.workers())
        service.start()
        self._respawned_at = -_CRASH_LOOP_SECONDS

    def _kill_worker(self, workers: list[int]) -> None:
        [worker] = workers
        os.kill(worker, signal.SIGKILL)
        self._respawned_at = time.monotonic()
        _assert_gone(workers, within_seconds=2)
        self._service.wait_until_answering()  # the parent lives, and brings another one

    def _kill_both(self, workers: list[int]) -> None:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        self._service.kill_parent()


def _assert_gone(pids: list[int], *, within_seconds: float) -> None:
    deadline = time.monotonic() + within_seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"{pids} still run after {within_seconds} seconds"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("kills", "seed"), [(8, 1), pytest.param(60, None, marks=pytest.mark.long)], ids=["8 kills", "60 kills"]
)
def test_killed_at_random_moments_every_export_ends_as_if_nothing_had_happened(
    place: Place, kills: int, seed: int | None
) -> None:
    seed = seed if seed is not None else Random().randrange(1 << 32)
    print(f"seed {seed}")
    randomness = Random(seed)
    killer = Killer(place.service, randomness)
    sources = _sources(place.archive)
    undisturbed = _end(place, place.service.begin(file_destination(""), *sources))
    _assert_is_whole(undisturbed, place.archive)

    place.endpoint.add_rule(Rule(Delay(0.01), method="PUT", blob="*.dcm"))
    destinations = [azure_destination(place.endpoint.container_url(_CONTAINER)), file_destination("")]
    running: list[str | None] = [None, None]
    begun: list[str] = []
    hits = 0
    kinds = [("parent", "worker", "both")[n % 3] for n in range(kills)]
    randomness.shuffle(kinds)
    for number, kind in enumerate(kinds):
        for n, destination in enumerate(destinations):
            present = running[n]
            # The folder takes an export in a few seconds; one for each ten kills will do.
            is_due = number % 10 == 0 if n else present is None or _remaining(place.service.operation(present)) < 1000
            if is_due:
                running[n] = place.service.begin(destination, *sources)
                begun.append(str(running[n]))
        killer.kill(kind)
        hits += any(place.service.operation(str(each))["status"] == "running" for each in running)
    assert hits >= kills * 0.9, "most kills must fall into a running export"
    for operation_id in begun:
        assert _end(place, operation_id) == undisturbed, operation_id
    assert {key.split("/")[0] for key in place.endpoint.read_tree(_CONTAINER)} <= set(begun)


def test_killed_while_it_plans_an_export_ends_as_if_nothing_had_happened(place: Place) -> None:
    unknown = [f"1.2.3/{number}" for number in range(12_000)]
    sources = [*unknown[:6_000], *place.archive.identifiers[:1000], *unknown[6_000:]]
    randomness = Random(2)
    killer = Killer(place.service, randomness)
    operation_id = place.service.begin(file_destination(""), *sources)
    planned = [0]
    for kind in ("both", "parent", "both"):
        while (total := place.service.operation(operation_id)["results"]["total"]) == planned[-1] < len(sources):
            time.sleep(0.005)
        planned.append(total)
        killer.kill(kind, seconds_max=0.1)
    print(f"planned at the kills: {planned[1:]} of {len(sources)}")
    assert planned[2] < len(sources), "at least two kills must fall into the planning"
    end = _end(place, operation_id)
    assert (end.status, end.results["total"]) == ("succeeded", len(sources))
    assert end == _end(place, place.service.begin(file_destination(""), *sources))


def test_killed_while_it_completes_the_log_an_export_ends_as_if_nothing_had_happened(place: Place) -> None:
    destination = azure_destination(place.endpoint.container_url(_CONTAINER))
    sources = _sources(place.archive)[:200]
    undisturbed = _end(place, place.service.begin(destination, *sources))
    failing = Rule(Respond(503), method="PUT", blob="*/errors.log", enabled=False)
    # Written, and nobody learns of it: the ETag that the service knows is outdated from then on.
    written_unknown = Rule(Hang(after_commit=True), method="PUT", blob="*/errors.log", times=1, enabled=False)
    for rule in (failing, written_unknown):
        place.endpoint.add_rule(rule)
    operation_id = place.service.begin(destination, *sources)
    failing.enabled = True
    while _remaining(place.service.operation(operation_id)):
        time.sleep(0.05)
    killer = Killer(place.service, Random(3))
    for kind in ("parent", "worker"):
        killer.kill(kind)
        assert place.service.operation(operation_id)["status"] == "running"
    failing.enabled, written_unknown.enabled = False, True
    while not written_unknown.acted_count:
        time.sleep(0.05)
    killer.kill("both")
    assert _end(place, operation_id) == undisturbed


def _remaining(state: dict[str, Any]) -> int:
    """Instances that an export has still to deal with; at least 1 before anything was planned."""
    results = state["results"]
    if state["status"] != "running":
        return 0
    return int(results["total"] - results["exported"] - results["skipped"]) if results["total"] else 1
