"""What a fault does to an export: passing ones are retried, permanent ones fail it, one object's skip that object."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.durability.faults_place import RETRY_SECONDS, FaultsPlace, faults_place
from tests.support.archive import instance_keys
from tests.support.fault_endpoint import Action, Delay, Reset, Respond, Rule

_UNKNOWN = "1.2.3"


@pytest.fixture(scope="module")
def running_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultsPlace]:
    with faults_place(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.fixture
def place(running_place: FaultsPlace) -> Iterator[FaultsPlace]:
    yield running_place
    running_place.endpoint.clear_rules()


@contextmanager
def _for_a_while(rule: Rule, seconds: float) -> Iterator[None]:
    time.sleep(seconds)
    yield
    rule.enabled = False


@pytest.mark.parametrize(
    "actions",
    [
        [
            Respond(503, "ServerBusy", {"Retry-After": "1"}),
            Respond(429, "TooManyRequests", {"Retry-After": "1"}),
            Respond(500, "InternalError", after_commit=True),
            Respond(408, "RequestTimeout"),
        ],
        [Reset(), Reset(after_body_bytes=500), Reset(after_commit=True)],
    ],
    ids=["answers", "resets"],
)
def test_a_passing_fault_is_retried_and_never_becomes_a_skip(place: FaultsPlace, actions: list[Action]) -> None:
    container = place.new_container()
    rules = [place.add_rule(container, action, when=lambda attempt: attempt.number % 20 == 0) for action in actions]
    place.assert_whole(container, place.begin(container), place.sound)
    assert all(rule.acted_count > 12 for rule in rules)


def test_an_answer_that_takes_too_long_is_not_waited_for_and_asked_again(place: FaultsPlace) -> None:
    container = place.new_container()
    rule = place.add_rule(container, Delay(3.0), when=lambda attempt: attempt.number % 20 == 0, times=5)
    place.assert_whole(container, place.begin(container), place.sound)
    assert rule.acted_count == 5


def test_a_refusal_of_one_object_skips_it_with_the_refusals_code(place: FaultsPlace) -> None:
    container = place.new_container()
    refusals = {
        place.sound[23]: Respond(409, "SnapshotsPresent"),
        place.sound[123]: Respond(400, "InvalidBlobOrBlock"),
        place.sound[223]: Respond(413, "RequestBodyTooLarge"),
    }
    rules = [place.add_rule(container, answer, blob=f"*/{refused}.dcm") for refused, answer in refusals.items()]
    operation_id = place.begin(container)
    others = [ref for ref in place.sound if ref not in refusals]
    place.assert_whole(container, operation_id, others, {ref: answer.code for ref, answer in refusals.items()})
    assert [rule.acted_count for rule in rules] == [1, 1, 1], "a refusal is not asked again"
    assert all(str(refusals[ref].status) in error for ref, error in place.log(container, operation_id))


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "AuthorizationPermissionMismatch", "make a new one"),
        (401, "NoAuthenticationInformation", "make a new one"),
        (404, "ContainerNotFound", "Create it"),
        (409, "ContainerBeingDeleted", "409 ContainerBeingDeleted"),
    ],
)
def test_a_permanent_fault_midway_fails_the_operation_and_says_what_to_do(
    place: FaultsPlace, status: int, code: str, remedy: str
) -> None:
    container = place.new_container()
    place.add_rule(container, Respond(status, code), blob="*", when=lambda attempt: attempt.number > 120)
    operation_id = place.begin(container, _UNKNOWN, *place.sound)
    state = place.service.wait(operation_id)
    assert state["status"] == "failed"
    assert state["error"]["code"] == code
    assert remedy in state["error"]["message"]
    results = state["results"]
    assert results["skipped"] == 1
    assert results["exported"] + results["skipped"] <= results["total"]
    assert results["exported"] == len(place.copies(container, operation_id)) > 80
    place.assert_silent(container)


@pytest.mark.parametrize("action", [Respond(503), Reset()], ids=["503", "reset"])
def test_an_outage_shorter_than_the_retry_time_is_waited_out_without_a_skip(place: FaultsPlace, action: Action) -> None:
    container = place.new_container()
    outage = place.add_rule(container, action, blob="*", when=lambda attempt: attempt.number > 100)
    operation_id = place.begin(container)
    place.wait_for_copies(container, 90)
    with _for_a_while(outage, RETRY_SECONDS / 2):
        assert place.service.operation(operation_id)["status"] == "running"
    place.assert_whole(container, operation_id, place.sound)


def test_an_outage_longer_than_the_retry_time_fails_the_operation(place: FaultsPlace) -> None:
    container = place.new_container()
    place.add_rule(container, Respond(503), blob="*", when=lambda attempt: attempt.number > 100)
    started = time.monotonic()
    operation_id = place.begin(container, _UNKNOWN, *place.sound)
    state = place.service.wait(operation_id)
    assert RETRY_SECONDS < time.monotonic() - started < RETRY_SECONDS + 20
    assert (state["status"], state["error"]["code"]) == ("failed", "DestinationUnavailable")
    assert "503 ServerBusy" in state["error"]["message"]
    assert state["results"]["skipped"] == 1
    assert state["results"]["exported"] == len(place.copies(container, operation_id))


def test_a_log_write_that_fails_for_a_while_or_whose_answer_is_lost_is_completed(place: FaultsPlace) -> None:
    container = place.new_container()
    # The first two prove that the destination is writable.
    rules = [
        place.add_rule(container, action, blob="*/errors.log", when=lambda attempt: attempt.number > 2, times=1)
        for action in (Respond(503), Reset(), Reset(after_commit=True), Delay(3.0))
    ]
    operation_id = place.begin(container, _UNKNOWN, place.corrupt, *place.sound)
    place.assert_whole(container, operation_id, place.sound, {_UNKNOWN: "NotFound", place.corrupt: "SourceCorrupt"})
    assert [rule.acted_count for rule in rules] == [1, 1, 1, 1]


def test_an_operation_whose_log_may_not_be_completed_has_failed(place: FaultsPlace) -> None:
    container = place.new_container()
    place.add_rule(
        container, Respond(403, "AuthorizationFailure"), blob="*/errors.log", when=lambda attempt: attempt.number > 2
    )
    state = place.service.wait(place.begin(container, _UNKNOWN, *place.sound))
    assert (state["status"], state["error"]["code"]) == ("failed", "AuthorizationFailure")
    assert state["results"]["exported"] == len(place.sound)


def test_damaged_and_missing_stored_objects_are_skipped(place: FaultsPlace) -> None:
    container = place.new_container()
    operation_id = place.begin(container, *place.archive.identifiers[:300])
    damaged = {place.corrupt: "SourceCorrupt", place.missing: "SourceMissing"}
    present = [ref for ref in place.archive.identifiers[:300] if ref not in damaged]
    place.assert_whole(container, operation_id, present, damaged)


def test_a_store_that_goes_away_is_waited_for_without_a_skip(place: FaultsPlace) -> None:
    container = place.new_container()
    place.add_rule(container, Delay(0.03))
    operation_id = place.begin(container)
    place.wait_for_copies(container, 50)
    store = place.archive.settings.store_path
    away = store.rename(store.with_name("unmounted"))
    time.sleep(RETRY_SECONDS / 2)
    assert place.service.operation(operation_id)["status"] == "running"
    away.rename(store)
    place.assert_whole(container, operation_id, place.sound)


def test_a_store_that_stays_away_fails_the_operation_and_is_named(place: FaultsPlace) -> None:
    container = place.new_container()
    store = place.archive.settings.store_path
    away = store.rename(store.with_name("unmounted"))
    try:
        state = place.service.wait(place.begin(container))
    finally:
        away.rename(store)
    assert (state["status"], state["error"]["code"]) == ("failed", "SourceUnavailable")
    assert state["results"]["skipped"] == 0


def test_large_instances_are_streamed_and_a_cut_one_is_sent_again(place: FaultsPlace) -> None:
    container = place.new_container()
    cut = place.add_rule(container, Reset(after_body_bytes=100_000), blob=f"*/{place.large[0]}.dcm", times=2)
    operation_id = place.begin(container, *place.large)
    place.assert_whole(container, operation_id, place.large)
    assert cut.acted_count == 2
    keys = instance_keys(operation_id, place.large)
    assert {place.endpoint.objects[f"{container}/{key}"].put_count for key in keys.values()} == {1}
    assert any("blockid" in record.query_keys for record in place.endpoint.requests), "it went in blocks"


def test_a_large_corrupt_instance_never_becomes_visible(place: FaultsPlace) -> None:
    container = place.new_container()
    operation_id = place.begin(container, *place.large, place.large_corrupt)
    place.assert_whole(container, operation_id, place.large, {place.large_corrupt: "SourceCorrupt"})
    [key] = instance_keys(operation_id, [place.large_corrupt]).values()
    assert not [
        record for record in place.endpoint.requests if record.path.endswith(key) and "blocklist" in record.query_keys
    ]
