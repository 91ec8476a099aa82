"""Bad input: each row of the table gets the right status, one JSON error that names place and remedy and holds no
secret, and leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http import bad_destinations, bad_requests
from tests.http.bad_requests import GOOD_SOURCE, Bad, Place
from tests.support.depot import Depot, all_below, body
from tests.support.fault_endpoint import Respond, Rule

TABLE = (
    bad_requests.bodies()
    | bad_requests.members()
    | bad_requests.identifiers()
    | bad_destinations.forms()
    | bad_destinations.endpoints()
    | bad_destinations.rights()
    | bad_destinations.folders()
)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", autouse=True)
def traps(depot: Depot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies below the export root for the folder rows to fall into; returns the folder outside."""
    outside = tmp_path_factory.mktemp("outside")
    root = depot.export_root
    (root / "link").symlink_to(outside)
    (root / "inner").mkdir()
    (root / "inner-link").symlink_to("inner")
    (root / "dangling").symlink_to("nothing-here")
    (root / "loop").symlink_to("loop")
    (root / "a-file").write_text("content")
    return outside


@pytest.fixture
def place(depot: Depot, traps: Path) -> Iterator[Place]:
    """A container of the test's own. After the test nothing may have changed anywhere."""
    container = depot.azurite.create_container()
    before = depot.operations(), all_below(depot.export_root)
    yield Place(depot, container)
    assert (depot.operations(), all_below(depot.export_root)) == before
    assert all_below(traps) == []
    assert depot.azurite.read_tree(container) == {}


