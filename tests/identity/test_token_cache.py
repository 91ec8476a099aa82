"""The cache of one token: renewed in time and seldom, asked for once, and sparing with what fails."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from dicom_depot.adapters.token_cache import TokenCache
from dicom_depot.domain.errors import IdentityUnavailable
from dicom_depot.domain.identity import AccessToken


class _Giver:
    """Gives numbered tokens that live for `life_seconds` by a clock that a test moves."""

    def __init__(self, life_seconds: float) -> None:
        self.now = 1_000_000.0
        self.life_seconds = life_seconds
        self.asked = 0
        self.is_away = False
        self.gate = threading.Event()
        self.gate.set()
        self.cache = TokenCache(self.ask, lambda: self.now)

    def ask(self) -> AccessToken:
        self.asked += 1
        self.gate.wait(10)
        if self.is_away:
            raise IdentityUnavailable("nobody is there")
        expires_at = datetime.fromtimestamp(self.now, UTC) + timedelta(seconds=self.life_seconds)
        return AccessToken(f"token {self.asked}", expires_at)

    def get(self) -> str:
        return self.cache.get().token


@pytest.mark.parametrize(
    ("life_seconds", "renewed_after"),
    [(5, 3), (60, 36), (750, 450), (3600, 3300), (86400, 86100)],
)
def test_a_token_is_renewed_when_little_of_its_life_is_left(life_seconds: float, renewed_after: float) -> None:
    giver = _Giver(life_seconds)
    assert giver.get() == "token 1"
    giver.now += renewed_after - 0.01
    assert giver.get() == "token 1"
    giver.now += 0.02
    assert giver.get() == "token 2"


def test_many_threads_ask_once() -> None:
    giver = _Giver(3600)
    giver.gate.clear()
    with ThreadPoolExecutor(32) as pool:
        waiting = [pool.submit(giver.get) for _ in range(32)]
        giver.gate.set()
        assert {each.result() for each in waiting} == {"token 1"}
    assert giver.asked == 1


def test_many_threads_share_one_failure() -> None:
    giver = _Giver(3600)
    giver.is_away = True
    giver.gate.clear()
    with ThreadPoolExecutor(32) as pool:
        waiting = [pool.submit(giver.get) for _ in range(32)]
        giver.gate.set()
        for each in waiting:
            with pytest.raises(IdentityUnavailable, match="nobody is there"):
                each.result()
    assert giver.asked == 1


def test_nobody_waits_for_a_renewal_while_the_kept_token_lives() -> None:
    giver = _Giver(3600)
    giver.get()
    giver.now += 3400
    giver.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        renewing = pool.submit(giver.get)
        while giver.asked < 2:
            pass
        assert pool.submit(giver.get).result(5) == "token 1"
        giver.gate.set()
        assert renewing.result(5) == "token 2"


def test_the_kept_token_serves_to_its_end_when_it_cannot_be_renewed() -> None:
    giver = _Giver(3600)
    giver.get()
    giver.is_away = True
    giver.now += 3400
    assert [giver.get() for _ in range(5)] == ["token 1"] * 5
    assert giver.asked == 2  # once a second at most
    giver.now += 1.01
    assert giver.get() == "token 1"
    assert giver.asked == 3
    giver.now += 199
    with pytest.raises(IdentityUnavailable):
        giver.get()
    giver.is_away = False
    giver.now += 1.01
    assert giver.get() == "token 5"


def test_a_discarded_token_is_not_given_again_and_a_newer_one_stays() -> None:
    giver = _Giver(3600)
    first = giver.cache.get()
    giver.cache.discard(first)
    assert giver.get() == "token 2"
    giver.cache.discard(first)
    assert giver.get() == "token 2"


def test_an_unexpected_error_does_not_block_those_who_come_later() -> None:
    giver = _Giver(3600)
    giver.cache = TokenCache(lambda: AccessToken("x", None), lambda: giver.now)  # type: ignore[arg-type]  # broken
    for _ in range(2):
        with pytest.raises(AttributeError):
            giver.cache.get()
