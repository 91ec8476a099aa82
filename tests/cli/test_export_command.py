"""`dicom-depot export`, against a running service and in process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from dicom_depot.cli.client import OperationReference, OperationReport
from dicom_depot.cli.export_command import parse_destination, wait_for_end
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.operation import OperationError
from tests.cli.conftest import CT, RUNNING, SAMPLES, SR, US, Depot, Invoke
from tests.support.fault_endpoint import Respond
from tests.support.service import environment, free_port, run_command

SECRET = "TopSecretSignature"
CONTAINER_URL = f"https://account.blob.core.windows.net/scans?sv=1&sig={SECRET}"
CONNECTION = f"BlobEndpoint=https://account.blob.core.windows.net;SharedAccessSignature=sv=1&sig={SECRET}"
CT_STUDY = CT[0].ref.study_uid


def exported_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*/results/*/*/*.dcm")}


# What is refused before anything is sent


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Nothing is exported by default"),
        (["--all", "1.2.3", "--to", "file:x"], "either identifiers or --all"),
        (["--all", "--from", "list", "--to", "file:x"], "either identifiers or --all"),
        (["1.2.3"], "DICOM_DEPOT_EXPORT_TO"),
        (["1.2.3", "--to", ""], "DICOM_DEPOT_EXPORT_TO"),
        (["1.2.3/", "--to", "file:x"], "it is empty"),
        (["1.2.x", "--to", "file:x"], "'1.2.x' is not a UID"),
        (["1.2.3", "--to", "exports"], "none of these"),
        (["1.2.3", "--to", "file:///srv/exports"], "relative"),
        (["1.2.3", "--to", CONNECTION], "--container NAME"),
        (["1.2.3", "--to", CONTAINER_URL, "--container", "scans"], "names its container itself"),
        (["1.2.3", "--to", "file:x", "--local", "--service", "http://127.0.0.1"], "not both"),
        (["1.2.3", "--to", "file:x", "--from", "/nowhere"], "No such file"),
        (["1.2.3", "--to", "file:x", "--service", f"http://host?{SECRET}"], "must look like"),
        (["-", "--to", "-"], "both come from standard input"),
        (["--from", "-", "--to", "-"], "both come from standard input"),
        (["-", "--to", "file:x"], "no identifiers"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(invoke: Invoke, arguments: list[str], said: str) -> None:
    result = invoke("export", *arguments, stdin="# nothing\n\n")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert SECRET not in result.output
    assert result.stdout == ""


def test_a_wrong_line_of_a_list_is_named_by_its_number(invoke: Invoke, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text(f"# studies\n\n{CT_STUDY}  # the volume\nnonsense\n")
    result = invoke("export", "--from", str(names), "--to", "file:x")
    assert result.exit_code == 2
    assert "names.txt, line 4: 'nonsense' is not a UID" in result.stderr


def test_each_form_of_a_destination_becomes_what_the_api_takes() -> None:
    assert parse_destination(CONTAINER_URL, None) == {
        "type": "azureBlob",
        "settings": {"blobContainerUri": CONTAINER_URL},
    }
    assert parse_destination(CONNECTION, "scans") == {
        "type": "azureBlob",
        "settings": {"connectionString": CONNECTION, "blobContainerName": "scans"},
    }
    assert parse_destination("file:a/b", None) == {"type": "file", "settings": {"folder": "a/b"}}
    assert parse_destination("file:", None) == {"type": "file", "settings": {"folder": ""}}


@pytest.mark.parametrize("text", [SECRET, f"{SECRET}=x", f"ftp://{SECRET}", f"file:/{SECRET}"])
def test_a_destination_that_is_none_is_never_repeated(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_destination(text, None)
    assert SECRET not in str(caught.value)


# Against a service


def test_without_wait_it_prints_id_and_href(ask: Invoke, depot: Depot) -> None:
    result = ask("export", CT_STUDY, "--to", "file:started")
    assert result.exit_code == 0, result.output
    operation_id = result.stdout.split()[1]
    assert result.stdout == (
        f"operation  {operation_id}\nstate      {depot.service.url}/v2/operations/{operation_id}\n"
    )
    assert f"dicom-depot operations watch {operation_id}" in result.stderr
    assert depot.service.wait(operation_id)["results"]["exported"] == len(CT)


def test_all_is_copied_when_all_is_asked_for(ask: Invoke, depot: Depot) -> None:
    result = ask("export", "--all", "--to", "file:everything", "--wait")
    assert result.exit_code == 0, result.output
    assert "status     succeeded" in result.stdout
    assert f"exported   {len(SAMPLES)} instances" in result.stdout
    assert exported_files(depot.exported / "everything") == {
        f"{sample.ref.sop_instance_uid}.dcm": sample.content for sample in SAMPLES
    }


def test_a_skip_exits_with_3(ask: Invoke, depot: Depot) -> None:
    result = ask("export", str(US.ref), "1.2.3", "--to", "file:skip", "--wait", "--json")
    assert result.exit_code == 3, result.output
    state = json.loads(result.stdout)
    assert (state["status"], state["results"]["exported"], state["results"]["skipped"]) == ("succeeded", 1, 1)
    (log,) = depot.exported.glob("skip/*/errors.log")
    assert json.loads(log.read_text())["identifier"] == "1.2.3"


@pytest.mark.parametrize("arguments", [["-"], ["--from", "-"], [str(SR.ref), "-"]])
def test_identifiers_come_from_standard_input(ask: Invoke, arguments: list[str]) -> None:
    listed = f"# a comment\n{CT_STUDY}\n\n  {US.ref}  # and one more\n"
    result = ask("export", *arguments, "--to", "file:listed", "--dry-run", "--json", stdin=listed)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["count"] == len(CT) + 1 + (len(arguments) == 2 and arguments[0] != "--from")


def test_identifiers_come_from_a_file_too(ask: Invoke, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text(f"{CT_STUDY}\n{US.ref}\n")
    result = ask("export", str(SR.ref), "--from", str(names), "--to", "file:listed", "--dry-run", "--json")
    assert json.loads(result.stdout)["count"] == len(SAMPLES)


def test_the_destination_comes_from_the_environment_or_from_standard_input(ask: Invoke, depot: Depot) -> None:
    result = ask("export", str(US.ref), "--wait", export_to="file:by-environment")
    assert result.exit_code == 0, result.output
    result = ask("export", str(US.ref), "--wait", "--to", "-", stdin="file:by-stdin\n")
    assert result.exit_code == 0, result.output
    assert len(exported_files(depot.exported / "by-environment")) == len(exported_files(depot.exported / "by-stdin"))


def test_a_dry_run_counts_and_writes_nothing(ask: Invoke, depot: Depot) -> None:
    result = ask("export", "--all", "--to", "file:dry", "--dry-run")
    assert result.exit_code == 0
    assert f"This would copy {len(SAMPLES)} instances" in result.stdout
    result = ask("export", CT_STUDY, "1.2.3", "--to", "file:dry", "--dry-run")
    assert result.exit_code == 3
    assert result.stdout.splitlines()[1:] == ["Identifiers that match nothing and would be skipped: 1", "  1.2.3"]
    assert not (depot.exported / "dry").exists()


def test_the_same_idempotency_key_names_the_same_operation(ask: Invoke) -> None:
    def start(*identifiers: str) -> Any:
        return ask("export", *identifiers, "--to", "file:keyed", "--json", "--idempotency-key", "my-key")

    assert json.loads(start(CT_STUDY).stdout) == json.loads(start(CT_STUDY).stdout)
    reused = start("1.2.3")
    assert reused.exit_code == 2
    assert json.loads(reused.stdout)["error"]["code"] == "IdempotencyKeyReused"


def test_without_a_key_each_call_is_an_export_of_its_own(ask: Invoke) -> None:
    ids = {json.loads(ask("export", "1.2.3", "--to", "file:twice", "--json").stdout)["id"] for _ in range(2)}
    assert len(ids) == 2


def test_what_the_service_refuses_is_told_with_its_message_and_exits_with_2(ask: Invoke) -> None:
    result = ask("export", "--all", "--to", f"https://10.0.0.1/scans?sig={SECRET}", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "EndpointNotAllowed"
    assert error["target"] == "destination.settings.blobContainerUri"
    assert error["message"] in result.stderr
    assert SECRET not in result.output


def test_an_export_that_failed_exits_with_4_and_its_reason(
    ask: Invoke, depot: Depot, failing_instances: Callable[[Respond], None]
) -> None:
    failing_instances(Respond(403, "AuthorizationFailure"))
    result = ask("export", CT_STUDY, "--wait", export_to=depot.endpoint.container_url("failed", f"sv=1&sig={SECRET}"))
    assert result.exit_code == 4, result.output
    assert "status     failed" in result.stdout
    assert "(AuthorizationFailure)" in result.stderr
    assert SECRET not in result.output


def _obey_ctrl_c() -> None:
    """What is started in the background ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_waiting_and_not_the_export(
    ask: Invoke, depot: Depot, failing_instances: Callable[[Respond], None]
) -> None:
    failing_instances(Respond(503, "ServerBusy"))
    process = subprocess.Popen(
        [sys.executable, "-m", "dicom_depot", "export", CT_STUDY, "--wait"],
        env=environment(
            depot.service.data_dir, {"port": depot.service.port, "export_to": depot.endpoint.container_url("stuck")}
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_obey_ctrl_c,  # noqa: PLW1509  (the child runs nothing else before its exec)
    )
    started = httpx.get(f"{depot.service.url}/v2/operations?status=running").json()["operations"]
    while not started:
        time.sleep(0.05)
        started = httpx.get(f"{depot.service.url}/v2/operations?status=running").json()["operations"]
    time.sleep(0.5)  # until the command has its answer and waits
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130, stderr
    assert stdout == ""
    operation_id = stderr.split("operations cancel ")[1].split()[0]
    assert depot.service.operation(operation_id)["status"] == "running"
    ask("operations", "cancel", operation_id)
    assert depot.service.wait(operation_id)["status"] == "canceled"


def test_a_service_that_is_not_there_exits_with_4_and_its_address_without_the_password(invoke: Invoke) -> None:
    port = free_port()
    url = f"http://user:{SECRET}@127.0.0.1:{port}"
    result = invoke("export", "--all", "--to", CONTAINER_URL, "--service", url)
    assert result.exit_code == 4
    assert f"http://127.0.0.1:{port} cannot be reached" in result.stderr
    assert "dicom-depot serve" in result.stderr
    assert SECRET not in result.output


# In process


def test_local_needs_no_service(data_dir: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    done = run_command(
        *("export", CT_STUDY, "1.2.3", "--to", "file:local", "--local", "--json"),
        data_dir=data_dir,
        export_root=exported,
        min_free_bytes=0,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["results"]["exported"] == len(CT)
    assert len(exported_files(exported / "local")) == len(CT)


def test_local_refuses_to_run_beside_a_service(invoke: Invoke, depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_depot.adapters.folder_lock._WAIT_SECONDS", 0.1)
    result = invoke(
        *("export", CT_STUDY, "--to", "file:local", "--local"),
        data_dir=depot.service.data_dir,
        export_root=depot.exported,
        min_free_bytes=0,
    )
    assert result.exit_code == 4
    assert "is in use by process" in result.stderr


# How an end is told, whatever brought it about


class OneOperation:
    """A service whose operation ends as it is told, or whose watcher is interrupted."""

    def __init__(self, end: OperationReport | type[BaseException]) -> None:
        self._end = end

    def start(self, body: Mapping[str, Any], idempotency_key: str | None) -> OperationReference:
        raise NotImplementedError

    def dry_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def watch(
        self, operation_id: str, on_report: Callable[[OperationReport], None], say: Callable[[str], None]
    ) -> OperationReport:
        on_report(RUNNING)
        if isinstance(self._end, OperationReport):
            return self._end
        raise self._end


@pytest.mark.parametrize(
    ("status", "skipped", "code"), [("succeeded", 0, 0), ("succeeded", 1, 3), ("canceled", 0, 5), ("canceled", 2, 5)]
)
def test_the_exit_code_says_how_it_ended(status: str, skipped: int, code: int) -> None:
    end = replace(RUNNING, status=status, skipped=skipped)
    assert wait_for_end(OneOperation(end), RUNNING.id, as_json=True) == code


def test_a_failure_is_4_and_its_message_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = OperationError("ContainerNotFound", "The container [x] is gone.")
    with pytest.raises(typer.Exit) as caught:
        wait_for_end(OneOperation(replace(RUNNING, status="failed", error=error)), RUNNING.id, as_json=False)
    assert caught.value.exit_code == 4
    shown = capsys.readouterr()
    assert "The container [x] is gone. (ContainerNotFound)" in shown.err
    assert "exported   1,000 instances, 5.0 MB in 10.0 s (100/s, 0.5 MB/s)" in shown.out


@pytest.mark.parametrize(("is_local", "said"), [(False, "operations cancel"), (True, "The next `dicom-depot serve`")])
def test_an_interrupt_is_130_and_says_how_it_goes_on(
    capsys: pytest.CaptureFixture[str], is_local: bool, said: str
) -> None:
    assert wait_for_end(OneOperation(KeyboardInterrupt), RUNNING.id, as_json=True, is_local=is_local) == 130
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