def assert_refused(answer: httpx.Response, status: int, code: str, target: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    error = json.loads(answer.text)
    assert list(error) == ["code", "message", "target"]
    assert re.match(code, error["code"]), error
    assert error["target"] == target
    assert 20 <= len(error["message"]) <= 600, error
    return dict(error)


def secrets_in(content: str | bytes) -> list[str]:
    """The parts of a request that must not come back."""
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    found = re.findall(r"sig=([^&\"'\\;]{3,})|AccountKey ?= ?([^;\"]+)|user:(\w+)@", text, re.IGNORECASE)
    return [part for parts in found for part in parts if part]


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_a_bad_request_is_refused_and_leaves_nothing(place: Place, row: Bad) -> None:
    content = row.make(place)
    version = "v1" if len(content) % 2 else "v2"
    began_at = time.monotonic()
    answer = place.depot.client.post(f"/{version}/export", content=content, headers=JSON)
    assert time.monotonic() - began_at < 30
    error = assert_refused(answer, row.status, row.code, row.target)
    for part in row.says:
        assert place.fill(part) in error["message"], error
    for secret in secrets_in(content):
        assert secret not in answer.text


# What is not the body's fault


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "text/json", "application/xml", "application/json, text/plain", "application/json+x"],
)
def test_another_content_type_is_415_before_the_body_is_read(place: Place, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    for content in (b"", b"{", json.dumps(body(place.good_destination, "1.2.3")).encode()):
        answer = place.depot.client.post("/v2/export", content=content, headers=headers)
        error = assert_refused(answer, 415, "UnsupportedMediaType", "Content-Type")
        assert "application/json" in error["message"]


def test_a_compressed_body_is_415(place: Place) -> None:
    headers = JSON | {"Content-Encoding": "gzip"}
    answer = place.depot.client.post("/v2/export", content=b"\x1f\x8b", headers=headers)
    assert_refused(answer, 415, "UnsupportedMediaType", "Content-Encoding")


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("size", [4097, 3_000_000])
def test_a_body_over_the_limit_is_413(other_depot: Depot, size: int, is_chunked: bool) -> None:
    before = other_depot.operations()
    whole = json.dumps(body({"type": "azureBlob", "settings": {}}, "1.2.3")).encode().ljust(size)
    content = iter([whole[start : start + 1000] for start in range(0, size, 1000)]) if is_chunked else whole
    answer = httpx.post(f"{other_depot.service.url}/v2/export", content=content, headers=JSON, timeout=30)
    error = assert_refused(answer, 413, "PayloadTooLarge", "body")
    assert "4096 bytes" in error["message"]
    assert "DICOM_DEPOT_MAX_BODY_BYTES" in error["message"]
    assert other_depot.operations() == before


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_at_the_limit_is_read(other_depot: Depot, is_chunked: bool) -> None:
    whole = json.dumps({"sources": 1}).encode().ljust(4096)
    content = iter([whole[:4000], whole[4000:]]) if is_chunked else whole
    answer = other_depot.client.post("/v2/export", content=content, headers=JSON)
    assert_refused(answer, 400, "InvalidRequest", "sources")


def test_a_body_that_ends_early_starts_nothing(place: Place) -> None:
    def cut() -> Iterator[bytes]:
        yield b'{"source":'
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        httpx.post(f"{place.depot.service.url}/v2/export", content=cut(), headers=JSON)


@pytest.mark.parametrize("key", ["", "with space", "x" * 256, "tab\tinside", b"\xe9", b"\xff\xfe"])
def test_a_bad_idempotency_key_is_400(place: Place, key: str | bytes) -> None:
    headers = [(b"Idempotency-Key", key if isinstance(key, bytes) else key.encode())]
    request = body(place.good_destination, "1.2.3")
    answer = place.depot.client.post("/v2/export", json=request, headers=headers)
    error = assert_refused(answer, 400, "InvalidRequest", "Idempotency-Key")
    assert "1 to 255" in error["message"]


def test_too_many_identifiers_are_400(other_depot: Depot) -> None:
    for count, version in ((4, "v1"), (200, "v2")):
        request = body(
            {"type": "azureBlob", "settings": {"blobContainerUri": "https://example.com/c"}}, *["1.2"] * count
        )
        error = assert_refused(
            other_depot.client.post(f"/{version}/export", json=request),
            400,
            "InvalidRequest",
            "source.settings.values",
        )
        assert f"{count} " in error["message"]
        assert "at most 3" in error["message"]


def test_folder_destinations_can_be_switched_off(other_depot: Depot) -> None:
    before = other_depot.operations()
    answer = other_depot.client.post("/v2/export", json=body({"type": "file", "settings": {"folder": "x"}}, "1.2.3"))
    error = assert_refused(answer, 400, "FolderDestinationsDisabled", "destination.type")
    assert "DICOM_DEPOT_EXPORT_ROOT" in error["message"]
    assert other_depot.operations() == before


# Which of two errors wins


@pytest.mark.parametrize(
    ("bad_source", "target"),
    [
        ({"type": "identifiers", "settings": {"values": ["x"]}}, "source.settings.values[0]"),
        ({"type": "identifiers", "settings": {"values": []}}, "source.settings.values"),
        ({"type": "identifiers", "settings": {}}, "source.settings.values"),
        ({"type": "dataset", "settings": {}}, "source.type"),
        ({"type": "query", "settings": {}}, "source.settings.level"),
        ({"type": "query", "settings": {"level": "series", "filters": {}}}, "source.settings.filters"),
        (None, "source"),
    ],
)
@pytest.mark.parametrize(
    "bad_destination",
    [
        None,
        {"type": "s3"},
        {"type": "azureBlob", "settings": {"blobContainerUrl": "x"}},
        {"type": "azureBlob", "settings": {"blobContainerUri": "https://example.com/c?sig=x"}},
        {"type": "file", "settings": {"folder": "/etc"}},
    ],
)
def test_an_error_of_the_source_wins_over_one_of_the_destination(
    place: Place, bad_source: Any, bad_destination: Any, target: str
) -> None:
    request = {"destination": bad_destination, "source": bad_source}
    assert_refused(place.depot.client.post("/v2/export", json=request), 400, "Invalid", target)


def test_a_dry_run_refuses_what_an_export_refuses_for_its_form(place: Place) -> None:
    for destination in ({"type": "azureBlob", "settings": {}}, {"type": "file", "settings": {"folder": ".."}}):
        answer = place.depot.client.post(
            "/v2/export?dryRun=true", json={"source": GOOD_SOURCE, "destination": destination}
        )
        assert answer.status_code == 400


# Refused later, having been written to


def test_rights_to_create_only_are_refused_and_leave_the_empty_log_that_may_not_be_removed(depot: Depot) -> None:
    container, destination = depot.container("c")
    before = depot.operations()
    answer = depot.client.post("/v2/export", json=body(destination, "1.2.3"))
    error = assert_refused(answer, 400, "Authorization", "destination.settings")
    assert "create and write" in error["message"]
    assert depot.operations() == before
    left = depot.azurite.read_tree(container)
    assert list(left.values()) == [b""]
    assert all(name.endswith("/errors.log") for name in left)


def test_what_the_proof_wrote_is_removed_where_that_is_allowed(depot: Depot) -> None:
    container, destination = depot.container("cd")
    answer = depot.client.post("/v2/export", json=body(destination, "1.2.3"))
    assert_refused(answer, 400, "Authorization", "destination.settings")
    assert depot.azurite.read_tree(container) == {}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("proof-second", Rule(Respond(403, "AuthorizationFailure"), "PUT", when=lambda attempt: attempt.number == 2)),
        ("proof-lost", Rule(Respond(500, "InternalError", after_commit=True), "PUT", times=1)),
        ("proof-changed", Rule(Respond(412, "ConditionNotMet"), "PUT", when=lambda attempt: attempt.number == 2)),
        ("proof-odd", Rule(Respond(418, "x" * 500), "PUT", when=lambda attempt: attempt.number == 2)),
    ],
)
def test_a_proof_that_fails_half_way_removes_its_log(depot: Depot, name: str, rule: Rule) -> None:
    before = depot.operations()
    answer = depot.client.post("/v2/export", json=body(depot.faulty(name, rule), "1.2.3"))
    assert answer.status_code == 400
    assert answer.json()["target"].startswith("destination")
    assert depot.operations() == before
    assert rule.acted_count == 1
    assert depot.endpoint.read_tree(name) == {}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(depot: Depot, status: int) -> None:
    elsewhere = f"redirected-{status}"
    redirect = Respond(status, "Moved", {"Location": depot.endpoint.container_url(elsewhere) + "/errors.log"})
    answer = depot.client.post("/v2/export", json=body(depot.faulty(f"redirecting-{status}", Rule(redirect)), "1.2.3"))
    assert_refused(answer, 400, ".", "destination.settings")
    assert not [each for each in depot.endpoint.requests if f"/{elsewhere}" in each.path]
