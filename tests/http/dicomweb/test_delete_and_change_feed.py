"""Deleting, and the change feed that tells of everything that was stored, replaced and deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.http.answers import COMMON_HEADERS, assert_error
from tests.http.dicomweb.conftest import Made, Web, make, new_uid, open_web

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
KEYS = [
    "sequence",
    "partitionName",
    "studyInstanceUid",
    "seriesInstanceUid",
    "sopInstanceUid",
    "action",
    "timestamp",
    "state",
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A service with 230 changes, which the tests leave as they are."""
    with open_web(tmp_path_factory.mktemp("filled")) as running:
        study = new_uid()
        running.must_store(*(make(study=study) for _ in range(115)))
        running.must_store(*(make(study=study) for _ in range(115)))
        yield running


def feed(web: Web, version: str = "v2", **query: object) -> list[dict[str, Any]]:
    answer = web.client.get(f"/{version}/changefeed", params={name: str(value) for name, value in query.items()})
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()
    return list(answer.json())


def position(web: Web) -> int:
    """The number of the last change; 0 before the first one."""
    answer = web.client.get("/v2/changefeed/latest")
    return 0 if answer.status_code == 204 else int(answer.json()["sequence"])


def since(web: Web, start: int, *made: Made) -> list[tuple[str, str, str]]:
    """Instance, action and state of the changes behind `start`."""
    wanted = {each.sop for each in made}
    entries = [entry for entry in feed(web, offset=start) if entry["sopInstanceUid"] in wanted]
    return [(entry["sopInstanceUid"], entry["action"], entry["state"]) for entry in entries]


# Deleting


@VERSIONS
@pytest.mark.parametrize("level", ["study", "series", "instance"])
def test_deleting_takes_what_is_below_and_nothing_else(web: Web, version: str, level: str) -> None:
    first = make()
    same_series = make(study=first.study, series=first.series)
    same_study = make(study=first.study)
    same_uid = make(sop=first.sop)
    everything = [first, same_series, same_study, same_uid]
    web.must_store(*everything)
    path = {
        "study": f"/studies/{first.study}",
        "series": f"/studies/{first.study}/series/{first.series}",
        "instance": first.path,
    }[level]
    gone = {"study": [first, same_series, same_study], "series": [first, same_series], "instance": [first]}[level]
    answer = web.client.delete(f"/{version}{path}")
    assert answer.status_code == 204
    assert answer.content == b""
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()
    assert [each for each in everything if not web.is_stored(each)] == gone
    error = assert_error(web.client.delete(f"/{version}{path}"), 404, "NotFound")
    assert error["target"] == level
    assert first.study in error["message"]


@VERSIONS
@pytest.mark.parametrize("accept", ["text/html", "application/dicom", "image/png;q=0"])
def test_deleting_asks_for_no_accept(web: Web, version: str, accept: str) -> None:
    made = make()
    web.must_store(made)
    assert web.client.delete(f"/{version}{made.path}", headers={"Accept": accept}).status_code == 204


@VERSIONS
@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/studies/abc", "study"),
        ("/studies/1.2./series/1", "study"),
        ("/studies/1/series/x", "series"),
        ("/studies/1/series/1/instances/%20", "instance"),
    ],
)
def test_deleting_by_a_bad_uid_is_400(web: Web, version: str, path: str, target: str) -> None:
    error = assert_error(web.client.delete(f"/{version}{path}"), 400, "InvalidIdentifier")
    assert error["target"] == target


@VERSIONS
def test_deleting_from_another_study_deletes_nothing(web: Web, version: str) -> None:
    made = make()
    web.must_store(made)
    start = position(web)
    for path in (
        f"/studies/{new_uid()}/series/{made.series}/instances/{made.sop}",
        f"/studies/{made.study}/series/{new_uid()}/instances/{made.sop}",
        f"/studies/{new_uid()}/series/{made.series}",
        f"/studies/{made.series}",
    ):
        assert_error(web.client.delete(f"/{version}{path}"), 404, "NotFound")
    assert web.is_stored(made)
    assert position(web) == start


def test_the_other_instances_of_a_study_stay_in_its_metadata(web: Web) -> None:
    first = make()
    second = make(study=first.study)
    web.must_store(first, second)
    web.client.delete(f"/v2{first.path}")
    [data_set] = web.metadata(f"/studies/{first.study}")
    assert data_set["00080018"]["Value"] == [second.sop]
    web.client.delete(f"/v2{second.path}")
    assert_error(web.get(f"/studies/{first.study}/metadata"), 404, "NotFound")


