"""Threads of their own for what waits for others: destinations, the cloud's identity service, the audit trail's disk,
the store's disk.

The threads that all other requests share are few. If slow destinations could take them all, status, health and sign-in
would stand still with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

_P = ParamSpec("_P")
_T = TypeVar("_T")

WAITING_MAX = 16
STORING_MAX = 16
STORES_MAX = 64
"""Requests to store that are read at the same time; each holds up to 2 MiB. Further ones wait unread."""
_limiter = CapacityLimiter(WAITING_MAX)
_audit_limiter = CapacityLimiter(1)
_store_limiter = CapacityLimiter(STORING_MAX)
_store_places = CapacityLimiter(STORES_MAX)


def store_place() -> CapacityLimiter:
    """To be held, by `async with`, while a request to store is read."""
    return _store_places


async def run_waiting(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Run in a thread what may wait long for somebody else. Further calls wait for their turn."""
    return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=_limiter)


async def run_audit(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Write audit lines in a thread, one after the other: they keep their order, and no request waits on the disk."""
    return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=_audit_limiter)


async def run_storing(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Run in a thread what reads, writes and commits instances."""
    return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=_store_limiter)
