"""The service beside an endpoint that fails on demand. No tests here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dicom_depot.testing.samples import many_small
from tests.support.archive import Archive, import_in_process, instance_keys, log_lines
from tests.support.fault_endpoint import Action, Attempt, FaultEndpoint, Rule
from tests.support.service import RunningService, azure_destination, running_service

REQUEST_SECONDS = 1.0
RETRY_SECONDS = 4.0
STREAM_BYTES = 1 << 20

When = Callable[[Attempt], bool]


@dataclass
class FaultsPlace:
    """A running service, an archive with damaged instances, and the endpoint, with a container for each test."""

    service: RunningService
    endpoint: FaultEndpoint
    archive: Archive
    sound: list[str]
    corrupt: str
    missing: str
    large: list[str]
    large_corrupt: str
    _containers: int = field(default=0)

    def new_container(self) -> str:
        self._containers += 1
        return f"container-{self._containers}"

    def begin(self, container: str, *identifiers: str) -> str:
        """Export to a container; without identifiers, every sound small instance."""
        destination = azure_destination(self.endpoint.container_url(container))
        return self.service.begin(destination, *(identifiers or self.sound))

    def add_rule(
        self,
        container: str,
        action: Action,
        *,
        blob: str = "*.dcm",
        when: When = lambda attempt: True,
        times: int | None = None,
    ) -> Rule:
        return self.endpoint.add_rule(
            Rule(action, "PUT", blob, lambda each: each.container == container and when(each), times=times)
        )

    def copies(self, container: str, operation_id: str) -> dict[str, bytes]:
        """Everything in the container but the operation's log."""
        tree = self.endpoint.read_tree(container)
        tree.pop(f"{operation_id}/errors.log")
        return tree

    def log(self, container: str, operation_id: str) -> list[tuple[str, str]]:
        return log_lines(self.endpoint.read_tree(container)[f"{operation_id}/errors.log"])

    def assert_silent(self, container: str) -> None:
        """Nothing is asked of the container any more."""
        place = f"/account/{container}/"
        seen = [each for each in self.endpoint.requests if each.path.startswith(place)]
        time.sleep(0.6)
        assert [each for each in self.endpoint.requests if each.path.startswith(place)] == seen

    def wait_for_copies(self, container: str, count: int) -> None:
        """Until an export is in full swing."""
        deadline = time.monotonic() + 60
        while len(self.endpoint.read_tree(container)) <= count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def assert_whole(
        self, container: str, operation_id: str, identifiers: list[str], skipped: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The export succeeded: `identifiers` are copied, `skipped` (by error code) are not, nothing else is there."""
        expected_skips = skipped or {}
        state = self.service.wait(operation_id)
        results = state["results"]
        assert state["status"] == "succeeded", state
        assert (results["exported"], results["skipped"]) == (len(identifiers), len(expected_skips)), state
        assert results["total"] == len(identifiers) + len(expected_skips)
        keys = instance_keys(operation_id, identifiers)
        expected = {keys[ref]: self.archive.contents[ref] for ref in identifiers}
        assert self.copies(container, operation_id) == expected
        log = self.log(container, operation_id)
        assert {ref: error.partition(":")[0] for ref, error in log} == expected_skips
        assert len(log) == len(expected_skips)
        return state


@contextmanager
def faults_place(root: Path, **settings: object) -> Iterator[FaultsPlace]:
    samples = [
        *many_small(300, 1200),
        *(large for seed in (1, 2, 3) for large in many_small(1, 12_000_000, seed=seed)),
    ]
    samples = [sample._replace(file_name=f"{number}.dcm") for number, sample in enumerate(samples)]
    archive = import_in_process(root, samples)
    refs = [str(sample.ref) for sample in samples]
    corrupt, missing, large_corrupt = refs[150], refs[151], refs[302]
    archive.damage(corrupt=[corrupt, large_corrupt], missing=[missing])
    sound = [ref for ref in refs[:300] if ref not in {corrupt, missing}]
    with FaultEndpoint() as endpoint:
        given = {
            "chunk_instances": 20,
            "export_concurrency": 8,
            "export_request_seconds": REQUEST_SECONDS,
            "export_retry_seconds": RETRY_SECONDS,
            "export_stream_bytes": STREAM_BYTES,
            "export_allowed_endpoints": endpoint.account_url,
        }
        with running_service(archive.data_dir, **(given | settings)) as service:
            yield FaultsPlace(service, endpoint, archive, sound, corrupt, missing, refs[300:302], large_corrupt)