# The change feed: entries


@VERSIONS
def test_an_entry_has_these_members_in_this_order(web: Web, version: str) -> None:
    made = make(PatientName="Feed")
    before = datetime.now(UTC)
    web.must_store(made)
    [entry] = feed(web, version, offset=position(web) - 1)
    assert list(entry) == [*KEYS, "metadata"]
    assert entry["partitionName"] == "Microsoft.Default"
    assert (entry["studyInstanceUid"], entry["seriesInstanceUid"], entry["sopInstanceUid"]) == made[:3]
    assert (entry["action"], entry["state"]) == ("Create", "Current")
    assert isinstance(entry["sequence"], int)
    moment = datetime.fromisoformat(entry["timestamp"])
    assert moment.utcoffset() == timedelta(0)
    assert before - timedelta(seconds=2) <= moment <= datetime.now(UTC) + timedelta(seconds=2)
    assert entry["metadata"] == web.metadata(made.path)[0]
    assert entry["metadata"]["00100010"]["Value"] == [{"Alphabetic": "Feed"}]


def test_links_in_the_feed_lead_to_the_bulk_data(web: Web) -> None:
    made = make(change=lambda each: each.add_new(0x00420011, "OB", b"document"))
    web.must_store(made)
    for version in ("v1", "v2"):
        entry = web.client.get(f"/{version}/changefeed/latest").json()
        link = entry["metadata"]["00420011"]["BulkDataURI"]
        assert link == f"{web.service.url}/{version}{made.path}/bulkdata/00420011"
        assert httpx.get(link, headers={"Accept": "application/octet-stream"}).content == b"document"


def test_actions_and_states_through_the_life_of_an_instance(web: Web) -> None:
    made = make()
    changed = make(study=made.study, series=made.series, sop=made.sop, PatientName="Changed")
    start = position(web)
    seen = [since(web, start, made)]
    for step in (
        lambda: web.must_store(made),
        lambda: web.must_store(changed, method="PUT"),
        lambda: web.must_store(changed, method="PUT"),  # the same bytes: no change
        lambda: web.client.delete(f"/v2{made.path}"),
        lambda: web.client.delete(f"/v2{made.path}"),
        lambda: web.must_store(made),
        lambda: web.store(made),  # 409: no change
    ):
        step()
        seen.append(since(web, start, made))
    sops = [[sop for sop, _, _ in entries] for entries in seen]
    assert all(sop == made.sop for entries in sops for sop in entries)
    assert [[(action, state) for _, action, state in entries] for entries in seen] == [
        [],
        [("Create", "Current")],
        [("Create", "Replaced"), ("Update", "Current")],
        [("Create", "Replaced"), ("Update", "Current")],
        [("Create", "Deleted"), ("Update", "Deleted"), ("Delete", "Deleted")],
        [("Create", "Deleted"), ("Update", "Deleted"), ("Delete", "Deleted")],
        [("Create", "Replaced"), ("Update", "Replaced"), ("Delete", "Replaced"), ("Create", "Current")],
        [("Create", "Replaced"), ("Update", "Replaced"), ("Delete", "Replaced"), ("Create", "Current")],
    ]
    entries = [entry for entry in feed(web, offset=start) if entry["sopInstanceUid"] == made.sop]
    assert ["metadata" in entry for entry in entries] == [False, False, False, True]


@pytest.mark.parametrize("level", ["study", "series"])
def test_deleting_a_study_or_series_is_one_entry_for_each_instance(web: Web, level: str) -> None:
    first = make()
    second = make(study=first.study, series=first.series)
    web.must_store(first, second)
    start = position(web)
    path = f"/studies/{first.study}" + (f"/series/{first.series}" if level == "series" else "")
    assert web.client.delete(f"/v1{path}").status_code == 204
    found = since(web, start, first, second)
    assert sorted(found) == sorted((each.sop, "Delete", "Deleted") for each in (first, second))


def test_what_was_refused_is_not_in_the_feed(web: Web) -> None:
    start = position(web)
    web.store(make(without=["PatientID"]))
    web.store(b"no DICOM")
    assert feed(web, offset=start) == []


# The change feed: parameters


@VERSIONS
@pytest.mark.parametrize("name", ["includeMetadata", "includemetadata", "IncludeMetadata"])
@pytest.mark.parametrize("value", ["false", "False", "true", "TRUE"])
def test_metadata_is_included_unless_it_is_switched_off(filled: Web, version: str, name: str, value: str) -> None:
    for path in ("changefeed", "changefeed/latest"):
        answer = filled.client.get(f"/{version}/{path}", params={name: value}).json()
        entry = answer[0] if isinstance(answer, list) else answer
        assert list(entry) == KEYS + (["metadata"] if value.lower() == "true" else [])


