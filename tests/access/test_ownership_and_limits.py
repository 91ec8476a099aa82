"""Operations belong to their creators, idempotency keys to their callers, and nobody may start too many."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.domain.errors import TooManyOperations
from dicom_depot.domain.export import Everything
from dicom_depot.domain.operation import OperationStatus, new_operation_id
from dicom_depot.ports import NewOperation, OperationLimits
from tests.support.secured import Secured, folder_body


def _ids(client: httpx.Client) -> list[str]:
    answer = client.get("/v2/operations", params={"limit": "200"}).raise_for_status()
    return [operation["operationId"] for operation in answer.json()["operations"]]


@pytest.fixture
def names() -> tuple[str, str, str]:
    """Three callers that no other test knows."""
    mark = uuid.uuid4().hex
    return f"alice-{mark}", f"bob-{mark}", f"chief-{mark}"


def test_an_operation_is_visible_to_its_creator_and_to_manage(secured: Secured, names: tuple[str, str, str]) -> None:
    alice, bob, chief = names
    with (
        secured.client("exporter", sub=alice) as creator,
        secured.client("exporter", sub=bob) as other,
        secured.client("administrator", sub=chief) as manager,
    ):
        made = creator.post("/v2/export", json=secured.stuck("owned"))
        assert made.status_code == 202
        operation_id = made.json()["id"]
        path = f"/v2/operations/{operation_id}"
        unknown = other.get(f"/v2/operations/{'0' * 32}")

        for answer in (other.get(path), other.post(f"{path}/cancel"), other.post(f"{path}/resume")):
            assert answer.status_code == 404
            assert answer.json() == {
                **unknown.json(),
                "message": unknown.json()["message"].replace("0" * 32, operation_id),
            }
        assert _ids(other) == []
        assert _ids(creator) == [operation_id]
        assert operation_id in _ids(manager)
        assert creator.get(path).status_code == 202
        assert manager.get(path).status_code == 202
        assert manager.post(f"{path}/cancel").status_code == 202
        assert secured.wait(creator, operation_id)["status"] == "canceled"


def test_the_same_subject_of_another_issuer_is_another_caller(secured: Secured, names: tuple[str, str, str]) -> None:
    """Nothing but the pair tells callers apart; the verifier's tests show that issuers cannot vouch for each other."""
    with secured.client("exporter", sub=names[0]) as client:
        client.post("/v2/export", json=folder_body("pair"))
    database = Database(secured.service.data_dir / "depot.sqlite")
    try:
        found = SqlOperations(database).page(10, None, None, f"{secured.issuer.url}|{names[0]}")
        assert len(found) == 1
    finally:
        database.close()


def test_pages_of_a_list_hold_only_what_the_caller_may_see(secured: Secured, names: tuple[str, str, str]) -> None:
    with secured.client("exporter", sub=names[0]) as alice, secured.client("exporter", sub=names[1]) as bob:
        mine = []
        for number in range(3):
            mine.append(alice.post("/v2/export", json=folder_body(f"page-{number}")).json()["id"])
            bob.post("/v2/export", json=folder_body(f"page-{number}"))
        seen, token = [], None
        while True:
            arguments = {"limit": "1"} | ({"continuationToken": token} if token else {})
            page = alice.get("/v2/operations", params=arguments).json()
            seen += [operation["operationId"] for operation in page["operations"]]
            token = page.get("continuationToken")
            if token is None:
                break
        assert seen == mine[::-1]
        status = {"status": "succeeded,running,notStarted"}
        assert len(alice.get("/v2/operations", params=status).json()["operations"]) == 3


def test_an_idempotency_key_belongs_to_its_caller(secured: Secured, names: tuple[str, str, str]) -> None:
    key = {"Idempotency-Key": f"key-{uuid.uuid4().hex}"}
    with secured.client("exporter", sub=names[0]) as alice, secured.client("exporter", sub=names[1]) as bob:
        first = alice.post("/v2/export", json=folder_body("keys"), headers=key).json()["id"]
        assert alice.post("/v2/export", json=folder_body("keys"), headers=key).json()["id"] == first
        other = bob.post("/v2/export", json=folder_body("keys"), headers=key)
        assert other.status_code == 202
        assert other.json()["id"] != first
        assert alice.post("/v2/export", json=folder_body("elsewhere"), headers=key).status_code == 422
        assert bob.get(f"/v2/operations/{first}").status_code == 404
    stored = (secured.service.data_dir / "depot.sqlite").read_bytes()
    assert key["Idempotency-Key"].encode() not in stored


def test_too_many_operations_are_a_429_that_passes(tuned: Secured, names: tuple[str, str, str]) -> None:
    """The service allows 5 in all, and 2 for each caller."""
    alice, bob, carol = (tuned.client("exporter", sub=name) for name in names)
    with alice, bob, carol:
        body = tuned.stuck("limits")
        key = {"Idempotency-Key": "limit"}
        first = alice.post("/v2/export", json=body, headers=key)
        assert [first.status_code, alice.post("/v2/export", json=body).status_code] == [202, 202]
        logs = len(tuned.endpoint.read_tree("limits"))
        refused = alice.post("/v2/export", json=body)
        assert refused.status_code == 429
        assert refused.json()["code"] == "TooManyOperations"
        assert "PER_CALLER" in refused.json()["message"]
        assert int(refused.headers["Retry-After"]) > 0
        others = [client.post("/v2/export", json=body) for client in (bob, bob, carol)]
        assert [answer.status_code for answer in others] == [202, 202, 202]
        full = carol.post("/v2/export", json=body)
        assert full.status_code == 429
        assert "OPERATIONS_MAX)" in full.json()["message"]
        assert len(tuned.endpoint.read_tree("limits")) == logs + 3, "a refused export leaves nothing behind"

        assert alice.post("/v2/export", json=body, headers=key).json() == first.json(), "the key still answers"
        alice.post(f"/v2/operations/{first.json()['id']}/cancel")
        tuned.wait(alice, first.json()["id"])
        others.append(carol.post("/v2/export", json=body))
        assert others[-1].status_code == 202
        resumed = alice.post(f"/v2/operations/{first.json()['id']}/resume", json={"destination": body["destination"]})
        assert resumed.status_code == 429
        for client, answer in zip((bob, bob, carol, carol), others, strict=True):
            client.post(f"/v2/operations/{answer.json()['id']}/cancel")


def test_the_last_place_is_taken_once(tmp_path: Path) -> None:
    database = Database(tmp_path / "depot.sqlite")
    database.migrate()
    operations = SqlOperations(database, OperationLimits(in_all=10, per_caller=3))

    def create(number: int) -> bool:
        try:
            operations.create(_new(f"caller-{number % 2}"))
        except TooManyOperations:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(create, range(40)))
    assert sum(taken) == 6
    with pytest.raises(TooManyOperations):
        operations.ensure_room("caller-0")
    operations.ensure_room("caller-2")
    for _ in range(4):
        operations.create(_new(""))  # without sign-in everybody is one caller: only the limit in all holds
    with pytest.raises(TooManyOperations):
        operations.create(_new(""))
    assert len(operations.page(100, None, None, "caller-1")) == 3
    assert len(operations.page(100, None, frozenset({OperationStatus.RUNNING}), "caller-1")) == 0
    database.close()


def _new(created_by: str) -> NewOperation:
    return NewOperation(
        id=new_operation_id(),
        cutoff=0,
        source=Everything(),
        destination={"type": "file", "public": {"folder": ""}},
        sealed_secret=None,
        log_href="errors.log",
        log_etag=None,
        fingerprint="x",
        idempotency_key=None,
        created_by=created_by,
    )
