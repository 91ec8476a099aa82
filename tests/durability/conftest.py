"""What the durability tests share: archives that are imported once, and the service on a copy of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dicom_depot.testing.samples import many_small
from tests.support.archive import Archive, import_in_process
from tests.support.fault_endpoint import FaultEndpoint
from tests.support.service import RunningService

ServeArchive = Callable[..., RunningService]


@pytest.fixture(scope="session")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """300 instances in 3 studies of 2 series. Nobody may change it; `serve` works on copies."""
    samples = many_small(300, 1200, instances_per_series=50, series_per_study=2)
    return import_in_process(tmp_path_factory.mktemp("small"), samples)


@pytest.fixture
def endpoint() -> Iterator[FaultEndpoint]:
    with FaultEndpoint() as running:
        yield running


@pytest.fixture
def serve(tmp_path: Path, small_archive: Archive, endpoint: FaultEndpoint) -> Iterator[ServeArchive]:
    """Starts the service on a copy of an archive, with chunks of 20, allowed to write to `endpoint` and below `out`."""
    (tmp_path / "out").mkdir()
    with ExitStack() as running:

        def start(archive: Archive = small_archive, **settings: object) -> RunningService:
            data_dir = archive.copy_to(tmp_path / f"data{len(list(tmp_path.glob('data*')))}").data_dir
            given = {
                "chunk_instances": 20,
                "export_root": tmp_path / "out",
                "export_allowed_endpoints": endpoint.account_url,
            }
            service = RunningService(data_dir, given | settings)
            running.callback(service.stop)
            service.start()
            return service

        yield start
