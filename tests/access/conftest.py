"""Services that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.secured import Secured, open_secured


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """With sign-in and the built-in roles; room for as many operations as tests start."""
    settings: dict[str, Any] = {"operations_max": 100_000, "operations_max_per_caller": 100_000}
    with open_secured(tmp_path_factory.mktemp("secured"), **settings) as running:
        yield running


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """With sign-in and everything set otherwise: all addresses, own roles, trusted proxies, few operations."""
    folder = tmp_path_factory.mktemp("tuned")
    roles = ('radiologist = ["read"]', 'Research-Desk = ["export"]', 'exporter = ["read", "export"]')
    (folder / "roles.toml").write_text("\n".join(("[roles]", *roles)))
    settings: dict[str, Any] = {
        "host": "0.0.0.0",
        "roles_file": folder / "roles.toml",
        "trusted_proxies": "127.0.0.0/8,192.0.2.0/24",
        "operations_max": 5,
        "operations_max_per_caller": 2,
    }
    with open_secured(folder, **settings) as running:
        yield running
