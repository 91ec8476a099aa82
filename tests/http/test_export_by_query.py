"""Exports by query, against a real Azurite: every byte of what a plain filter says, and nothing else."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.http.answers import assert_error
from tests.http.dicomweb.conftest import Made, make
from tests.support.azurite import Azurite
from tests.support.depot import Depot, Imported, open_depot, tree_of
from tests.support.fault_endpoint import Delay, FaultEndpoint, Rule
from tests.support.service import run_command

Attributes = dict[str, Any]
Filter = Callable[[Attributes], bool]

STUDIES: dict[str, Attributes] = {
    "1.1": {"PatientID": "P-1", "PatientName": "Doe^Jane", "StudyDate": "20240105", "StudyDescription": "Thorax"},
    "1.2": {"PatientID": "P-2", "PatientName": "Dönitz^Max", "StudyDate": "20240630", "StudyDescription": "Head 50%"},
    "1.3": {"PatientID": "Q-1", "PatientName": "Roe^Jane", "StudyDate": "20241231", "StudyDescription": "Head_neck"},
    "1.4": {"PatientID": "Q-2", "PatientName": "Poe^Edgar", "StudyDate": "20250101", "StudyDescription": "thorax"},
}
SERIES: dict[str, Attributes] = {
    "1": {"Modality": "CT", "SeriesNumber": 1, "SeriesDescription": "axial"},
    "2": {"Modality": "MR", "SeriesNumber": 2, "SeriesDescription": "localizer"},
    "3": {"Modality": "CT", "SeriesNumber": 3, "SeriesDescription": "coronal"},
}


def made_instances() -> dict[str, tuple[Attributes, Made]]:
    """By identifier. The last study has one series only, and no CT."""
    found = {}
    for study, of_study in STUDIES.items():
        for series, of_series in SERIES.items():
            if study == "1.4" and series != "2":
                continue
            for number in (1, 2, 3):
                series_uid, sop = f"{study}.{series}", f"{study}.{series}.{number}"
                attributes = of_study | of_series | {"InstanceNumber": number}
                made = make(study=study, series=series_uid, sop=sop, **attributes)
                uids = {"study": study, "series": series_uid, "sop": sop}
                found[f"{study}/{series_uid}/{sop}"] = (attributes | uids, made)
    return found


INSTANCES = made_instances()


@pytest.fixture(scope="module")
def queried(tmp_path_factory: pytest.TempPathFactory, azurite: Azurite, endpoint: FaultEndpoint) -> Iterator[Depot]:
    """A service that holds INSTANCES and plans its exports in small pages."""
    folder = tmp_path_factory.mktemp("queried")
    (folder / "files").mkdir()
    for identifier, (_, made) in INSTANCES.items():
        (folder / "files" / identifier.replace("/", "_")).write_bytes(made.content)
    run_command("import", str(folder / "files"), data_dir=folder / "imported")
    imported = Imported(folder / "imported", {identifier: made.content for identifier, (_, made) in INSTANCES.items()})
    with open_depot(folder, imported, azurite, endpoint, chunk_instances=2, log_level="DEBUG") as running:
        yield running


def body(destination: dict[str, Any], level: str, filters: dict[str, str], **settings: Any) -> dict[str, Any]:
    source = {"type": "query", "settings": {"level": level, "filters": filters, **settings}}
    return {"source": source, "destination": destination}


def start(depot: Depot, request: dict[str, Any], **headers: str) -> str:
    answer = depot.client.post("/v2/export", json=request, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


CASES: list[tuple[str, dict[str, str], Filter]] = [
    ("series", {"Modality": "CT", "StudyDate": "20240101-20241231"}, lambda a: a["Modality"] == "CT"),
    ("series", {"Modality": "ct"}, lambda a: a["Modality"] == "CT"),
    ("series", {"StudyDate": "20240630-"}, lambda a: a["StudyDate"] >= "20240630"),
    ("study", {"StudyDate": "-20240105"}, lambda a: a["study"] == "1.1"),
    ("study", {"StudyDate": "20241231"}, lambda a: a["study"] == "1.3"),
    ("study", {"ModalitiesInStudy": "CT"}, lambda a: a["study"] != "1.4"),
    ("study", {"PatientID": "p-*"}, lambda a: a["PatientID"][0] == "P"),
    ("study", {"PatientID": "?-2"}, lambda a: a["PatientID"][2] == "2"),
    ("study", {"StudyDescription": "Thorax"}, lambda a: a["StudyDescription"].lower() == "thorax"),
    ("study", {"StudyDescription": "Head_*"}, lambda a: a["study"] == "1.3"),
    ("study", {"StudyDescription": "*50%"}, lambda a: a["study"] == "1.2"),
    ("study", {"PatientName": "donitz^max"}, lambda a: a["study"] == "1.2"),
    ("study", {"StudyInstanceUID": "1.2,1.4,9.9"}, lambda a: a["study"] in ("1.2", "1.4")),
    ("series", {"0020000E": "1.1.2\\1.3.3"}, lambda a: a["series"] in ("1.1.2", "1.3.3")),
    ("series", {"SeriesDescription": "*al", "StudyDate": "20240101-20240531"}, lambda a: a["series"][-1] in "13"),
    ("series", {"PatientID": "P-1\\Q-1", "SeriesNumber": "2"}, lambda a: a["SeriesNumber"] == 2),
    ("instance", {"InstanceNumber": "2"}, lambda a: a["InstanceNumber"] == 2),
    (
        "instance",
        {"InstanceNumber": "3", "Modality": "MR"},
        lambda a: (a["InstanceNumber"], a["Modality"]) == (3, "MR"),
    ),
    ("instance", {"SOPInstanceUID": "1.1.1.2,1.4.2.1,9"}, lambda a: a["sop"] in ("1.1.1.2", "1.4.2.1")),
    ("instance", {"ModalitiesInStudy": "CT", "InstanceNumber": "1"}, lambda a: a["InstanceNumber"] == 1),
]
ALSO: dict[int, Filter] = {
    0: lambda a: a["StudyDate"] < "2025",
    14: lambda a: a["study"] == "1.1",
    15: lambda a: a["study"] in ("1.1", "1.3"),
    19: lambda a: a["study"] != "1.4",
}
"""What the other filter of a case says."""
FUZZY: list[tuple[str, str, Filter]] = [
    ("study", "jan", lambda a: "Jane" in a["PatientName"]),
    ("instance", "jane d", lambda a: a["study"] == "1.1"),
    ("series", "oe", lambda a: False),
]


def check(depot: Depot, request_of: Callable[[dict[str, Any]], dict[str, Any]], wanted: Filter) -> None:
    container, destination = depot.container()
    request = request_of(destination)
    identifiers = [each for each, (attributes, _) in INSTANCES.items() if wanted(attributes)]
    size = sum(len(depot.instances[each]) for each in identifiers)
    counted = depot.client.post("/v2/export?dryRun=true", json=request)
    assert counted.json() == {"count": len(identifiers), "bytes": size, "unmatched": []}, counted.text
    operation_id = start(depot, request)
    state = depot.service.wait(operation_id)
    assert state["status"] == "succeeded"
    results = {name: state["results"][name] for name in ("exported", "skipped", "total", "bytes")}
    assert results == {"exported": len(identifiers), "skipped": 0, "total": len(identifiers), "bytes": size}
    log = {f"{operation_id}/errors.log": b""}
    assert depot.azurite.read_tree(container) == tree_of(operation_id, identifiers, depot.instances) | log


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_a_plain_filter_says_is_exported_to_the_byte(queried: Depot, number: int) -> None:
    level, filters, wanted = CASES[number]
    also = ALSO.get(number, wanted)
    assert any(wanted(attributes) and also(attributes) for attributes, _ in INSTANCES.values())
    check(queried, lambda destination: body(destination, level, filters), lambda a: wanted(a) and also(a))


@pytest.mark.parametrize("number", range(len(FUZZY)))
def test_names_are_matched_by_their_words(queried: Depot, number: int) -> None:
    level, name, wanted = FUZZY[number]
    check(queried, lambda destination: body(destination, level, {"PatientName": name}, fuzzyMatching=True), wanted)
    if number < 2:  # as they stand, they name nobody
        check(queried, lambda destination: body(destination, level, {"PatientName": name}), lambda _: False)


@pytest.mark.parametrize(
    ("level", "filters", "target", "said"),
    [
        ("series", {"modality": "CT"}, "filters.modality", "Did you mean Modality?"),
        ("study", {"Modality": "CT"}, "filters.Modality", "belongs to the series"),
        ("series", {"InstanceNumber": "1"}, "filters.InstanceNumber", "belongs to the instance"),
        ("instance", {"Rows": "1"}, "filters.Rows", "cannot be searched"),
        ("instance", {"00091001": "1"}, "filters.00091001", "extended query tags"),
        ("series", {"StudyDate": "yesterday"}, "filters.StudyDate", "is no date"),
        ("series", {}, "filters", "leave `source` out for everything"),
        ("series", {"PatientName": "*"}, "filters", "leave `source` out for everything"),
        ("patient", {"PatientID": "1"}, "level", "must be one of"),
    ],
)
def test_a_query_that_is_not_understood_starts_nothing(
    queried: Depot, level: str, filters: dict[str, str], target: str, said: str
) -> None:
    _, destination = queried.container()
    before = queried.operations()
    for path in ("/v2/export", "/v1/export", "/export", "/v2/export?dryRun=true"):
        error = assert_error(queried.client.post(path, json=body(destination, level, filters)), 400, "InvalidRequest")
        assert error["target"] == f"source.settings.{target}"
        assert said in error["message"]
    assert queried.operations() == before


def test_the_same_key_names_the_same_query_only(queried: Depot) -> None:
    _, destination = queried.container()
    filters = {"Modality": "MR", "StudyDate": "2024" + "0101-"}
    key = {"Idempotency-Key": "the-same-query"}
    first = start(queried, body(destination, "series", filters), **key)
    assert start(queried, body(destination, "series", dict(reversed(filters.items()))), **key) == first
    for other in (
        body(destination, "instance", filters),
        body(destination, "series", filters | {"Modality": "CT"}),
        body(destination, "series", filters, fuzzymatching=True),
        {"destination": destination},
    ):
        refused = queried.client.post("/v2/export", json=other, headers=key)
        assert_error(refused, 422, "IdempotencyKeyReused")
    assert queried.service.wait(first)["results"]["exported"] == 12


def test_the_trail_names_attributes_and_neither_trail_nor_log_their_values(queried: Depot) -> None:
    _, destination = queried.container()
    filters = {"PatientName": "Dönitz^M*", "00100020": "P-2"}
    operation_id = start(queried, body(destination, "instance", filters))
    assert queried.service.wait(operation_id)["results"]["exported"] == 9
    queried.client.post("/v2/export?dryRun=true", json=body(destination, "series", {"PatientName": "Mustermann^Q"}))
    queried.client.post("/v2/export", json=body(destination, "study", {"StudyDate": "Mustermann^Q"}))
    trail = (queried.service.data_dir / "audit.log").read_text()
    said = '"queryLevel": "instance", "queryAttributes": ["00100020", "PatientName"]'
    lines = [json.loads(line) for line in trail.splitlines() if operation_id in line and said in line]
    assert sorted(line["event"] for line in lines) == ["export.started", "request"]
    written = trail + queried.service.log_path.read_text()
    for value in ("nitz", "P-2", "Mustermann", "u00f6"):
        assert value not in written


def test_a_query_export_that_was_canceled_goes_on_with_what_it_matched_then(queried: Depot) -> None:
    slow = Rule(Delay(0.3), "PUT", "*.dcm")
    destination = queried.faulty("query-resumed", slow)
    operation_id = start(queried, body(destination, "instance", {"Modality": "CT", "InstanceNumber": "2"}))
    while queried.service.operation(operation_id)["results"]["exported"] == 0:
        pass
    queried.client.post(f"/v2/operations/{operation_id}/cancel")
    canceled = queried.service.wait(operation_id)
    assert canceled["status"] == "canceled"
    slow.enabled = False

    late = make(
        study="1.1", series="1.1.1", sop="1.1.1.9", **(STUDIES["1.1"] | {"Modality": "MR", "InstanceNumber": 2})
    )
    headers = {"Content-Type": "application/dicom"}
    assert queried.client.post("/v2/studies", content=late.content, headers=headers).status_code == 200
    try:
        resumed = queried.client.post(f"/v2/operations/{operation_id}/resume", json={"destination": destination})
        assert resumed.status_code == 202, resumed.text
        assert queried.service.wait(operation_id)["status"] == "succeeded"
    finally:
        queried.client.delete(f"/v2{late.path}")
    wanted = [each for each, (a, _) in INSTANCES.items() if (a["Modality"], a["InstanceNumber"]) == ("CT", 2)]
    tree = queried.endpoint.read_tree("query-resumed")
    assert tree == tree_of(operation_id, wanted, queried.instances) | {f"{operation_id}/errors.log": b""}


def test_the_record_holds_the_query_and_only_the_series_that_match(queried: Depot) -> None:
    _, destination = queried.container()
    operation_id = start(queried, body(destination, "series", {"Modality": "MR"}))
    queried.service.wait(operation_id)
    path = queried.service.data_dir / "depot.sqlite"
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    [(query, identifiers)] = database.execute(
        "SELECT query, identifiers FROM operations WHERE id = ?", (operation_id,)
    ).fetchall()
    database.close()
    assert query == '{"level": "series", "filters": {"Modality": "MR"}, "fuzzymatching": false, "tagIds": []}'
    assert identifiers is None
