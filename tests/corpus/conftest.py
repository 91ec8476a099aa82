"""What the tests of dicomweb-client share. No assertions live here."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from dicomweb_client.api import DICOMwebClient

from tests.support.service import RunningService


@pytest.fixture(scope="module")
def deep_enough() -> Iterator[None]:
    """The client's reader of JSON recurses; one file nests 200 deep."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    yield
    sys.setrecursionlimit(limit)


@pytest.fixture(scope="module")
def client(service: RunningService, deep_enough: None) -> DICOMwebClient:
    """Of the `service` that the module starts."""
    made = DICOMwebClient(url=f"{service.url}/v2")
    made.set_http_retry_params(retry=False)
    return made
