"""The wire contract: names, casing, statuses, headers, links, dry runs."""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing

import httpx
import pytest

from tests.http.answers import COMMON_HEADERS, assert_error, slow_export
from tests.http.conftest import PUBLIC_URL
from tests.support.depot import SEED_IDENTIFIERS, SEED_INSTANCES, Depot, body

UNKNOWN_ID = "0123456789abcdef0123456789abcdef"


# Requests


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    "request_text",
    [
        """{"SOURCE":{"Type":"IDENTIFIERS","Settings":{"VALUES":["1.2.3"]}},
            "Destination":{"TYPE":"AZUREBLOB","settings":{"BlobContainerUri":"%s","UseManagedIdentity":false}}}""",
        """{"source":{"type":"Identifiers","settings":{"Values":["1.2.3"]}},
            "destination":{"type":"azureBlob","SETTINGS":{"blobcontaineruri":"%s","usemanagedidentity":false}}}""",
        """\t{"destination":{"settings":{"blobContainerUri":"%s","connectionString":null,"blobContainerName":null,
            "useManagedIdentity":null},"type":"azureblob"},"source":{"settings":{"values":["1.2.3"]},
            "type":"identifiers"}}\r\n""",
    ],
)
def test_member_and_type_names_are_read_in_any_letter_case(depot: Depot, version: str, request_text: str) -> None:
    _, destination = depot.container()
    content = request_text % destination["settings"]["blobContainerUri"]
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    answer = depot.client.post(f"/{version}/export", content=content, headers=headers)
    assert answer.status_code == 202, answer.text
    assert depot.service.wait(answer.json()["id"])["results"]["exported"] == 3


@pytest.mark.parametrize("accept", [None, "*/*", "text/html"])
def test_accept_is_not_enforced(depot: Depot, ended: str, accept: str | None) -> None:
    headers = {} if accept is None else {"Accept": accept}
    answer = httpx.get(f"{depot.service.url}/v2/operations/{ended}", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"


# Status


def test_status_words_depend_on_the_version_only(depot: Depot, ended: str) -> None:
    v1, v2, plain = (depot.client.get(f"{path}/operations/{ended}").json() for path in ("/v1", "/v2", ""))
    assert (v1["status"], v2["status"], plain["status"]) == ("completed", "succeeded", "completed")
    assert v1 | {"status": ""} == v2 | {"status": ""} == plain | {"status": ""}
    assert list(v1) == [
        "operationId",
        "type",
        "createdTime",
        "lastUpdatedTime",
        "status",
        "percentComplete",
        "results",
    ]


def test_until_the_end_the_answer_is_202_with_location_and_retry_after(depot: Depot) -> None:
    operation_id = slow_export(depot, "slow-status")
    for path in ("/v1", "/v2", ""):
        answer = depot.client.get(f"{path}/operations/{operation_id}")
        assert answer.status_code == 202
        assert answer.headers["Location"] == f"{depot.service.url}{path or '/v1'}/operations/{operation_id}"
        assert answer.headers["Retry-After"].isdecimal()
        state = answer.json()
        assert state["status"] == "running"
        assert state["results"]["exported"] == state["results"]["skipped"] == state["percentComplete"] == 0
        assert state["results"]["errorHref"].endswith(f"/slow-status/{operation_id}/errors.log")
        assert "error" not in state
    depot.client.post(f"/v2/operations/{operation_id}/cancel")
    assert depot.service.wait(operation_id)["status"] == "canceled"


def test_any_text_form_of_the_id_is_understood(depot: Depot, ended: str) -> None:
    plain = uuid.UUID(ended)
    for form in (ended, ended.upper(), str(plain), str(plain).upper(), f"{{{plain}}}", f"%7B{plain}%7D"):
        answer = depot.client.get(f"/v2/operations/{form}")
        assert answer.status_code == 200, form
        assert answer.json()["operationId"] == ended


@pytest.mark.parametrize("operation_id", [UNKNOWN_ID, "not-a-guid", "1" * 33, "%00", "%F0%9F%92%A9", "..%2f"])
def test_an_operation_that_is_not_there_is_404(depot: Depot, operation_id: str) -> None:
    assert_error(depot.client.get(f"/v2/operations/{operation_id}"), 404, "NotFound")
    assert_error(depot.client.post(f"/v1/operations/{operation_id}/cancel"), 404, "NotFound")


# Links


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:{port}"),
        ("localhost", "http://localhost:{port}"),
        ("localhost:8443", "http://localhost:8443"),
        ("[::1]:90", "http://[::1]:90"),
    ],
)
def test_links_are_made_from_the_host_header_and_the_port_that_was_reached(
    depot: Depot, host: str, expected: str
) -> None:
    _, destination = depot.container()
    answer = depot.client.post("/v2/export", json=body(destination, "1.2.3"), headers={"Host": host})
    reference = answer.json()
    wanted = f"{expected.format(port=depot.service.port)}/v2/operations/{reference['id']}"
    assert reference["href"] == answer.headers["Location"] == wanted
    depot.service.wait(reference["id"])


