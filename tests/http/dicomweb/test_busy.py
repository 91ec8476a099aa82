"""Transcoding is slow, and many may ask for it at once: nobody else waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dicom_depot.testing.samples import ct_volume
from tests.support.service import RunningService, running_service

ASKING = 48
"""More than the threads that all other requests share."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with running_service(tmp_path / "data") as running:
        yield running


def test_health_and_stores_are_answered_while_very_many_wait_for_transcoding(service: RunningService) -> None:
    [large], [small] = ct_volume(1, 512, 512), ct_volume(1, 16, 16, seed=1)
    kind = {"Content-Type": "application/dicom"}
    assert httpx.post(f"{service.url}/v2/studies", content=large.content, headers=kind).status_code == 200
    wanted = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=1.2.840.10008.1.2.4.90'}

    def retrieve(_: int) -> int:
        return httpx.get(f"{service.url}/v2/studies/{large.ref.study_uid}", headers=wanted, timeout=120).status_code

    with ThreadPoolExecutor(ASKING) as pool:
        retrievals = [pool.submit(retrieve, number) for number in range(ASKING)]
        while not any(each.done() for each in retrievals):  # until they are at work
            assert httpx.get(f"{service.url}/health/check", timeout=60).status_code == 200
        assert (
            httpx.post(f"{service.url}/v2/studies", content=small.content, headers=kind, timeout=60).status_code == 200
        )
        assert httpx.get(f"{service.url}/health/check", timeout=60).status_code == 200
        assert sum(not each.done() for each in retrievals) > ASKING // 2, "the others did not wait for these"
        assert {each.result() for each in retrievals} == {200}
