"""The audit trail: a line for each request that touches data and each export's start and end, and nothing secret."""

from __future__ import annotations

import json
import logging
import re
import stat
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from dicom_depot.adapters.audit_file import AuditFile
from dicom_depot.domain.errors import ConfigurationError
from tests.support.fault_endpoint import Respond, Rule
from tests.support.secured import Secured, folder_body, open_secured
from tests.support.service import run_command

_FRAME = {
    "time", "event", "requestId", "caller", "address", "method", "route", "action", "status", "durationMs", "outcome",
}  # fmt: skip


def test_a_request_leaves_one_line_that_says_who_what_and_how_it_ended(secured: Secured) -> None:
    request_id = f"test.{uuid.uuid4().hex}"
    with secured.client("reader", sub="auditor", headers={"X-Request-Id": request_id}) as client:
        answer = client.get("/v2/operations")
    assert answer.headers["x-request-id"] == request_id
    line = secured.audit_of(request_id)
    assert set(line) == _FRAME
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])
    assert line["durationMs"] >= 0
    assert {name: line[name] for name in _FRAME - {"time", "durationMs"}} == {
        "event": "request",
        "requestId": request_id,
        "caller": f"{secured.issuer.url}|auditor",
        "address": "127.0.0.1",
        "method": "GET",
        "route": "/v2/operations",
        "action": "read",
        "status": 200,
        "outcome": "allowed",
    }


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ä", "../x", "a\tb", "{}", "%0a"])
def test_a_request_id_that_is_not_harmless_is_replaced(given: str, secured: Secured) -> None:
    with secured.anonymous() as client:
        answer = client.get("/health/check", headers=[(b"X-Request-Id", given.encode())])
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_an_export_leaves_its_start_and_its_end(secured: Secured) -> None:
    with secured.client("exporter", sub="mover") as client:
        body = secured.stuck("audited")
        uri = body["destination"]["settings"]["blobContainerUri"]
        started = client.post("/v2/export", json=body | {"source": folder_body("", "1.2.3", "1.2.4")["source"]})
        operation_id = started.json()["id"]
        assert secured.wait(client, operation_id)["results"]["skipped"] == 2
    request_id = started.headers["x-request-id"]
    where = {"destinationType": "azureBlob", "destinationHost": uri.split("/")[2], "container": "audited"}
    for line in (secured.audit_of(request_id), secured.audit_of(request_id, "export.started")):
        assert line.items() >= where.items()
        assert (line["operationId"], line["identifierCount"]) == (operation_id, 2)
        assert line["caller"] == f"{secured.issuer.url}|mover"
    assert f"[{request_id}] operation {operation_id} recorded" in secured.service.log_path.read_text()
    ended = secured.awaited(lambda line: line["event"] == "export.ended" and line["operationId"] == operation_id)
    assert ended.items() >= where.items()
    assert ended["caller"] == f"{secured.issuer.url}|mover"
    assert ended["outcome"] == "succeeded"
    assert ended["counts"] == {"total": 2, "exported": 0, "skipped": 2, "bytes": 0}


def test_a_failed_and_a_canceled_export_leave_their_ends(secured: Secured) -> None:
    forbidden = secured.stuck("audited-403")
    secured.endpoint._rules.insert(
        0,
        Rule(
            Respond(403, "AuthorizationPermissionMismatch"),
            blob="*/results/*",
            when=lambda attempt: attempt.container == "audited-403",
        ),
    )
    with secured.client("exporter") as client:
        failed = client.post("/v2/export", json=forbidden).json()["id"]
        canceled = client.post("/v2/export", json=secured.stuck("audited-cancel")).json()["id"]
        client.post(f"/v2/operations/{canceled}/cancel")
        assert secured.wait(client, failed)["status"] == "failed"
        assert secured.wait(client, canceled)["status"] == "canceled"
    for operation_id, outcome in ((failed, "failed"), (canceled, "canceled")):
        ended = secured.awaited(
            lambda line, id_=operation_id: line["event"] == "export.ended" and line["operationId"] == id_  # type: ignore[misc]
        )
        assert ended["outcome"] == outcome
        assert ("errorCode" in ended) is (outcome == "failed")


@pytest.mark.parametrize(
    ("role", "method", "path", "status", "outcome"),
    [
        (None, "GET", "/v2/operations", 401, "refused"),
        ("", "GET", "/v2/operations", 403, "refused"),
        ("reader", "POST", "/v2/export", 403, "refused"),
        ("reader", "GET", f"/v2/operations/{'0' * 32}", 404, "failed"),
        ("exporter", "POST", "/v2/export", 415, "failed"),
    ],
)
def test_a_refused_request_leaves_its_line(
    role: str | None, method: str, path: str, status: int, outcome: str, secured: Secured
) -> None:
    with secured.anonymous() if role is None else secured.client(*([role] if role else [])) as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    line = secured.audit_of(answer.headers["x-request-id"])
    assert (line["status"], line["outcome"]) == (status, outcome)
    assert ("caller" in line) is (role is not None)


def test_what_touches_no_data_leaves_no_line(secured: Secured) -> None:
    with secured.anonymous() as client:
        quiet = [client.get(path).headers["x-request-id"] for path in ("/health/check", "/v2/api.json", "/nothing")]
        last = client.get("/v2/operations").headers["x-request-id"]
    secured.audit_of(last)
    assert not {line.get("requestId") for line in secured.audit()} & set(quiet)


