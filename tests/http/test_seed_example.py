"""The founding document's example, driven against a real Azurite: what must be there afterwards, to the byte."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from azure.storage.blob import ContainerClient

from tests.support.azurite import ACCOUNT_KEY, ACCOUNT_NAME, Azurite
from tests.support.depot import SEED_IDENTIFIERS, SEED_INSTANCES, Depot, azure, body, tree_of

LOG_KEYS = ["timestamp", "identifier", "error"]


def seed_request(container_uri: str) -> dict[str, Any]:
    """The example's body, letter for letter but for the destination's address and the way to sign in."""
    return {
        "source": {"type": "identifiers", "settings": {"values": list(SEED_IDENTIFIERS)}},
        "destination": {
            "type": "azureblob",
            "settings": {"blobContainerUri": container_uri, "UseManagedIdentity": False},
        },
    }


def poll(depot: Depot, href: str, *, seconds: float = 60) -> dict[str, Any]:
    """Follow the link as a client does: 202 with Location and Retry-After until it is 200."""
    deadline = datetime.now(UTC) + timedelta(seconds=seconds)
    while datetime.now(UTC) < deadline:
        answer = depot.client.get(href)
        if answer.status_code == 200:
            assert "Retry-After" not in answer.headers
            return dict(answer.json())
        assert answer.status_code == 202, answer.text
        assert answer.headers["Location"] == href
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["status"] in {"notStarted", "running"}
    raise AssertionError(f"{href} did not end")


def log_lines(tree: dict[str, bytes], operation_id: str) -> list[dict[str, str]]:
    content = tree[f"{operation_id}/errors.log"]
    assert content == b"" or content.endswith(b"\n")
    lines = [json.loads(line) for line in content.splitlines()]
    for line in lines:
        assert list(line) == LOG_KEYS
        assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta(0)
    return lines


def content_types(azurite: Azurite, container: str) -> dict[str, str]:
    with ContainerClient(azurite.account_url, container, credential=ACCOUNT_KEY) as client:
        return {blob.name: str(blob.content_settings.content_type) for blob in client.list_blobs()}


@pytest.mark.parametrize(
    ("path", "version", "word"),
    [("/v1/export", "v1", "completed"), ("/v2/export", "v2", "succeeded"), ("/export", "v1", "completed")],
)
def test_the_example_request_exports_exactly_what_it_names(depot: Depot, path: str, version: str, word: str) -> None:
    container, destination = depot.container("cw")
    answer = depot.client.post(path, json=seed_request(destination["settings"]["blobContainerUri"]))
    assert answer.status_code == 202, answer.text
    reference = answer.json()
    assert list(reference) == ["id", "href"]
    assert re.fullmatch(r"[0-9a-f]{32}", reference["id"])
    assert reference["href"] == f"{depot.service.url}/{version}/operations/{reference['id']}"
    assert answer.headers["Location"] == reference["href"]

    state = poll(depot, reference["href"])
    tree = depot.azurite.read_tree(container)
    expected = tree_of(reference["id"], SEED_INSTANCES, depot.instances)
    assert tree == expected | {f"{reference['id']}/errors.log": b""}
    types = content_types(depot.azurite, container)
    assert {types[name] for name in expected} == {"application/dicom"}

    created, updated = (datetime.fromisoformat(state.pop(name)) for name in ("createdTime", "lastUpdatedTime"))
    assert created <= updated <= datetime.now(UTC) + timedelta(seconds=1)
    assert state == {
        "operationId": reference["id"],
        "type": "export",
        "status": word,
        "percentComplete": 100,
        "results": {
            "errorHref": f"{depot.azurite.account_url}/{container}/{reference['id']}/errors.log",
            "exported": 6,
            "skipped": 0,
            "total": 6,
            "bytes": sum(map(len, expected.values())),
        },
    }


def test_without_a_source_everything_is_exported(depot: Depot) -> None:
    container, destination = depot.container()
    operation_id = depot.start(destination)
    state = depot.service.wait(operation_id)
    tree = depot.azurite.read_tree(container)
    assert log_lines(tree, operation_id) == []
    assert (
        tree.keys() - {f"{operation_id}/errors.log"} == tree_of(operation_id, depot.instances, depot.instances).keys()
    )
    assert state["results"]["exported"] == len(depot.instances)
    assert state["results"]["bytes"] == sum(map(len, depot.instances.values()))


def test_identifiers_that_overlap_or_repeat_count_once(depot: Depot) -> None:
    container, destination = depot.container()
    listed = ["1.2.3/1.2.3.1/1.2.3.1.1", "1.2.3", " 1.2.3 ", "1.2.3/1.2.3.1", "1.2.3", "1.2.3/1.2.3.1/1.2.3.1.1"]
    operation_id = depot.start(destination, *listed)
    results = depot.service.wait(operation_id)["results"]
    assert (results["exported"], results["skipped"], results["total"]) == (3, 0, 3)
    inside = [each for each in SEED_INSTANCES if each.startswith("1.2.3/")]
    assert depot.azurite.read_tree(container) == tree_of(operation_id, inside, depot.instances) | {
        f"{operation_id}/errors.log": b""
    }


def test_each_identifier_that_matches_nothing_is_one_skip_and_one_line(depot: Depot) -> None:
    container, destination = depot.container()
    unknown = {
        "9.9": "study",
        "1.2.3/9.9": "series",  # below a listed study
        "1.2.3/1.2.3.1/9.9": "instance",  # below a listed study
        "9.9/9.8": "series",  # below a study that matches nothing itself
        "12.3/4.5.678/1": "instance",  # below a stored series that is not listed
    }
    operation_id = depot.start(destination, "1.2.3", *unknown, "9.9", "9.9/9.8", "1.2.3/9.9")
    state = depot.service.wait(operation_id)
    assert state["status"] == "succeeded"
    results = state["results"]
    assert (results["exported"], results["skipped"], results["total"]) == (3, 5, 8)
    lines = log_lines(depot.azurite.read_tree(container), operation_id)
    assert sorted(line["identifier"] for line in lines) == sorted(unknown)
    for line in lines:
        assert unknown[line["identifier"]] in line["error"], line


def test_an_export_of_unknown_identifiers_only_succeeds_with_nothing_but_its_log(depot: Depot) -> None:
    container, destination = depot.container()
    operation_id = depot.start(destination, "9.9.9", "9.9.9/1/2")
    state = depot.service.wait(operation_id)
    assert state["status"] == "succeeded"
    assert (state["results"]["exported"], state["results"]["skipped"]) == (0, 2)
    tree = depot.azurite.read_tree(container)
    assert list(tree) == [f"{operation_id}/errors.log"]
    assert [line["identifier"] for line in log_lines(tree, operation_id)] == ["9.9.9", "9.9.9/1/2"]
    href = state["results"]["errorHref"]
    sas = depot.azurite.container_sas(container, "r")
    assert httpx.get(f"{href}?{sas}").content == tree[f"{operation_id}/errors.log"]


def test_uids_with_leading_zeros_and_padding_are_found(depot: Depot) -> None:
    container, destination = depot.container()
    operation_id = depot.start(destination, "007 / 0 / 00.1 ")
    depot.service.wait(operation_id)
    assert f"{operation_id}/results/007/0/00.1.dcm" in depot.azurite.read_tree(container)


@pytest.mark.parametrize(
    "connection",
    [
        "DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};BlobEndpoint={endpoint};",
        "accountname={account};accountkey={key};blobendpoint={endpoint}/;QueueEndpoint=http://127.0.0.1:1/x",
        "BlobEndpoint={endpoint};SharedAccessSignature={sas}",
        "BlobEndpoint={endpoint}/;SharedAccessSignature=?{sas};AccountName={account}",
    ],
)
def test_connection_strings_of_the_emulator_and_with_a_sas_work(depot: Depot, connection: str) -> None:
    container = depot.azurite.create_container()
    text = connection.format(
        account=ACCOUNT_NAME,
        key=ACCOUNT_KEY,
        endpoint=depot.azurite.account_url,
        sas=depot.azurite.container_sas(container),
    )
    settings = {"ConnectionString": text, "BlobContainerName": container}
    operation_id = depot.start({"type": "AzureBlob", "settings": settings}, "123.456")
    assert depot.service.wait(operation_id)["status"] == "succeeded"
    names = [each for each in depot.instances if each.startswith("123.456/")]
    assert depot.azurite.read_tree(container) == tree_of(operation_id, names, depot.instances) | {
        f"{operation_id}/errors.log": b""
    }


def test_a_container_that_anybody_may_write_to_needs_the_operators_consent(depot: Depot, other_depot: Depot) -> None:
    request = body(azure(depot.endpoint.container_url("open-to-all", None)), "1.2.3")
    refused = depot.client.post("/v2/export", json=request)
    assert (refused.status_code, refused.json()["code"]) == (400, "AnonymousAccessDisabled")
    assert "DICOM_DEPOT_EXPORT_ALLOW_ANONYMOUS" in refused.json()["message"]
    assert depot.endpoint.read_tree("open-to-all") == {}

    answer = other_depot.client.post("/v2/export", json=request)
    assert answer.status_code == 202, answer.text
    assert other_depot.service.wait(answer.json()["id"])["results"]["exported"] == 3
    assert len(depot.endpoint.read_tree("open-to-all")) == 4


def test_a_folder_below_the_root_gets_the_same_tree(depot: Depot) -> None:
    operation_id = depot.start({"type": "FILE", "settings": {"Folder": "below/the//root/"}}, *SEED_IDENTIFIERS, "9.9")
    state = depot.service.wait(operation_id)
    assert state["results"]["errorHref"] == f"below/the/root/{operation_id}/errors.log"
    folder = depot.export_root / "below/the/root"
    tree = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / operation_id).rglob("*")
        if path.is_file()
    }
    assert [line["identifier"] for line in log_lines(tree, operation_id)] == ["9.9"]
    del tree[f"{operation_id}/errors.log"]
    assert tree == tree_of(operation_id, SEED_INSTANCES, depot.instances)
