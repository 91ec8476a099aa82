"""A real Azurite that takes tokens over HTTPS, and what a service needs to trust it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.azurite import Azurite
from tests.support.certificates import TrustedCertificate, make_trusted_certificate


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TrustedCertificate:
    return make_trusted_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def oauth_azurite(tls: TrustedCertificate) -> Iterator[Azurite]:
    with Azurite(https=tls.pair, certificate_authority=tls.authority, oauth=True) as running:
        yield running


@pytest.fixture
def surroundings(tls: TrustedCertificate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The environment of processes that a test starts: it trusts the test's authority, and names no identity."""
    for name in (
        "IDENTITY_ENDPOINT",
        "IDENTITY_HEADER",
        "IMDS_ENDPOINT",
        "MSI_ENDPOINT",
        "AZURE_POD_IDENTITY_AUTHORITY_HOST",
        "AZURE_TENANT_ID",
        "AZURE_CLIENT_ID",
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_AUTHORITY_HOST",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in tls.variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch
