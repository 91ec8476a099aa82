"""The number of copies at once that an export finds for itself, on simulated destinations and a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dicom_depot.export import pace as module
from dicom_depot.export.pace import Pace, Slots

SIZE = 50 * 1024


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run(pace: Pace, clock: Clock, seconds: float, rate: Callable[[int], float], noise: float = 0.0) -> list[int]:
    """Copy for a while at `rate(count)` copies a second; the counts meanwhile, one for each copy."""
    chance = random.Random(1)
    counts = []
    end = clock.now + seconds
    while clock.now < end:
        clock.now += 1 / (rate(pace.count) * chance.uniform(1 - noise, 1 + noise))
        pace.copied(SIZE)
        counts.append(pace.count)
    return counts


def test_where_each_copy_waits_it_takes_all_within_seconds(clock: Clock) -> None:
    pace = Pace(64)
    run(pace, clock, 5, lambda count: count / 0.05, noise=0.1)
    assert pace.count == 64
    later = run(pace, clock, 60, lambda count: count / 0.05, noise=0.1)
    assert sum(later) / len(later) > 60


def test_where_more_only_get_in_each_others_way_it_stays_with_few(clock: Clock) -> None:
    pace = Pace(64)
    counts = run(pace, clock, 20, lambda count: 1000 / (1 + 0.05 * count), noise=0.3)
    assert max(counts) <= 8
    assert sum(counts) / len(counts) < 5


def test_it_finds_the_place_where_more_stop_to_help(clock: Clock) -> None:
    pace = Pace(64)
    run(pace, clock, 20, lambda count: min(count, 24) / 0.05)
    later = run(pace, clock, 60, lambda count: min(count, 24) / 0.05)
    assert 20 <= sum(later) / len(later) <= 28


def test_it_follows_a_destination_that_becomes_slower(clock: Clock) -> None:
    pace = Pace(64)
    run(pace, clock, 10, lambda count: 4000 / (1 + 0.1 * count))
    assert pace.count < 8
    run(pace, clock, 30, lambda count: count / 0.05)
    assert pace.count > 48


def test_a_moment_of_trouble_halves_it_once_and_an_outage_begins_anew(clock: Clock) -> None:
    pace = Pace(64)
    run(pace, clock, 5, lambda count: count / 0.05)
    clock.now += 1
    for _ in range(64):
        pace.failed()
    assert pace.count == 32
    for _ in range(20):
        clock.now += 1
        pace.failed()
    assert pace.count == 1
    run(pace, clock, 6, lambda count: count / 0.05)
    assert pace.count == 64


def test_a_fault_now_and_then_is_no_reason_to_slow_down(clock: Clock) -> None:
    pace = Pace(64)
    chance = random.Random(3)
    counts = []
    for _ in range(60_000):
        clock.now += 0.05 / pace.count
        if chance.random() < 0.01:
            pace.failed()
        else:
            pace.copied(SIZE)
        counts.append(pace.count)
    assert sum(counts[5000:]) / len(counts[5000:]) > 50


def test_copies_that_take_long_are_counted_too(clock: Clock) -> None:
    pace = Pace(16)
    run(pace, clock, 120, lambda count: count / 3.0)
    assert pace.count >= 14


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_small_setting_is_kept(clock: Clock, most: int) -> None:
    pace = Pace(most)
    counts = run(pace, clock, 30, lambda count: count / 0.01)
    assert max(counts) == most
    assert min(counts) >= 1


def test_slots_that_become_fewer_are_missing_until_they_are_given_back() -> None:
    slots = Slots(4)
    slots.take(3)
    slots.resize(2)
    assert slots.is_over
    slots.give_back(1)
    assert not slots.is_over
    slots.give_back(2)
    slots.take(2)
    assert not slots.is_over
