"""Destinations that must be refused: no request, no token and no object byte leaves the service."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from dicom_depot.adapters.azure_blob import AzureDestination
from dicom_depot.adapters.azure_settings import AzureSettings
from dicom_depot.adapters.destination_guard import DestinationGuard, parse_endpoint
from dicom_depot.config import CLOUD_SUFFIXES
from dicom_depot.domain.errors import DestinationFault, DestinationRefused, FaultKind
from dicom_depot.testing.identity import FixedIdentity
from tests.identity.hostile import CONNECTION_STRINGS, FOLDERS, RESOLVED, URIS
from tests.support.certificates import TrustedCertificate
from tests.support.fault_endpoint import FaultEndpoint, Respond, Rule
from tests.support.identity_endpoint import IdentityEndpoint
from tests.support.listener import Listener
from tests.support.service import RunningService, running_service

_CODES = {
    "InvalidUri",
    "InvalidRequest",
    "EndpointNotAllowed",
    "IdentityNeedsHttps",
    "InvalidConnectionString",
    "InvalidContainerName",
    "AccountKeyRefused",
    "ConflictingSettings",
    "DestinationRefused",
    "DestinationNotFolder",
}


@dataclass
class Scene:
    """A service whose identity is on, an endpoint that its operator listed, and a port where nothing may arrive."""

    service: RunningService
    listed: FaultEndpoint
    listener: Listener
    identity: IdentityEndpoint
    export_root: Path

    def filled(self, text: str) -> str:
        listed = self.listed.account_url
        port = str(httpx.URL(listed).port)
        return (
            text.replace("<PORT>", str(self.listener.port)).replace("<LISTED-PORT>", port).replace("<LISTED>", listed)
        )

    def refusals(self, type_: str, settings: Mapping[str, object]) -> Iterator[httpx.Response]:
        destination = {"destination": {"type": type_, "settings": settings}}
        for path in ("/v2/export", "/v1/destinations/check"):
            yield httpx.post(f"{self.service.url}{path}", json=destination, timeout=30)


@pytest.fixture(scope="module")
def scene(tls: TrustedCertificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("hostile")
    with (
        pytest.MonkeyPatch.context() as environment,
        IdentityEndpoint() as identity,
        FaultEndpoint(tls.pair) as listed,
        Listener() as listener,
    ):
        for name, value in (tls.variables | identity.imds_variables()).items():
            environment.setenv(name, value)
        with running_service(
            folder / "data", export_allowed_endpoints=listed.account_url, export_root=_laid_out(folder)
        ) as service:
            httpx.put(f"{service.url}/v2/identity", json={"status": "On"}).raise_for_status()
            yield Scene(service, listed, listener, identity, folder / "exports")


def _laid_out(folder: Path) -> Path:
    root = folder / "exports"
    (root / "inner").mkdir(parents=True)
    (folder / "outside").mkdir()
    (root / "a-file").write_text("x")
    for link, target in (("link", "../outside"), ("inner-link", "inner"), ("loop", "loop")):
        os.symlink(target, root / link)
    return root


@pytest.fixture(autouse=True)
def _nothing_leaves(scene: Scene) -> Iterator[None]:
    """However a test ends: nobody knocked, no token was asked for, and nothing arrived where something is allowed."""
    tokens, listed = scene.identity.request_count, len(scene.listed.requests)
    yield
    assert scene.listener.connections == []
    assert (scene.identity.request_count, len(scene.listed.requests)) == (tokens, listed)


def _assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] in _CODES, answer.text
    assert "secret-signature" not in answer.text


@pytest.mark.parametrize("name", URIS)
def test_a_hostile_uri_is_refused_with_a_sas_and_with_the_identity(scene: Scene, name: str) -> None:
    uri = scene.filled(URIS[name])
    for answer in scene.refusals("azureBlob", {"blobContainerUri": f"{uri}?sv=1&sig=secret-signature"}):
        _assert_refused(answer)
    for answer in scene.refusals("azureBlob", {"blobContainerUri": uri, "useManagedIdentity": True}):
        _assert_refused(answer)


@pytest.mark.parametrize("name", CONNECTION_STRINGS)
def test_a_hostile_connection_string_is_refused(scene: Scene, name: str) -> None:
    settings = {"connectionString": scene.filled(CONNECTION_STRINGS[name]), "blobContainerName": "export"}
    for answer in scene.refusals("azureBlob", settings):
        _assert_refused(answer)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_refused(scene: Scene, name: str) -> None:
    outside = scene.export_root.parent / "outside"
    for answer in scene.refusals("file", {"folder": FOLDERS[name]}):
        if answer.status_code == 200:  # a check says what it found
            assert not answer.json()["ok"]
        else:
            _assert_refused(answer)
    assert list(outside.iterdir()) == list((scene.export_root / "inner").iterdir()) == []


def test_the_table_is_long_enough() -> None:
    assert len(URIS) + len(CONNECTION_STRINGS) + len(FOLDERS) + len(RESOLVED) >= 40


def _resolving_to(*addresses: str) -> Callable[[str], Sequence[str]]:
    return lambda host: addresses


@pytest.mark.parametrize("name", RESOLVED)
def test_a_name_of_the_cloud_must_not_lead_to(name: str) -> None:
    endpoint = parse_endpoint("https://dicomexport.blob.core.windows.net")
    assert endpoint is not None
    for addresses in ([RESOLVED[name]], ["20.60.1.2", RESOLVED[name]]):
        guard = DestinationGuard((), CLOUD_SUFFIXES, _resolving_to(*addresses))
        guard.check_name(endpoint, "blobContainerUri", carries_token=True)
        with pytest.raises(DestinationRefused) as caught:
            guard.check_address(endpoint)
        assert caught.value.code == "AddressNotAllowed"


def test_private_addresses_are_for_the_clouds_own_names_and_for_what_is_listed() -> None:
    suffixes = (*CLOUD_SUFFIXES, ".storage.example.com")
    private = ("10.1.2.3", "192.168.1.1", "fd00::5", "100.64.0.1")
    cloud, own = map(parse_endpoint, ("https://a1.blob.core.windows.net", "https://a1.storage.example.com"))
    assert cloud is not None
    assert own is not None
    for address in private:
        resolve = _resolving_to(address)
        DestinationGuard((), suffixes, resolve).check_address(cloud)
        with pytest.raises(DestinationRefused):
            DestinationGuard((), suffixes, resolve).check_address(own)
        DestinationGuard((str(own),), suffixes, resolve).check_address(own)
    DestinationGuard((), suffixes, _resolving_to()).check_address(own)  # left to the proof


_WRITES: list[Callable[[AzureDestination], object]] = [
    lambda destination: destination.create_log("op/errors.log"),
    lambda destination: destination.write_log("op/errors.log", [b"line"], if_match='"1"'),
    lambda destination: destination.put("op/results/1.dcm", b"instance"),
    lambda destination: destination.put_stream("op/results/2.dcm", iter([b"instance"]), 8),
]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("content_md5", [False, True], ids=["obstore", "md5"])
@pytest.mark.parametrize("with_identity", [False, True], ids=["sas", "identity"])
def test_redirects_are_not_followed(
    status: int, content_md5: bool, with_identity: bool, tls: TrustedCertificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in tls.variables.items():
        monkeypatch.setenv(name, value)
    with FaultEndpoint(tls.pair) as endpoint, FaultEndpoint(tls.pair) as other, Listener() as listener:
        settings: dict[str, Any] = {"blobContainerUri": endpoint.container_url("export")}
        if with_identity:
            settings = {"blobContainerUri": endpoint.container_url("export", None), "useManagedIdentity": True}
        guard = DestinationGuard((endpoint.account_url,), ())
        spec = AzureSettings(guard, allow_anonymous=False, is_identity_on=lambda: True).parse(settings)
        elsewhere = other.account_url.replace("127.0.0.1", "localhost")
        for location in (f"https://localhost:{listener.port}/account/export/x", f"{elsewhere}/export/x"):
            endpoint.clear_rules()
            endpoint.add_rule(Rule(Respond(status, "Moved", {"Location": location})))
            destination = AzureDestination(
                spec, request_seconds=5, content_md5=content_md5, identity=FixedIdentity("the-token")
            )
            with closing(destination):
                for write in _WRITES:
                    with pytest.raises(DestinationFault) as caught:
                        write(destination)
                    assert (caught.value.code, caught.value.kind) == ("RedirectRefused", FaultKind.PERMANENT)
                assert destination.remove_log("op/errors.log") is False
        assert len(endpoint.requests) >= 10
        assert (other.requests, listener.connections) == ([], [])
