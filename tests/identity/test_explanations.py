"""Each way in which an identity or a right is missing says what is missing, and how to get it."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from dicom_depot.adapters.azure_blob import AzureDestination
from dicom_depot.adapters.azure_settings import AzureSettings
from dicom_depot.adapters.database import Database
from dicom_depot.adapters.destination_guard import DestinationGuard
from dicom_depot.adapters.managed_identity import AzureManagedIdentity, Source, claims_of
from dicom_depot.adapters.switches_sql import SqlSwitches
from dicom_depot.domain.errors import DestinationFault, FaultKind, IdentityDisabled, IdentityUnavailable, Obstacle
from dicom_depot.testing.identity import FixedIdentity
from tests.support.certificates import TrustedCertificate
from tests.support.fault_endpoint import FaultEndpoint, Respond, Rule
from tests.support.identity_endpoint import CLIENT, PRINCIPAL, IdentityEndpoint

ROLE_LINE = (
    f"az role assignment create --assignee-object-id {PRINCIPAL} --assignee-principal-type ServicePrincipal "
    '--role "Storage Blob Data Contributor" --scope "$(az storage account show --name account --query id --output tsv)'
    '/blobServices/default/containers/export"'
)


@pytest.fixture
def switches(tmp_path: Path) -> Iterator[SqlSwitches]:
    database = Database(tmp_path / "depot.sqlite")
    database.migrate()
    yield SqlSwitches(database)
    database.close()


def identity_on(
    switches: SqlSwitches, environment: pytest.MonkeyPatch, variables: dict[str, str], **settings: str | None
) -> AzureManagedIdentity:
    for name, value in variables.items():
        environment.setenv(name, value)
    source: Source = "workload" if settings.get("source") == "workload" else "auto"
    return AzureManagedIdentity(switches, source=source, client_id=settings.get("client_id"))


def refusal_of(identity: AzureManagedIdentity) -> str:
    began_at = time.monotonic()
    with pytest.raises(IdentityUnavailable) as caught:
        identity.set_enabled(on=True)
    assert time.monotonic() - began_at < 10, "it must not hang, not even on a busy machine"
    assert not identity.is_enabled()
    return caught.value.message


def test_the_switch_is_off_at_first_and_holds_for_all_processes(
    switches: SqlSwitches, surroundings: pytest.MonkeyPatch
) -> None:
    with IdentityEndpoint() as endpoint:
        identity = identity_on(switches, surroundings, endpoint.imds_variables())
        with pytest.raises(IdentityDisabled, match="identity enable"):
            identity.token()
        assert endpoint.request_count == 0
        identity.set_enabled(on=True)
        assert AzureManagedIdentity(switches, source="auto", client_id=None).describe().principal_id == PRINCIPAL
        identity.set_enabled(on=False)
        with pytest.raises(IdentityDisabled):
            identity.describe()


def test_a_machine_that_is_not_azures(switches: SqlSwitches, surroundings: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        identity = identity_on(
            switches, surroundings, {"AZURE_POD_IDENTITY_AUTHORITY_HOST": f"http://127.0.0.1:{port}"}
        )
        assert "no Azure virtual machine" in refusal_of(identity)
    assert "DICOM_DEPOT_IDENTITY_SOURCE=cli" in refusal_of(identity)  # now nobody listens


@pytest.mark.parametrize("status", [404, 410, 429, 500, 503])
def test_an_endpoint_that_is_out_of_order_does_not_hold_us_up(
    status: int, switches: SqlSwitches, surroundings: pytest.MonkeyPatch
) -> None:
    with FaultEndpoint() as endpoint:
        endpoint.set_outage(True, Respond(status))
        url = endpoint.account_url.removesuffix("/account")
        refusal_of(identity_on(switches, surroundings, {"AZURE_POD_IDENTITY_AUTHORITY_HOST": url}))
        assert 1 <= len(endpoint.requests) <= 3


def test_a_wrong_client_id_is_named(switches: SqlSwitches, surroundings: pytest.MonkeyPatch) -> None:
    with IdentityEndpoint() as endpoint:
        endpoint.client_id = "44444444-0000-4000-8000-000000000004"
        for variables in (endpoint.imds_variables(), endpoint.app_service_variables()):
            message = refusal_of(identity_on(switches, surroundings, variables, client_id=CLIENT))
            assert CLIENT in message
            assert "DICOM_DEPOT_IDENTITY_CLIENT_ID is wrong" in message
        right = identity_on(switches, surroundings, {}, client_id=endpoint.client_id)
        right.set_enabled(on=True)


def test_arc_and_app_service_that_do_not_answer(switches: SqlSwitches, surroundings: pytest.MonkeyPatch) -> None:
    nobody = "http://127.0.0.1:1/token"
    arc = {"IDENTITY_ENDPOINT": nobody, "IMDS_ENDPOINT": nobody}
    assert "himds" in refusal_of(identity_on(switches, surroundings, arc))
    assert "Restart the app" in refusal_of(identity_on(switches, surroundings, {"IDENTITY_HEADER": "x"}))


def test_a_pod_that_lacks_something(switches: SqlSwitches, surroundings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refusal(**variables: str) -> str:
        return refusal_of(identity_on(switches, surroundings, variables, source="workload"))

    assert "AZURE_TENANT_ID, AZURE_FEDERATED_TOKEN_FILE, AZURE_CLIENT_ID is not set" in refusal()
    token_file = tmp_path / "token"
    message = refusal(AZURE_TENANT_ID="t", AZURE_CLIENT_ID=CLIENT, AZURE_FEDERATED_TOKEN_FILE=str(token_file))
    assert f"{token_file} (AZURE_FEDERATED_TOKEN_FILE), cannot be read" in message
    token_file.write_text("assertion")
    message = refusal(AZURE_AUTHORITY_HOST="https://127.0.0.1:1")
    assert "https://127.0.0.1:1 cannot be reached" in message


def test_a_developers_machine_without_the_azure_cli(
    switches: SqlSwitches, surroundings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    surroundings.setenv("PATH", str(tmp_path))
    identity = AzureManagedIdentity(switches, source="cli", client_id=None)
    assert "az login" in refusal_of(identity)


def test_no_library_logs_a_token(
    switches: SqlSwitches,
    surroundings: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    tls: TrustedCertificate,
) -> None:
    """Even with every logger at its most talkative, as long as HTTP bodies are not traced."""
    for name in ("azure", "msal", "urllib3"):
        caplog.set_level(logging.DEBUG, logger=name)
    caplog.set_level(logging.DEBUG)
    with IdentityEndpoint() as endpoint, IdentityEndpoint(tls.pair) as secure:
        identity_on(switches, surroundings, endpoint.imds_variables()).set_enabled(on=True)
        identity_on(switches, surroundings, endpoint.app_service_variables()).set_enabled(on=True)
        for name in endpoint.app_service_variables():
            surroundings.delenv(name)
        identity_on(switches, surroundings, secure.workload_variables(tmp_path / "token")).set_enabled(on=True)
        tokens = [*endpoint.tokens, *secure.tokens]
    assert len(tokens) == 3
    assert caplog.records
    for token in tokens:
        assert token not in caplog.text
        assert token.split(".")[1] not in caplog.text


@pytest.mark.parametrize("text", ["", "opaque", "a.b.c", "a.eyJ9.c", "a.bnVsbA.c", "a.W10.c", "a.eyJleHAiOjFlOTl9.c"])
def test_claims_of_something_else_are_empty(text: str) -> None:
    assert claims_of(text).principal_id == ""


def _destination(endpoint: FaultEndpoint, identity: FixedIdentity, *, content_md5: bool = False) -> AzureDestination:
    guard = DestinationGuard((endpoint.account_url,), ())
    settings = {"blobContainerUri": endpoint.container_url("export", None), "useManagedIdentity": True}
    spec = AzureSettings(guard, allow_anonymous=False, is_identity_on=identity.is_enabled).parse(settings)
    assert spec.secret is None
    assert spec.public["identity"] == "managed"
    return AzureDestination(spec, request_seconds=5, content_md5=content_md5, identity=identity)


@pytest.mark.parametrize("content_md5", [False, True], ids=["obstore", "md5"])
@pytest.mark.parametrize("code", ["AuthorizationPermissionMismatch", "AuthorizationFailure"])
def test_a_missing_role_is_answered_with_the_command_that_grants_it(
    code: str, content_md5: bool, tls: TrustedCertificate, surroundings: pytest.MonkeyPatch
) -> None:
    token, _ = IdentityEndpoint().new_token()
    with FaultEndpoint(tls.pair) as endpoint:
        endpoint.add_rule(Rule(Respond(403, code)))
        with closing(_destination(endpoint, FixedIdentity(token), content_md5=content_md5)) as destination:
            with pytest.raises(DestinationFault) as caught:
                destination.put("op/results/1.dcm", b"instance")
    fault = caught.value
    assert (fault.kind, fault.obstacle, fault.code) == (FaultKind.PERMANENT, Obstacle.WRITE, code)
    assert fault.remedy is not None
    assert ROLE_LINE in fault.remedy
    assert ROLE_LINE in fault.message
    assert "a new assignment takes a few minutes" in fault.message
    assert ("firewall" in fault.message) == (code == "AuthorizationFailure")
    assert token not in fault.message


def test_a_refused_token_is_replaced_once_and_then_explained(
    tls: TrustedCertificate, surroundings: pytest.MonkeyPatch
) -> None:
    token, _ = IdentityEndpoint().new_token()
    identity = FixedIdentity(token)
    with FaultEndpoint(tls.pair) as endpoint:
        endpoint.add_rule(Rule(Respond(401, "InvalidAuthenticationInfo")))
        with closing(_destination(endpoint, identity)) as destination:
            kinds = []
            for _ in range(3):
                with pytest.raises(DestinationFault, match="tenant") as caught:
                    destination.put("op/results/1.dcm", b"instance")
                kinds.append(caught.value.kind)
                assert caught.value.obstacle is Obstacle.SIGN_IN
    assert kinds == [FaultKind.TRANSIENT, FaultKind.PERMANENT, FaultKind.PERMANENT]
    assert len(identity.discarded) == 3


def test_a_token_that_ends_on_its_way_is_no_reason_to_fail(
    tls: TrustedCertificate, surroundings: pytest.MonkeyPatch
) -> None:
    giver = IdentityEndpoint()
    giver.lifetime_seconds = -5
    identity = FixedIdentity(giver.new_token()[0], timedelta(seconds=-5))
    with FaultEndpoint(tls.pair) as endpoint:
        endpoint.add_rule(Rule(Respond(403, "AuthenticationFailed")))
        with closing(_destination(endpoint, identity)) as destination:
            for _ in range(3):
                with pytest.raises(DestinationFault, match="expired at") as caught:
                    destination.put("op/results/1.dcm", b"instance")
                assert caught.value.kind is FaultKind.TRANSIENT


def test_an_identity_that_is_switched_off_midway_ends_the_export_and_one_that_is_away_does_not(
    tls: TrustedCertificate, surroundings: pytest.MonkeyPatch
) -> None:
    identity = FixedIdentity()
    with FaultEndpoint(tls.pair) as endpoint, closing(_destination(endpoint, identity)) as destination:
        destination.put("op/results/1.dcm", b"instance")
        identity.set_enabled(on=False)
        with pytest.raises(DestinationFault) as caught:
            destination.put("op/results/2.dcm", b"instance")
        assert (caught.value.code, caught.value.kind) == ("ManagedIdentityDisabled", FaultKind.PERMANENT)
        assert destination.remove_log("op/errors.log") is False


def test_a_workload_identity_of_the_environment_is_not_taken_for_a_sas(
    surroundings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with FaultEndpoint() as endpoint, IdentityEndpoint() as giver:
        for name, value in giver.workload_variables(tmp_path / "token").items():
            surroundings.setenv(name, value)
        surroundings.setenv("AZURE_SKIP_SIGNATURE", "true")
        guard = DestinationGuard((endpoint.account_url,), ())
        settings = AzureSettings(guard, allow_anonymous=False, is_identity_on=lambda: False)
        spec = settings.parse({"blobContainerUri": endpoint.container_url("export", "sv=x&sig=of%2Bthe%3Dcaller")})
        with closing(AzureDestination(spec, request_seconds=5, content_md5=False)) as destination:
            destination.put("op/results/1.dcm", b"instance")
            assert destination.remove_log("op/results/1.dcm")
        assert giver.request_count == 0
        assert all(set(request.query_keys) >= {"sv", "sig"} for request in endpoint.requests)