def test_a_public_url_wins_over_the_host_header(other_depot: Depot) -> None:
    _, destination = other_depot.container()
    answer = other_depot.client.post("/export", json=body(destination, "1.2.3"), headers={"Host": "localhost:1"})
    assert answer.headers["Location"] == f"{PUBLIC_URL}/v1/operations/{answer.json()['id']}"
    other_depot.service.wait(answer.json()["id"])


# Other methods and paths


def test_answers_of_every_kind_carry_the_common_headers(depot: Depot, ended: str) -> None:
    for path in (f"/v2/operations/{ended}", "/v2/operations", "/health/check", "/v2/api.json", "/v1/api.json"):
        answer = depot.client.get(path)
        assert answer.status_code == 200
        assert COMMON_HEADERS.items() <= dict(answer.headers).items()


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/export", "POST"),
        ("GET", "/v2/export", "POST"),
        ("GET", "/export", "POST"),
        ("PUT", "/v2/export", "POST"),
        ("DELETE", f"/v2/operations/{UNKNOWN_ID}", "GET"),
        ("PATCH", "/v1/operations", "GET"),
        ("GET", f"/v2/operations/{UNKNOWN_ID}/cancel", "POST"),
        ("POST", "/health/check", "GET"),
    ],
)
def test_a_wrong_method_is_405_and_says_which_is_right(depot: Depot, method: str, path: str, allowed: str) -> None:
    answer = depot.client.request(method, path)
    assert_error(answer, 405, "MethodNotAllowed")
    assert answer.headers["Allow"] == allowed


def test_head_has_a_status_and_no_body(depot: Depot, ended: str) -> None:
    for path in (f"/v2/operations/{ended}", "/v2/export", "/nowhere"):
        answer = depot.client.head(path)
        assert answer.status_code in {404, 405}
        assert answer.content == b""
        assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v2/", "/v2/exports", "/v1/studies/1.2/frames", "/nowhere", "/v2/export/", "/v"]
)
def test_an_unknown_path_is_404(depot: Depot, path: str) -> None:
    assert_error(depot.client.get(path), 404, "NotFound")
    assert_error(depot.client.post(path, json={}), 404, "NotFound")


@pytest.mark.parametrize("version", ["v3", "v0", "v10", "v1.5", "v1.0-prerelease"])
def test_an_unknown_version_is_400(depot: Depot, version: str) -> None:
    for answer in (
        depot.client.post(f"/{version}/export", json={}),
        depot.client.get(f"/{version}/operations/{UNKNOWN_ID}"),
    ):
        error = assert_error(answer, 400, "UnsupportedApiVersion")
        assert "/v1" in error["message"]


@pytest.mark.parametrize("path", ["/v1/partitions/Microsoft.Default/export", "/v2/partitions/x/export"])
def test_partitions_are_refused(depot: Depot, path: str) -> None:
    _, destination = depot.container()
    assert_error(depot.client.post(path, json=body(destination, "1.2.3")), 400, "PartitionsDisabled")


def test_an_error_of_ours_is_500_without_details(other_depot: Depot) -> None:
    path = other_depot.service.data_dir / "depot.sqlite"
    with closing(sqlite3.connect(path, timeout=30)) as database:
        database.execute("ALTER TABLE operations RENAME TO mislaid")
        try:
            answer = other_depot.client.get("/v2/operations")
        finally:
            database.execute("ALTER TABLE mislaid RENAME TO operations")
    error = assert_error(answer, 500, "InternalError")
    assert "sql" not in answer.text.lower()
    assert "log" in error["message"]
    assert "no such table" in other_depot.service.log_path.read_text()
    assert other_depot.client.get("/v2/operations").status_code == 200


# Dry run


def test_a_dry_run_counts_and_starts_nothing(depot: Depot) -> None:
    container, destination = depot.container()
    before = depot.operations()
    request = body(destination, *SEED_IDENTIFIERS, "9.9", "1.2.3/9.9", "1.2.3", "9.9")
    for value in ("true", "True", "1"):
        answer = depot.client.post("/v2/export", params={"dryRun": value}, json=request)
        assert answer.status_code == 200
        assert answer.json() == {
            "count": 6,
            "bytes": sum(len(depot.instances[each]) for each in SEED_INSTANCES),
            "unmatched": ["9.9", "1.2.3/9.9"],
        }
        assert "Location" not in answer.headers
    everything = depot.client.post("/v1/export?dryRun=true", json=body(destination)).json()
    assert everything == {
        "count": len(depot.instances),
        "bytes": sum(map(len, depot.instances.values())),
        "unmatched": [],
    }
    assert depot.operations() == before
    assert depot.azurite.read_tree(container) == {}


@pytest.mark.parametrize(
    "query",
    ["dryRun=banana", "dryRun=", "dryrun=true", "DryRun=1", "dry_run=true", "dry-run=1", "dryRun=true&dryRun=false"],
)
def test_a_dry_run_that_is_spelt_wrongly_never_starts_an_export(depot: Depot, query: str) -> None:
    container, destination = depot.container()
    before = depot.operations()
    error = assert_error(depot.client.post(f"/v2/export?{query}", json=body(destination)), 400, "InvalidRequest")
    assert "dryRun" in error["message"]
    assert depot.operations() == before
    assert depot.azurite.read_tree(container) == {}
