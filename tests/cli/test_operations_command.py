"""`dicom-depot operations`: list, show, watch, cancel, against a running service."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.cli.conftest import CT, SAMPLES, Depot, Invoke
from tests.support.fault_endpoint import Respond
from tests.support.service import azure_destination, export_body, file_destination, free_port

CT_STUDY = CT[0].ref.study_uid


def export(depot: Depot, *identifiers: str) -> str:
    """Run an export to its end, and return its id."""
    answer = depot.service.export(export_body(file_destination("operations"), *identifiers))
    operation_id = str(answer.json()["id"])
    depot.service.wait(operation_id)
    return operation_id


def test_list_shows_the_newest_first_and_no_more_than_asked_for(ask: Invoke, depot: Depot) -> None:
    older, newer = export(depot), export(depot, CT_STUDY)
    result = ask("operations", "list", "--limit", "2")
    assert result.exit_code == 0, result.output
    _, first, second = result.stdout.splitlines()
    assert [first.split()[0], second.split()[0]] == [newer, older]
    assert first.split()[3:5] == ["succeeded", str(len(CT))]
    listed = json.loads(ask("operations", "list", "--limit", "1", "--json").stdout)["operations"]
    assert [operation["operationId"] for operation in listed] == [newer]


def test_list_of_more_than_a_page_goes_on_with_the_next_one(
    ask: Invoke, depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {export(depot, CT_STUDY) for _ in range(3)}
    monkeypatch.setattr("dicom_depot.cli.client._PAGE_MAX", 2)
    listed = json.loads(ask("operations", "list", "--limit", "3", "--json").stdout)["operations"]
    assert {operation["operationId"] for operation in listed} == ids


def test_list_chooses_by_status(ask: Invoke, depot: Depot) -> None:
    export(depot, CT_STUDY)
    found = json.loads(ask("operations", "list", "--status", "succeeded,failed", "--json").stdout)["operations"]
    assert {operation["status"] for operation in found} <= {"succeeded", "failed"}
    assert found
    wrong = ask("operations", "list", "--status", "done")
    assert wrong.exit_code == 2
    assert "must be one or more of: notStarted, running, succeeded, failed, canceled" in wrong.stderr


def test_show_tells_all_of_one(ask: Invoke, depot: Depot) -> None:
    operation_id = export(depot)
    result = ask("operations", "show", operation_id)
    assert result.exit_code == 0, result.output
    assert f"exported   {len(SAMPLES)} instances" in result.stdout
    assert f"results    operations/{operation_id}/results/  (below the service's" in result.stdout
    state = json.loads(ask("operations", "show", operation_id, "--json").stdout)
    assert state == depot.service.operation(operation_id)


def test_an_unknown_id_exits_with_2(ask: Invoke) -> None:
    for command in ("show", "watch", "cancel"):
        for operation_id in ("0" * 32, "nonsense", "../health/check"):
            result = ask("operations", command, operation_id, "--json")
            assert result.exit_code == 2, result.output
            assert json.loads(result.stdout)["error"]["code"] == "NotFound"


def test_watch_ends_as_the_export_did(ask: Invoke, depot: Depot) -> None:
    assert ask("operations", "watch", export(depot, CT_STUDY)).exit_code == 0
    result = ask("operations", "watch", export(depot, CT_STUDY, "1.2.3"))
    assert result.exit_code == 3
    assert "skipped    1, one line each in errors.log" in result.stdout


def test_cancel_stops_a_running_one_and_watch_tells_it_by_5(
    ask: Invoke, depot: Depot, failing_instances: Callable[[Respond], None]
) -> None:
    failing_instances(Respond(503, "ServerBusy"))
    destination = azure_destination(depot.endpoint.container_url("canceled"))
    operation_id = depot.service.export(export_body(destination, CT_STUDY)).json()["id"]
    result = ask("operations", "cancel", operation_id)
    assert result.exit_code == 0, result.output
    assert "is being canceled" in result.stdout
    assert ask("operations", "watch", operation_id).exit_code == 5
    assert "was canceled already" in ask("operations", "cancel", operation_id).stdout


def test_cancel_of_one_that_has_ended_exits_with_2(ask: Invoke, depot: Depot) -> None:
    result = ask("operations", "cancel", export(depot, CT_STUDY))
    assert result.exit_code == 2
    assert "ended already as succeeded" in result.stderr


def test_a_canceled_one_is_resumed_with_its_destination_once_more(
    ask: Invoke, depot: Depot, failing_instances: Callable[[Respond], None]
) -> None:
    url = depot.endpoint.container_url("resumed")
    failing_instances(Respond(503, "ServerBusy"))
    operation_id = depot.service.export(export_body(azure_destination(url), CT_STUDY)).json()["id"]
    assert ask("operations", "cancel", operation_id).exit_code == 0
    assert ask("operations", "watch", operation_id).exit_code == 5
    without = ask("operations", "resume", operation_id)
    assert without.exit_code == 2
    assert "SecretErased" in without.stderr
    elsewhere = ask("operations", "resume", operation_id, "--to", depot.endpoint.container_url("elsewhere"))
    assert elsewhere.exit_code == 2
    assert "DestinationDiffers" in elsewhere.stderr
    depot.endpoint.clear_rules()
    assert "SecretErased" in ask("operations", "resume", operation_id, export_to=url).stderr, "only a flag counts"
    resumed = ask("operations", "resume", operation_id, "--wait", "--to", "-", stdin=url + "\n")
    assert resumed.exit_code == 0, resumed.output
    assert depot.service.operation(operation_id)["results"]["exported"] == len(CT)


def test_the_managed_identity_of_a_resume_goes_with_a_container(ask: Invoke) -> None:
    for arguments in (["--managed-identity"], ["--container", "c"], ["--managed-identity", "--to", "file:x"]):
        refused = ask("operations", "resume", "0" * 32, *arguments)
        assert refused.exit_code == 2
        assert "--to" in refused.stderr
    asked = ask("operations", "resume", "0" * 32, "--managed-identity", "--to", "https://a.blob.core.windows.net/scans")
    assert "(ManagedIdentityDisabled)" in asked.stderr


def test_the_service_is_found_by_its_address_or_by_the_settings(invoke: Invoke, depot: Depot) -> None:
    url = depot.service.url
    assert invoke("operations", "list", "--service", url).exit_code == 0
    assert invoke("operations", "list", public_url=url).exit_code == 0
    assert invoke("operations", "list", "--port", str(depot.service.port)).exit_code == 0
    assert invoke("operations", "list", host="0.0.0.0", port=depot.service.port).exit_code == 0
    assert invoke("operations", "list", port=free_port()).exit_code == 4
    unknown = invoke("operations", "list", port=0)
    assert unknown.exit_code == 2
    assert "--service" in unknown.stderr