@pytest.mark.parametrize(("version", "default", "highest"), [("v1", 10, 100), ("v2", 100, 200)])
def test_the_limit_and_its_default_depend_on_the_version(filled: Web, version: str, default: int, highest: int) -> None:
    assert len(feed(filled, version, includeMetadata="false")) == default
    assert len(feed(filled, version, limit=highest, includeMetadata="false")) == highest
    assert len(feed(filled, version, limit=1)) == 1
    for bad in ("0", "-1", str(highest + 1), "201", "x", "", "1.5", "99999999999999999999"):
        error = assert_error(filled.client.get(f"/{version}/changefeed?limit={bad}"), 400, "InvalidRequest")
        assert error["target"] == "limit"
        assert "limit" in error["message"]


@VERSIONS
@pytest.mark.parametrize("query", ["offset=-1", "offset=x", "offset=", "offset=1.5", "includeMetadata=maybe"])
def test_parameters_that_cannot_be_read_are_400(filled: Web, version: str, query: str) -> None:
    error = assert_error(filled.client.get(f"/{version}/changefeed?{query}"), 400, "InvalidRequest")
    assert error["target"] == query.partition("=")[0]


@VERSIONS
def test_names_of_parameters_are_read_in_any_letter_case(filled: Web, version: str) -> None:
    answer = filled.client.get(f"/{version}/changefeed?Offset=5&LIMIT=2&INCLUDEMETADATA=false").json()
    assert [list(entry) for entry in answer] == [KEYS, KEYS]
    assert answer == feed(filled, version, offset=5, limit=2, includeMetadata="false")


@VERSIONS
@pytest.mark.parametrize("limit", [7, 100])
def test_paging_by_offset_shows_every_entry_once_and_in_order(filled: Web, version: str, limit: int) -> None:
    seen: list[int] = []
    offset = 0
    while page := feed(filled, version, offset=offset, limit=limit, includeMetadata="false"):
        assert len(page) <= limit
        seen += [entry["sequence"] for entry in page]
        offset = page[-1]["sequence"]
    assert seen == list(range(1, 231))
    assert feed(filled, version, offset=2**40) == []


def test_paging_goes_on_while_others_store_and_delete(web: Web) -> None:
    offset = start = position(web)
    seen: list[dict[str, Any]] = []
    made = [make() for _ in range(12)]
    for number in range(12):
        web.must_store(made[number])
        if number % 3 == 2:
            web.client.delete(f"/v2{made[number].path}")
        page = feed(web, offset=offset, limit=1)
        seen += page
        offset = page[-1]["sequence"] if page else offset
    while page := feed(web, offset=offset, limit=3):
        seen += page
        offset = page[-1]["sequence"]
    assert [entry["sequence"] for entry in seen] == list(range(start + 1, start + 17))
    assert [entry["sopInstanceUid"] for entry in seen if entry["action"] == "Create"] == [each.sop for each in made]


# The change feed: times


def test_a_window_of_time_has_its_start_and_not_its_end(filled: Web) -> None:
    moments = sorted({entry["timestamp"] for entry in everything(filled)})
    first, last = moments[0], moments[-1]
    assert first < last
    by_moment = [entry["sequence"] for entry in everything(filled) if entry["timestamp"] == first]
    found = feed(filled, startTime=first, endTime=last, limit=200, includeMetadata="false")
    expected = [entry["sequence"] for entry in everything(filled) if first <= entry["timestamp"] < last]
    assert [entry["sequence"] for entry in found] == expected[:200]
    assert found[0]["sequence"] == by_moment[0]
    assert {entry["timestamp"] for entry in feed(filled, startTime=last, limit=200)} == {last}
    assert feed(filled, endTime=first) == []
    later = (datetime.fromisoformat(last) + timedelta(microseconds=1)).isoformat()
    assert feed(filled, startTime=later) == []


def everything(web: Web) -> list[dict[str, Any]]:
    return [entry for offset in (0, 200) for entry in feed(web, offset=offset, limit=200, includeMetadata="false")]


def test_in_a_window_of_time_the_offset_counts_entries(filled: Web) -> None:
    start, seen = "2020-01-01T00:00:00Z", list[int]()
    while page := feed(filled, startTime=start, offset=len(seen), limit=60, includeMetadata="false"):
        seen += [entry["sequence"] for entry in page]
    assert seen == list(range(1, 231))


