"""The Azure destination keeps the contract against a real Azurite, with and without Content-MD5."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import timedelta

import pytest
from azure.core.exceptions import ResourceNotFoundError

from dicom_depot.adapters.azure_blob import AzureDestination
from dicom_depot.adapters.azure_settings import AzureSettings
from dicom_depot.adapters.destination_guard import DestinationGuard
from dicom_depot.domain.errors import DestinationFault, FaultKind
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.testing.contracts import DestinationContract
from tests.support.azurite import Azurite
from tests.support.fault_endpoint import FaultEndpoint, Reset, Rule


def _spec(uri: str, allowed_endpoint: str) -> DestinationSpec:
    guard = DestinationGuard((allowed_endpoint,), ())
    settings = AzureSettings(guard, allow_anonymous=False, is_identity_on=lambda: False)
    return settings.parse({"blobContainerUri": uri})


class _Container(AzureDestination):
    """An AzureDestination that the tests can look behind."""

    def __init__(self, azurite: Azurite, container: str, *, content_md5: bool) -> None:
        uri = azurite.container_url(container, azurite.container_sas(container, "cwd"))
        spec = _spec(uri, azurite.account_url)
        super().__init__(spec, request_seconds=30, content_md5=content_md5)
        self.azurite = azurite
        self.container = container
        self.content_md5 = content_md5


class _OnAzurite(DestinationContract[_Container]):
    content_md5 = False
    puts_each = 25

    @pytest.fixture(autouse=True)
    def _use_azurite(self, azurite: Azurite) -> None:
        self.azurite = azurite

    def make_destination(self) -> _Container:
        return _Container(self.azurite, self.azurite.create_container(), content_md5=self.content_md5)

    def reopen(self, destination: _Container) -> _Container:
        return _Container(self.azurite, destination.container, content_md5=self.content_md5)

    def read_back(self, destination: _Container, key: str) -> bytes | None:
        with self.azurite.container_client(destination.container) as client:
            try:
                return client.download_blob(key).readall()
            except ResourceNotFoundError:
                return None

    def keys(self, destination: _Container) -> set[str]:
        return set(self.azurite.read_tree(destination.container))


class TestAzureDestination(_OnAzurite):
    """Through obstore."""


class TestAzureDestinationWithContentMd5(_OnAzurite):
    """Through Azure's own library."""

    content_md5 = True

    @pytest.mark.parametrize("size", [0, 10, 9_000_000])
    def test_the_service_keeps_the_md5_and_the_content_type(self, size: int) -> None:
        destination = self.make_destination()
        content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        destination.put("a/put.dcm", content)
        destination.put_stream("a/stream.dcm", iter([content[:5_000_000], content[5_000_000:]]), size)
        with self.azurite.container_client(destination.container) as client:
            for key in ("a/put.dcm", "a/stream.dcm"):
                properties = client.get_blob_client(key).get_blob_properties().content_settings
                assert bytes(properties.content_md5 or b"") == hashlib.md5(content, usedforsecurity=False).digest()
                assert properties.content_type == "application/dicom"


@pytest.fixture
def endpoint() -> Iterator[FaultEndpoint]:
    with FaultEndpoint() as running:
        yield running


def test_every_instance_is_sent_with_its_md5(endpoint: FaultEndpoint) -> None:
    spec = _spec(endpoint.container_url("container"), endpoint.account_url)
    destination = AzureDestination(spec, request_seconds=10, content_md5=True)
    destination.put("a/b.dcm", b"content")
    assert endpoint.objects["container/a/b.dcm"].content_md5_header is not None
    endpoint.add_rule(Rule(Reset()))
    with pytest.raises(DestinationFault) as caught:
        destination.put("a/c.dcm", b"content")
    assert caught.value.kind is FaultKind.TRANSIENT


def test_an_expired_signature_is_a_permanent_fault_that_says_what_to_do(azurite: Azurite) -> None:
    container = azurite.create_container()
    uri = azurite.container_url(container, azurite.container_sas(container, "cw", expires_in=timedelta(seconds=-60)))
    spec = _spec(uri, azurite.account_url)
    for content_md5 in (False, True):
        with pytest.raises(DestinationFault, match="make a new one") as caught:
            AzureDestination(spec, request_seconds=10, content_md5=content_md5).put("a", b"b")
        assert caught.value.kind is FaultKind.PERMANENT
