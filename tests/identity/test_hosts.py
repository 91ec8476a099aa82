"""On every kind of host: enable the identity, see its principal id, check, export with the founding document's body,
read back. And each way in which that fails explains itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from dicom_depot.cli import app
from tests.identity.founding_example import EXPORTED, request_for, write_archive
from tests.support.azurite import Azurite
from tests.support.certificates import TrustedCertificate
from tests.support.identity_endpoint import CLIENT, PRINCIPAL, TENANT, IdentityEndpoint
from tests.support.service import RunningService, run_command, running_service

_HOSTS: dict[str, tuple[str, Callable[[IdentityEndpoint, Path], dict[str, str]], bool]] = {
    "app-service": ("App Service", lambda endpoint, _: endpoint.app_service_variables(), False),
    "imds": ("virtual machine", lambda endpoint, _: endpoint.imds_variables(), False),
    "workload": ("AKS workload identity", lambda endpoint, folder: endpoint.workload_variables(folder / "token"), True),
}


@dataclass
class Scene:
    """A service on some kind of host, the endpoint that gives it tokens, and a container."""

    service: RunningService
    endpoint: IdentityEndpoint
    azurite: Azurite
    container: str
    host: str
    contents: dict[str, bytes]

    def put_status(self, status: str) -> httpx.Response:
        return httpx.put(f"{self.service.url}/v1/identity", json={"status": status}, timeout=30)

    def export(self) -> httpx.Response:
        """The founding document's example."""
        return httpx.post(
            f"{self.service.url}/v1/export",
            content=request_for(self.azurite.container_url(self.container)),
            headers={"Accept": "*/*", "Content-Type": "application/json"},
            timeout=60,
        )

    def check(self) -> httpx.Response:
        body = {"destination": json.loads(request_for(self.azurite.container_url(self.container)))["destination"]}
        return httpx.post(f"{self.service.url}/v1/destinations/check", json=body, timeout=30)


@pytest.fixture(params=_HOSTS, scope="module")
def scene(
    request: pytest.FixtureRequest,
    tls: TrustedCertificate,
    oauth_azurite: Azurite,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scene]:
    host, variables, needs_tls = _HOSTS[request.param]
    folder = tmp_path_factory.mktemp("host")
    contents = write_archive(folder / "archive")
    with pytest.MonkeyPatch.context() as environment, IdentityEndpoint(tls.pair if needs_tls else None) as endpoint:
        for name, value in (tls.variables | variables(endpoint, folder)).items():
            environment.setenv(name, value)
        run_command("import", str(folder / "archive"), data_dir=folder / "data")
        with running_service(
            folder / "data",
            export_allowed_endpoints=oauth_azurite.account_url,
            export_retry_seconds=5,
            log_level="DEBUG",
        ) as service:
            yield Scene(service, endpoint, oauth_azurite, oauth_azurite.create_container(), host, contents)


@pytest.fixture(autouse=True)
def _as_it_was(scene: Scene) -> None:
    """Each test begins with a sound endpoint and the identity switched off."""
    endpoint = scene.endpoint
    endpoint.is_enabled, endpoint.audience, endpoint.lifetime_seconds = True, "https://storage.azure.com", 3600
    endpoint.claimed_lifetime_seconds = None
    assert scene.put_status("Off").status_code == 200


def test_from_switching_on_to_the_files(scene: Scene) -> None:
    assert httpx.get(f"{scene.service.url}/v1/identity").json() == {"status": "Off"}

    enabled = scene.put_status("On")
    assert enabled.status_code == 200, enabled.text
    shown = enabled.json()
    assert shown.pop("tokenExpiresOn").endswith("Z")
    assert shown == {
        "status": "On",
        "principalId": PRINCIPAL,
        "tenantId": TENANT,
        "clientId": CLIENT,
        "host": scene.host,
    }
    assert httpx.get(f"{scene.service.url}/v2/identity").json()["principalId"] == PRINCIPAL

    checked = scene.check().json()
    assert checked["ok"], checked
    assert [step["outcome"] for step in checked["steps"]] == ["passed"] * 6
    assert scene.azurite.read_tree(scene.container) == {}

    started = scene.export()
    assert started.status_code == 202, started.text
    state = scene.service.wait(started.json()["id"], version="v1")
    assert (state["status"], state["results"]["skipped"]) == ("completed", 0)
    assert state["results"]["exported"] == len(EXPORTED)
    found = scene.azurite.read_tree(scene.container, f"{started.json()['id']}/results/")
    results = f"{started.json()['id']}/results"
    assert found == {f"{results}/{name}.dcm": scene.contents[name] for name in EXPORTED}
    assert scene.endpoint.request_count <= 4, scene.endpoint.requests


def test_no_token_is_in_the_data_folder_or_the_log(scene: Scene) -> None:
    scene.put_status("On")
    started = scene.export()
    scene.service.wait(started.json()["id"], version="v1")
    kept = [path for path in scene.service.data_dir.rglob("*") if path.is_file()]
    assert scene.service.log_path.stat().st_size > 0
    for path in (*kept, scene.service.log_path):
        content = path.read_bytes()
        for token in scene.endpoint.tokens:
            assert token.encode() not in content, path
            assert token.split(".")[1].encode() not in content, path