@pytest.mark.parametrize(
    "text",
    ["{:%Y-%m-%dT%H:%M:%SZ}", "{:%Y-%m-%dT%H:%M:%S.%fZ}", "{:%Y-%m-%dT%H:%M:%S%z}", "{:%Y-%m-%d %H:%M:%S+00:00}"],
)
def test_times_are_read_in_the_usual_forms(filled: Web, text: str) -> None:
    now = datetime.now(UTC)
    assert feed(filled, startTime=text.format(now + timedelta(days=1))) == []
    assert len(feed(filled, startTime=text.format(now - timedelta(days=1)), limit=3)) == 3


def test_a_time_zone_counts_and_its_plus_sign_may_be_bare(filled: Web) -> None:
    ahead = datetime.now(UTC) + timedelta(hours=1, minutes=30)
    local = ahead.strftime("%Y-%m-%dT%H:%M:%S")
    assert len(filled.client.get(f"/v2/changefeed?startTime={local}%2B02:00&limit=1").json()) == 1
    assert len(filled.client.get(f"/v2/changefeed?startTime={local}+02:00&limit=1").json()) == 1
    assert filled.client.get(f"/v2/changefeed?startTime={local}Z&limit=1").json() == []
    assert filled.client.get(f"/v2/changefeed?starttime={local}Z&limit=1").json() == []


@pytest.mark.parametrize("name", ["startTime", "endTime"])
@pytest.mark.parametrize(
    "text",
    [
        "2026-01-31T08:00:00",
        "2026-01-31",
        "2026-01-31 08:00:00",
        "yesterday",
        "",
        "08:00Z",
        "2026-13-01T00:00:00Z",
        "0",
    ],
)
def test_a_time_without_its_zone_is_400(filled: Web, name: str, text: str) -> None:
    error = assert_error(filled.client.get("/v2/changefeed", params={name: text}), 400, "InvalidRequest")
    assert error["target"] == name
    assert name in error["message"]


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("2026-01-31T08:00:00Z", "2026-01-31T08:00:00Z"),
        ("2026-01-31T08:00:01Z", "2026-01-31T08:00:00Z"),
        ("2026-01-31T08:00:00Z", "2026-01-31T08:59:59+01:00"),
    ],
)
def test_a_window_must_end_after_it_begins(filled: Web, start: str, end: str) -> None:
    answer = filled.client.get("/v2/changefeed", params={"startTime": start, "endTime": end})
    assert assert_error(answer, 400, "InvalidRequest")["target"] == "startTime"


def test_version_1_knows_no_times(filled: Web) -> None:
    assert len(feed(filled, "v1", startTime="not a time", endTime="2000-01-01T00:00:00Z")) == 10


# The latest change, and none at all


@VERSIONS
def test_latest_is_the_last_change(web: Web, version: str) -> None:
    made = make()
    web.must_store(made)
    entry = web.client.get(f"/{version}/changefeed/latest").json()
    assert list(entry) == [*KEYS, "metadata"]
    assert (entry["sopInstanceUid"], entry["action"]) == (made.sop, "Create")
    web.client.delete(f"/v2{made.path}")
    entry = web.client.get(f"/{version}/changefeed/latest").json()
    assert list(entry) == KEYS
    assert (entry["sopInstanceUid"], entry["action"], entry["state"]) == (made.sop, "Delete", "Deleted")


def test_before_anything_was_stored_the_feed_is_empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_web(tmp_path_factory.mktemp("empty")) as empty:
        for version in ("v1", "v2"):
            assert feed(empty, version) == []
            answer = empty.client.get(f"/{version}/changefeed/latest")
            assert answer.status_code == 204
            assert answer.content == b""
        assert feed(empty, startTime="2020-01-01T00:00:00Z") == []


# Partitions


@VERSIONS
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/partitions", "/partitions/Microsoft.Default/studies", "/partitions/x/studies/1.2.3/series/1/metadata"]
)
def test_partitions_are_refused_everywhere(filled: Web, version: str, method: str, path: str) -> None:
    answer = filled.client.request(method, f"/{version}{path}")
    assert assert_error(answer, 400, "PartitionsDisabled")["target"] == "partitionName"


@VERSIONS
def test_the_feed_is_json_that_every_reader_takes(filled: Web, version: str) -> None:
    answer = filled.client.get(f"/{version}/changefeed?limit=100")
    assert len(json.loads(answer.content, parse_constant=pytest.fail)) == 100
    assert_error(filled.client.post(f"/{version}/changefeed"), 405, "MethodNotAllowed")
