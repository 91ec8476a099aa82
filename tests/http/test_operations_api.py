"""Lists of operations, cancel, and Idempotency-Key, on the wire."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.http.answers import assert_error, slow_export
from tests.support.depot import Depot, body
from tests.support.fault_endpoint import Delay, Rule

# Lists


def test_the_list_is_newest_first_and_pages_through_equal_times(depot: Depot, ended: str) -> None:
    started = []
    for number in range(7):
        destination = {"type": "file", "settings": {"folder": f"list/{number}"}}
        started.append(depot.start(destination, "9.9"))
        depot.service.wait(started[-1])
    assert depot.operations()[:7] == started[::-1]
    # The clock of a fast machine gives several operations the same time; here it is made certain.
    with sqlite3.connect(depot.service.data_dir / "depot.sqlite", timeout=30) as database:
        marks = ",".join("?" * len(started))
        database.execute(
            f"UPDATE operations SET created_at ="  # noqa: S608  (marks are question marks)
            f" (SELECT max(created_at) FROM operations) WHERE id IN ({marks})",
            started,
        )
    database.close()
    whole = depot.operations()
    assert whole[:7] == sorted(started, reverse=True)
    for limit in (1, 2, 3, 5):
        found: list[str] = []
        token: str | None = None
        while True:
            arguments = {"limit": str(limit)} | ({"continuationToken": token} if token else {})
            page = depot.client.get("/v1/operations", params=arguments).json()
            assert len(page["operations"]) <= limit
            found += [operation["operationId"] for operation in page["operations"]]
            token = page.get("continuationToken")
            if token is None:
                break
            assert len(page["operations"]) == limit
        assert found == whole


def test_the_list_shows_each_operation_as_its_own_page_does(depot: Depot, ended: str) -> None:
    for version in ("v1", "v2"):
        page = depot.client.get(f"/{version}/operations?limit=200").json()
        [listed] = [each for each in page["operations"] if each["operationId"] == ended]
        assert listed == depot.client.get(f"/{version}/operations/{ended}").json()


def test_the_list_is_filtered_by_status_words_of_its_version(depot: Depot, ended: str) -> None:
    operation_id = slow_export(depot, "slow-list")

    def listed(version: str, status: str) -> set[str]:
        page = depot.client.get(f"/{version}/operations", params={"status": status, "limit": 200})
        return {operation["operationId"] for operation in page.raise_for_status().json()["operations"]}

    assert listed("v2", "running") == {operation_id}
    assert ended in listed("v2", "succeeded") & listed("v1", "completed") & listed("v2", "Succeeded")
    assert operation_id not in listed("v2", "succeeded,failed, canceled")
    assert {ended, operation_id} <= listed("v1", "completed,running")
    assert_error(depot.client.get("/v1/operations?status=succeeded"), 400, "InvalidRequest")
    depot.client.post(f"/v2/operations/{operation_id}/cancel")
    depot.service.wait(operation_id)
    assert operation_id in listed("v2", "canceled")


@pytest.mark.parametrize(
    ("query", "target"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("continuationToken=", "continuationToken"),
        ("continuationToken=nonsense", "continuationToken"),
        ("continuationToken=%C3%A9", "continuationToken"),
        ("continuationToken=MDAwMS0wMS0wMVQwMDowMDowMCswMDowMCB4", "continuationToken"),
        ("continuationToken=MDAwMS0wMS0wMVQwMDowMDowMCsxNDowMCAwMTIzNDU2Nzg5YWJjZGVmMDEyMzQ1Njc4OWFiY2RlZg==", ""),
        ("status=", "status"),
        ("status=done", "status"),
        ("status=running,,failed", "status"),
    ],
)
def test_a_list_with_bad_parameters_is_400(depot: Depot, query: str, target: str) -> None:
    error = assert_error(depot.client.get(f"/v2/operations?{query}"), 400, "InvalidRequest")
    assert error["target"] == (target or "continuationToken")
    assert error["target"] in error["message"]


# Cancel


def test_cancel_stops_within_seconds_and_leaves_a_truthful_state(depot: Depot) -> None:
    destination = depot.faulty("cancel", Rule(Delay(12), "PUT", "*/results/1.2.3/*"))
    operation_id = depot.start(destination)
    while depot.service.operation(operation_id)["results"]["total"] == 0:
        pass
    first = depot.client.post(f"/v1/operations/{operation_id}/cancel")
    assert first.status_code == 202
    assert first.json()["status"] == "running"
    assert first.headers["Location"] == f"{depot.service.url}/v1/operations/{operation_id}"
    assert first.headers["Retry-After"]

    state = depot.service.wait(operation_id, seconds=8)
    assert state["status"] == "canceled"
    assert "error" not in state
    results = state["results"]
    copied = [name for name in depot.endpoint.read_tree("cancel") if name.endswith(".dcm")]
    assert results["exported"] == len(copied) < results["total"] == len(depot.instances)
    assert results["skipped"] == 0

    again = depot.client.post(f"/v2/operations/{operation_id}/cancel")
    assert again.status_code == 200
    assert again.json() == state
    assert depot.client.get(f"/v2/operations/{operation_id}").status_code == 200


def test_what_ended_otherwise_cannot_be_canceled(depot: Depot, ended: str) -> None:
    error = assert_error(depot.client.post(f"/v2/operations/{ended}/cancel"), 409, "Conflict")
    assert "ended" in error["message"]
    assert depot.service.operation(ended)["status"] == "succeeded"


# Idempotency


def test_the_same_key_and_specification_name_the_same_operation(depot: Depot) -> None:
    container, destination = depot.container()
    key = {"Idempotency-Key": f"once-{container}"}
    request = body(destination, "1.2.3")
    first = depot.client.post("/v2/export", json=request, headers=key)
    again = depot.client.post("/v1/export", json=request, headers=key)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["Location"].endswith(f"/v1/operations/{first.json()['id']}")
    depot.service.wait(first.json()["id"])
    late = depot.client.post("/v2/export", json=request, headers=key)
    assert (late.status_code, late.json()) == (202, first.json())
    assert len(depot.azurite.read_tree(container)) == 4


@pytest.mark.parametrize("permissions", ["cwd", "cw"])
def test_of_equal_requests_at_once_one_starts_an_operation(depot: Depot, permissions: str) -> None:
    container, destination = depot.container(permissions)
    before = len(depot.operations())

    def post(_: int) -> httpx.Response:
        headers = {"Idempotency-Key": f"race-{container}"}
        return httpx.post(
            f"{depot.service.url}/v2/export", json=body(destination, "1.2.3"), headers=headers, timeout=60
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(8)))
    assert {answer.status_code for answer in answers} == {202}
    [operation_id] = {answer.json()["id"] for answer in answers}
    assert len(depot.operations()) == before + 1
    depot.service.wait(operation_id)
    logs = [name for name in depot.azurite.read_tree(container) if name.endswith("errors.log")]
    assert logs == [f"{operation_id}/errors.log"]


def test_the_same_key_with_another_specification_is_422_and_leaves_nothing(depot: Depot) -> None:
    container, destination = depot.container()
    other_container, other = depot.container()
    headers = {"Idempotency-Key": f"other-{container}"}
    first = depot.client.post("/v2/export", json=body(destination, "1.2.3"), headers=headers)
    before = depot.operations()
    for request in (body(destination, "1.2.30"), body(destination), body(other, "1.2.3")):
        answer = depot.client.post("/v2/export", json=request, headers=headers)
        error = assert_error(answer, 422, "IdempotencyKeyReused")
        assert error["target"] == "Idempotency-Key"
    assert depot.operations() == before
    assert depot.azurite.read_tree(other_container) == {}
    depot.service.wait(first.json()["id"])