def test_no_uid_secret_or_token_is_in_trail_log_or_database(tmp_path: Path) -> None:
    """The destination's secret is sealed, and gone when the operation has ended; tokens are nowhere at any time."""
    with open_secured(tmp_path, log_level="DEBUG") as running:
        signature = "SiGnAtUrE" + uuid.uuid4().hex
        body = running.stuck("secrets")
        body["destination"]["settings"]["blobContainerUri"] = running.endpoint.container_url(
            "secrets", f"sv=2024-01-01&sig={signature}"
        )
        key = f"idempotency-{uuid.uuid4().hex}"
        tokens = [running.issuer.token("exporter"), running.issuer.token("reader"), running.issuer.token(exp=1)]
        tokens.append(running.issuer.signed_with_public_key(running.issuer.claims()))
        tokens.append(running.issuer.sign(running.issuer.claims(), kid="unknown"))
        unmatched = "1.2.826.0.1.3680043.8.498.99999"
        source = folder_body("", unmatched, *running.identifiers[:2])["source"]
        with running.anonymous() as client:
            for token in tokens:
                headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": key}
                client.post("/v2/export", json=body | {"source": source}, headers=headers)
                client.get(f"/v2/studies/{unmatched}", headers=headers)
                client.get(f"/v2/operations/{unmatched}", headers=headers)
            client.get(f"/v2/operations?access_token={tokens[0]}", headers={"Authorization": f"bearer {tokens[0]} x"})
        with running.client("administrator") as client:
            [operation] = client.get("/v2/operations").json()["operations"]
            _assert_absent(running, [*tokens, *(token.split(".")[2] for token in tokens), signature, key])
            client.post(f"/v2/operations/{operation['operationId']}/cancel")
            running.wait(client, operation["operationId"])
        running.awaited(lambda line: line["event"] == "export.ended")
        _assert_absent(running, [*tokens, signature, key])
        trail = (running.service.data_dir / "audit.log").read_text()
        uids = [unmatched, *(uid for identifier in running.identifiers for uid in identifier.split("/"))]
        assert not [uid for uid in uids if uid in trail]
        assert not re.search(r"\d+(\.\d+){4,}", re.sub(r'"time": "[^"]+"', "", trail)), "nothing looks like a UID"


def _assert_absent(running: Secured, secrets: list[str]) -> None:
    places = [running.service.log_path, *(path for path in running.service.data_dir.rglob("*") if path.is_file())]
    for place in places:
        content = place.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, f"{place.name} holds what it must not"


@pytest.fixture
def trail(tmp_path: Path) -> Iterator[tuple[AuditFile, Path]]:
    path = tmp_path / "audit.log"
    opened = AuditFile(path)
    yield opened, path
    opened.close()


def test_the_file_is_for_its_owner_only(trail: tuple[AuditFile, Path]) -> None:
    assert stat.S_IMODE(trail[1].stat().st_mode) == 0o600


def test_lines_of_many_threads_and_files_do_not_mix(trail: tuple[AuditFile, Path]) -> None:
    opened, path = trail
    second = AuditFile(path)

    def write(number: int) -> None:
        (opened, second)[number % 2].record("request", number=number, padding="x" * (number % 500))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(2000)))
    second.close()
    assert sorted(json.loads(line)["number"] for line in path.read_text().splitlines()) == list(range(2000))


def test_a_rotated_file_is_noticed(trail: tuple[AuditFile, Path]) -> None:
    opened, path = trail
    opened.record("one")
    path.rename(path.with_suffix(".1"))
    opened.record("two")
    path.unlink()
    opened.record("three")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["three"]
    assert json.loads(path.with_suffix(".1").read_text())["event"] == "one"


def test_lines_that_cannot_be_written_are_reported_and_raise_nothing(
    trail: tuple[AuditFile, Path], caplog: pytest.LogCaptureFixture
) -> None:
    opened, path = trail
    path.unlink()
    path.mkdir()
    opened.record("lost", value=object())
    assert "lost" in caplog.text
    path.rmdir()
    opened.record("found", value=threading.Lock(), name_of_it="a\nb")
    assert json.loads(path.read_text())["nameOfIt"] == "a\nb"


def test_a_handler_can_send_the_lines_elsewhere_and_the_log_has_none(trail: tuple[AuditFile, Path]) -> None:
    opened, path = trail
    loggers = [logging.getLogger(), logging.getLogger("dicom_depot.audit")]
    handlers = [BufferingHandler(100) for _ in loggers]  # pytest's own listens to both
    for logger, handler in zip(loggers, handlers, strict=True):
        logger.addHandler(handler)
    try:
        opened.record("sent on")
    finally:
        for logger, handler in zip(loggers, handlers, strict=True):
            logger.removeHandler(handler)
    assert [[record.getMessage() for record in handler.buffer] for handler in handlers] == [[], [path.read_text()[:-1]]]


def test_a_link_is_not_followed_and_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "link", tmp_path, tmp_path / "missing" / "audit.log"):
        with pytest.raises(ConfigurationError, match="AUDIT_LOG"):
            AuditFile(path)


def test_the_service_does_not_start_without_its_trail(tmp_path: Path) -> None:
    done = run_command("serve", data_dir=tmp_path / "data", check=False, audit_log="/dev/null/audit.log")
    assert done.returncode == 4
    assert "DICOM_DEPOT_AUDIT_LOG" in done.stderr
