"""A destination that hangs or is away: it holds up no other export, and a cancellation does not wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.durability.faults_place import FaultsPlace, faults_place
from tests.support.fault_endpoint import Action, Hang, Respond

_CANCEL_SECONDS = 5.0
_UNKNOWN = "1.2.3"


@pytest.fixture(scope="module")
def running_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultsPlace]:
    root = tmp_path_factory.mktemp("hanging")
    with faults_place(root, export_request_seconds=8, export_retry_seconds=600) as running:
        yield running


@pytest.fixture
def place(running_place: FaultsPlace) -> Iterator[FaultsPlace]:
    yield running_place
    running_place.endpoint.clear_rules()
    for operation in httpx.get(f"{running_place.service.url}/v2/operations?status=running").json()["operations"]:
        _cancel(running_place, operation["operationId"])


def _cancel(place: FaultsPlace, operation_id: str) -> httpx.Response:
    return httpx.post(f"{place.service.url}/v2/operations/{operation_id}/cancel", timeout=30)


_TROUBLES = pytest.mark.parametrize("trouble", [Hang(), Respond(503)], ids=["hanging", "in back-off"])


@_TROUBLES
def test_an_export_whose_destination_is_in_trouble_does_not_hold_up_another(
    place: FaultsPlace, trouble: Action
) -> None:
    away, present = place.new_container(), place.new_container()
    place.add_rule(away, trouble, blob="*", when=lambda attempt: attempt.number > 30)
    stuck = place.begin(away)
    place.wait_for_copies(away, 20)
    time.sleep(1)
    started = time.monotonic()
    place.assert_whole(present, place.begin(present), place.sound)
    assert time.monotonic() - started < 30, "the other one had to wait for the hanging requests"
    assert place.service.operation(stuck)["status"] == "running"


def test_many_exports_in_trouble_do_not_hold_up_another(place: FaultsPlace) -> None:
    stuck = []
    for _ in range(10):
        away = place.new_container()
        place.add_rule(away, Respond(503), blob="*", when=lambda attempt: attempt.number > 2)
        stuck.append(place.begin(away))
    time.sleep(2)
    present = place.new_container()
    started = time.monotonic()
    place.assert_whole(present, place.begin(present), place.sound)
    assert time.monotonic() - started < 20
    assert {place.service.operation(each)["status"] for each in stuck} == {"running"}


@_TROUBLES
@pytest.mark.parametrize("has_log", [False, True], ids=["nothing skipped", "with lines to log"])
def test_a_cancellation_takes_seconds_whatever_the_destination_does(
    place: FaultsPlace, trouble: Action, has_log: bool
) -> None:
    container = place.new_container()
    place.add_rule(container, trouble, blob="*", when=lambda attempt: attempt.number > 30)
    operation_id = place.begin(container, *[_UNKNOWN] * has_log, *place.sound)
    place.wait_for_copies(container, 20)
    time.sleep(1)
    started = time.monotonic()
    assert _cancel(place, operation_id).status_code == 202
    state = place.service.wait(operation_id)
    assert time.monotonic() - started < _CANCEL_SECONDS
    assert state["status"] == "canceled"
    assert state["results"]["skipped"] == has_log
    assert state["results"]["exported"] == len(place.copies(container, operation_id))
    assert _cancel(place, operation_id).status_code == 200

    place.endpoint.clear_rules()
    place.assert_silent(container)
    # And what still hangs does not stop the next one.
    other = place.new_container()
    place.assert_whole(other, place.begin(other), place.sound)


def test_a_cancellation_while_the_log_is_completed_takes_seconds(place: FaultsPlace) -> None:
    container = place.new_container()
    hanging = place.add_rule(container, Hang(), blob="*/errors.log", when=lambda attempt: attempt.number > 2)
    operation_id = place.begin(container, _UNKNOWN, *place.sound)
    while not hanging.acted_count:
        time.sleep(0.05)
    assert place.service.operation(operation_id)["status"] == "running"
    started = time.monotonic()
    assert _cancel(place, operation_id).status_code == 202
    assert place.service.wait(operation_id)["status"] == "canceled"
    assert time.monotonic() - started < _CANCEL_SECONDS


def test_a_cancellation_in_full_swing_leaves_a_complete_log_and_true_counters(place: FaultsPlace) -> None:
    container = place.new_container()
    operation_id = place.begin(container, _UNKNOWN, place.corrupt, *place.sound)
    place.wait_for_copies(container, 40)
    assert _cancel(place, operation_id).status_code in {202, 409}
    state = place.service.wait(operation_id)
    results = state["results"]
    assert results["exported"] == len(place.copies(container, operation_id))
    assert results["skipped"] == len(place.log(container, operation_id))
    assert results["exported"] + results["skipped"] <= results["total"]
