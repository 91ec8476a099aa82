"""Services that the HTTP tests share. Each test makes containers and keys of its own, so that none sees another's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.azurite import Azurite
from tests.support.depot import Depot, Imported, import_instances, open_depot
from tests.support.fault_endpoint import FaultEndpoint

PUBLIC_URL = "https://depot.example.org/imaging"


@pytest.fixture(scope="session")
def endpoint() -> Iterator[FaultEndpoint]:
    with FaultEndpoint() as running:
        yield running


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return import_instances(tmp_path_factory.mktemp("imported"))


@pytest.fixture(scope="session")
def depot(
    tmp_path_factory: pytest.TempPathFactory, imported: Imported, azurite: Azurite, endpoint: FaultEndpoint
) -> Iterator[Depot]:
    """The service as it comes, with the places to export to that the tests have."""
    with open_depot(tmp_path_factory.mktemp("depot"), imported, azurite, endpoint) as running:
        yield running


@pytest.fixture(scope="session")
def other_depot(
    tmp_path_factory: pytest.TempPathFactory, imported: Imported, azurite: Azurite, endpoint: FaultEndpoint
) -> Iterator[Depot]:
    """A service with everything set otherwise: anonymous destinations, a public URL, small limits, no export root."""
    settings = {
        "export_allow_anonymous": "true",
        "public_url": PUBLIC_URL,
        "max_identifiers": 3,
        "max_body_bytes": 4096,
        "export_root": None,
    }
    with open_depot(tmp_path_factory.mktemp("other"), imported, azurite, endpoint, **settings) as running:
        yield running


@pytest.fixture(scope="session")
def ended(depot: Depot) -> str:
    """The id of an operation that succeeded."""
    _, destination = depot.container()
    operation_id = depot.start(destination, "1.2.3", "9.9")
    depot.service.wait(operation_id)
    return operation_id