def test_an_export_says_how_to_switch_the_identity_on(scene: Scene) -> None:
    for answer in (scene.export(), scene.check()):
        assert (answer.status_code, answer.json()["code"]) == (400, "ManagedIdentityDisabled")
        message = answer.json()["message"]
        assert 'PUT /v1/identity {"status": "On"}' in message
        assert "`dicom-depot identity enable`" in message


def test_a_host_without_an_identity_explains_itself_and_stays_off(scene: Scene) -> None:
    scene.endpoint.is_enabled = False
    answer = scene.put_status("On")
    assert (answer.status_code, answer.json()["code"]) == (400, "IdentityUnavailable")
    expected = {
        "App Service": "az webapp identity assign",
        "virtual machine": "az vm identity assign",
        "AKS workload identity": "az identity federated-credential list",
    }
    assert expected[scene.host] in answer.json()["message"]
    assert httpx.get(f"{scene.service.url}/v1/identity").json() == {"status": "Off"}


def test_a_token_for_another_audience_is_explained(scene: Scene) -> None:
    scene.endpoint.audience = "https://management.azure.com"
    assert scene.put_status("On").status_code == 200
    answer = scene.export()
    assert (answer.status_code, answer.json()["code"]) == (400, "AuthenticationFailed")
    assert "'https://management.azure.com' instead of https://storage.azure.com" in answer.json()["message"]
    checked = scene.check().json()
    outcomes = {step["step"]: step["outcome"] for step in checked["steps"]}
    assert (outcomes["reach"], outcomes["signIn"], outcomes["create"]) == ("passed", "failed", "notTried")
    assert "management.azure.com" in checked["remedy"]

    scene.endpoint.audience = "https://storage.azure.com"  # the refused token was not kept
    assert scene.export().status_code == 202


def test_an_expired_token_is_explained(scene: Scene) -> None:
    scene.put_status("On")
    scene.endpoint.lifetime_seconds, scene.endpoint.claimed_lifetime_seconds = -30, 3600
    scene.put_status("Off")
    answer = scene.put_status("On")
    assert (answer.status_code, answer.json()["code"]) == (400, "IdentityUnavailable")
    assert "expired already" in answer.json()["message"]
    assert "clock" in answer.json()["message"]


def test_a_token_that_cannot_be_had_any_more_is_explained(scene: Scene) -> None:
    scene.endpoint.lifetime_seconds = 3
    assert scene.put_status("On").status_code == 200
    scene.endpoint.is_enabled = False
    shown = httpx.get(f"{scene.service.url}/v1/identity").json()
    while "error" not in shown:  # until the token has ended
        shown = httpx.get(f"{scene.service.url}/v1/identity").json()
    assert (shown["status"], shown["error"]["code"]) == ("On", "IdentityUnavailable")
    answer = scene.export()
    assert (answer.status_code, answer.json()["code"]) == (400, "IdentityUnavailable")
    steps = {step["step"]: step for step in scene.check().json()["steps"]}
    assert (steps["signIn"]["outcome"], steps["reach"]["outcome"]) == ("failed", "notTried")


@pytest.mark.parametrize("body", ["", "{}", '{"status": 1}', '{"status": "Maybe"}', '{"status": "On", "x": 1}', "[]"])
def test_a_wrong_body_changes_nothing(scene: Scene, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.put(f"{scene.service.url}/v1/identity", content=body, headers=headers)
    assert answer.status_code == 400
    assert httpx.get(f"{scene.service.url}/v1/identity").json() == {"status": "Off"}


def test_the_commands_say_the_same(scene: Scene) -> None:
    flags = {"data-dir": scene.service.data_dir, "port": scene.service.port}
    flags["export-allowed-endpoints"] = scene.azurite.account_url
    given = [f"--{name}={value}" for name, value in flags.items()]

    def command(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(app, ["identity", *arguments, *given])
        assert done.exit_code == code, done.output
        return done

    uri = scene.azurite.container_url(scene.container)
    for where in ((), ("--local",)):
        assert json.loads(command("show", "--json", *where).stdout) == {"status": "Off"}
        assert "identity enable" in command("check", uri, *where, code=4).stderr
        assert PRINCIPAL in command("enable", *where).stdout
        assert json.loads(command("show", "--json", *where).stdout)["principalId"] == PRINCIPAL
        assert "signIn     passed" in command("check", uri, *where).stdout
        steps = json.loads(command("check", f"{uri}-not", "--json", *where, code=4).stdout)["steps"]
        assert [step["step"] for step in steps if step["outcome"] == "failed"] == ["container"]
        assert json.loads(command("disable", "--json", *where).stdout) == {"status": "Off"}
    scene.endpoint.is_enabled = False
    assert "gave no token" in command("enable", "--local", code=4).stderr
    assert "cannot be reached" in command("show", "--service=http://127.0.0.1:1", code=4).stderr
    for where in ((), ("--local",)):
        refused = command("check", "https://storage.example.com/c", "--json", *where, code=2)
        assert json.loads(refused.stdout)["error"]["code"] == "EndpointNotAllowed"
