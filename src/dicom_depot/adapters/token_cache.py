"""Keeps one bearer token: renewed in time, asked for once however many threads need it, whoever gives it.

A token is renewed when five minutes of its life are left, or 40 % of the life that it had when it came if that is less:
tokens that live for seconds work too, with few requests. While it is being renewed, or cannot be, what is kept serves
until its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import NamedTuple

from dicom_depot.domain.errors import IdentityUnavailable
from dicom_depot.domain.identity import AccessToken

_MARGIN_SECONDS_MAX = 300.0
_MARGIN_SHARE = 0.4
_REQUEST_SECONDS = 0.5
"""Less life than this is not enough for a request to arrive."""
_FAILURE_PAUSE_SECONDS = 1.0


class _Kept(NamedTuple):
    token: AccessToken
    renew_at: float

    def is_usable(self, now: float) -> bool:
        return now < self.token.expires_at.timestamp() - _REQUEST_SECONDS


class TokenCache:
    """Safe for many threads. Every method but `discard` and `clear` raises IdentityUnavailable."""

    def __init__(self, ask: Callable[[], AccessToken], clock: Callable[[], float] = time.time) -> None:
        """ask: makes one request for a token. clock: seconds since the epoch."""
        self._ask = ask
        self._clock = clock
        self._lock = Lock()
        self._kept: _Kept | None = None
        self._flight: Future[AccessToken] | None = None
        self._failure: tuple[IdentityUnavailable, float] | None = None

    def get(self) -> AccessToken:
        """A token with life left: the kept one, or a new one."""
        with self._lock:
            now = self._clock()
            kept = self._kept
            if kept is not None and now < kept.renew_at:
                return kept.token
            usable = kept.token if kept is not None and kept.is_usable(now) else None
            if self._failure is not None and now < self._failure[1]:
                if usable is not None:
                    return usable
                raise IdentityUnavailable(self._failure[0].message)
            flight, is_mine = self._flight, False
            if flight is None:
                flight, is_mine = Future[AccessToken](), True
                self._flight = flight
            elif usable is not None:
                return usable
        if is_mine:
            self._fly(flight)
        try:
            return flight.result()
        except IdentityUnavailable as error:
            if usable is not None:
                return usable
            raise IdentityUnavailable(error.message) from None

    def renew(self) -> AccessToken:
        """A token asked for now, whatever is kept."""
        token = self._ask()
        with self._lock:
            self._keep(token)
        return token

    def discard(self, token: AccessToken) -> None:
        """Forget this token, if it is still the one that is kept."""
        with self._lock:
            if self._kept is not None and self._kept.token.token == token.token:
                self._kept = None

    def clear(self) -> None:
        with self._lock:
            self._kept = self._failure = None

    def _fly(self, flight: Future[AccessToken]) -> None:
        """Ask, for everybody who waits for `flight`. Between failing requests there is a pause."""
        try:
            token = self._ask()
        except BaseException as error:
            with self._lock:
                self._flight = None
                if isinstance(error, IdentityUnavailable):
                    self._failure = error, self._clock() + _FAILURE_PAUSE_SECONDS
            flight.set_exception(error)
        else:
            with self._lock:
                self._flight = None
                self._keep(token)
            flight.set_result(token)

    def _keep(self, token: AccessToken) -> None:
        expires_at = token.expires_at.timestamp()
        margin = min(_MARGIN_SECONDS_MAX, _MARGIN_SHARE * (expires_at - self._clock()))
        self._kept = _Kept(token, expires_at - margin)
        self._failure = None
