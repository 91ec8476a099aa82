"""How many copies run at once: slots that bound it, and the pace that an export finds for itself.

To a near destination a few threads are fastest, because more of them only take the interpreter from each other; to one
50 ms away every thread helps. No setting is right for both, so an export looks at what it gets done.
"""

from __future__ import annotations

import threading
import time
from collections import deque

_LOOK_SECONDS = 0.5
"""A look takes at least this long, and until each place has had two copies."""
_COPIES_OF_A_PLACE = 2
_COPIES_OF_A_FAULT = 20
"""A fault to fewer copies than this is trouble."""
_COPY_BYTES = 256 * 1024
"""What a copy costs beside its bytes, in bytes that could be sent instead."""
_FIRST_PLACES = 4
_WORTH_DOUBLING = 1.35
_WORTH_MORE = 1.08
_WORTH_FEWER = 0.95
"""What doubling, a quarter more and a quarter fewer must make of the rate to be kept. Where each copy waits for an
answer it is 2, 1.25 and 0.75; where the processor is the limit it is 1 or worse, give or take what else runs there.
"""
_LOOKS_BETWEEN_TRIALS = 4


class Slots:
    """A counting semaphore that serves those who wait in their order, and tells whether there are any.

    Several slots are taken at once: two that each held a part would wait for each other.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = count
        self._waiting: deque[tuple[int, threading.Event]] = deque()
        self._changing = threading.Lock()

    @property
    def count(self) -> int:
        return self._count

    @property
    def is_short(self) -> bool:
        """Whether somebody waits for a slot now."""
        return bool(self._waiting)

    @property
    def is_over(self) -> bool:
        """Whether more is held than there is, because there is less than there was."""
        return self._free < 0

    def resize(self, count: int) -> None:
        """Change how many there are; those held beyond that are missing until they are given back."""
        with self._changing:
            self._free += count - self._count
            self._count = count
            self._serve()

    def take(self, count: int) -> None:
        with self._changing:
            if count <= self._free and not self._waiting:
                self._free -= count
                return
            served = threading.Event()
            self._waiting.append((count, served))
        served.wait()

    def give_back(self, count: int) -> None:
        with self._changing:
            self._free += count
            self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            taken, served = self._waiting.popleft()
            self._free -= taken
            served.set()


class Pace:
    """The number of copies that one export runs at once, in `places`: at most `most`.

    It begins with a few and doubles them while that gets much more done. After that it tries now and then a quarter
    more, and a quarter fewer, and goes on in that direction while it pays; of two that are as fast it keeps the fewer.
    Many transient faults at a time halve it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = min(_FIRST_PLACES, most)
        self.places = Slots(self._count)
        self._changing = threading.Lock()
        self._begin_look(time.monotonic())
        self._rate: float | None = None
        self._kept = self._count
        self._is_growing = True
        self._looks = 0
        self._halved_at = 0.0

    @property
    def count(self) -> int:
        return self._count

    def copied(self, size: int) -> None:
        """An instance of `size` bytes was copied."""
        now = time.monotonic()
        with self._changing:
            self._done += size + _COPY_BYTES
            self._copies += 1
            seconds = now - self._looked_at
            if seconds >= _LOOK_SECONDS and self._copies >= _COPIES_OF_A_PLACE * self._count:
                rate = self._done / seconds
                self._begin_look(now)
                self._look(rate)

    def failed(self) -> None:
        """A copy met a transient fault of the destination. Now and then one is normal; many at a time are a request to
        slow down.
        """
        now = time.monotonic()
        with self._changing:
            self._faults += 1
            if self._faults * _COPIES_OF_A_FAULT <= self._copies + _COPIES_OF_A_PLACE * self._count:
                return
            if now - self._halved_at < _LOOK_SECONDS:
                return  # one moment of trouble fails many copies
            self._halved_at = now
            self._begin_look(now)
            self._rate, self._looks = None, _LOOKS_BETWEEN_TRIALS - 2  # soon look upwards again
            self._kept = max(1, self._kept // 2)
            self._is_growing = self._kept == 1
            self._set(self._kept)

    def _begin_look(self, now: float) -> None:
        self._looked_at, self._done, self._copies, self._faults = now, 0, 0, 0

    def _look(self, rate: float) -> None:
        before, self._rate = self._rate, rate
        if before is None:
            return  # what came first was slower, whatever the count
        if self._is_growing:
            if self._count != self._kept and rate < before * _WORTH_DOUBLING:
                self._is_growing = False
            else:
                self._kept = self._count
                self._is_growing = self._count < self._most
            self._set(self._kept * 2 if self._is_growing else self._kept)
            return
        if self._count != self._kept:  # a trial has ended
            is_upward = self._count > self._kept
            if rate < before * (_WORTH_MORE if is_upward else _WORTH_FEWER):
                self._set(self._kept)
            else:
                self._kept = self._count
                self._try(is_upward)
            return
        self._looks += 1
        number, has_to_wait = divmod(self._looks, _LOOKS_BETWEEN_TRIALS)
        if not has_to_wait:
            self._try(number % 2 == 1)

    def _try(self, is_upward: bool) -> None:
        step = max(1, self._kept // 4)
        self._set(self._kept + step if is_upward else self._kept - step)

    def _set(self, count: int) -> None:
        self._count = max(1, min(self._most, count))
        self.places.resize(self._count)
