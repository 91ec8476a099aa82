"""Ports and steps that fail at their n-th call: an error in place of the effect, or after it, or the process's death.

plan = FaultPlan("operations.commit_chunk", 2, When.AFTER, Crash)
operations = faulty(SqlOperations(database), "operations", plan)
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar, cast

_T = TypeVar("_T")


class Crash(BaseException):
    """The process died. Not an Exception, so that nothing in the service takes it for a failure to deal with."""


class When(StrEnum):
    """BEFORE: the call has no effect. AFTER: it has its whole effect, and the caller never learns of it."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(slots=True)
class FaultPlan:
    """Raise `error()` at the `number`-th call (from 1) of `name`, and at the `times` - 1 calls after it. Thread-safe.

    Without a name it only counts: `calls` says how often each name was called. After a Crash every further call
    raises it too: a dead process has no effects.
    """

    name: str | None = None
    number: int = 1
    when: When = When.BEFORE
    error: Callable[[], BaseException] = Crash
    times: int = 1
    calls: Counter[str] = field(default_factory=Counter)
    acted_count: int = 0
    is_dead: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, name: str, function: Callable[[], _T]) -> _T:
        """Call `function` under a name, or fail as planned."""
        with self._lock:
            if self.is_dead:
                raise Crash
            self.calls[name] += 1
            is_due = name == self.name and self.number <= self.calls[name] < self.number + self.times
            self.acted_count += is_due
        if not is_due:
            return function()
        if self.when is When.AFTER:
            function()
        error = self.error()
        if isinstance(error, Crash):
            self.is_dead = True
        raise error


class _Faulty:
    def __init__(self, port: object, name: str, plan: FaultPlan) -> None:
        self._port = port
        self._name = name
        self._plan = plan

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._port, attribute)
        if not callable(value) or attribute.startswith("_"):
            return value
        name = f"{self._name}.{attribute}"
        return lambda *args, **kwargs: self._plan.call(name, lambda: value(*args, **kwargs))


def faulty(port: _T, name: str, plan: FaultPlan) -> _T:
    """Wrap any port: its methods are called under `<name>.<method>` of the plan."""
    return cast("_T", _Faulty(port, name, plan))
