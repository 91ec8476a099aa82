"""What must happen now and then: forget operations after their retention, sweep what was deleted long enough ago."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from dicom_depot.ports import BlobStore, InstanceIndex, OperationStore, QueryTags

_log = logging.getLogger(__name__)

_BATCH = 500


@dataclass(slots=True)
class Upkeep:
    """Every method may be interrupted anywhere and run again. One per data folder: its engine's process runs it."""

    index: InstanceIndex
    store: BlobStore
    operations: OperationStore
    retention: timedelta
    delete_delay: timedelta
    tags: QueryTags
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _holders: int = 0

    def run(self) -> None:
        """Do everything that is due."""
        purged = 0
        while ids := self.operations.purge(datetime.now(UTC) - self.retention):
            purged += len(ids)
        swept = self.sweep()
        self.tags.sweep()
        if purged or swept:
            _log.info("upkeep: %d ended operations forgotten, %d deleted instances swept", purged, swept)

    def sweep(self) -> int:
        """Remove bytes, then rows, of instances deleted before the delay that no running export still needs."""
        swept = 0
        while True:
            with self._turn:
                if self._holders:
                    return swept  # the next run goes on
                oldest = self.operations.oldest_active_cutoff()
                rows = self.index.sweepable(datetime.now(UTC) - self.delete_delay, oldest, _BATCH)
                for _, store_key in rows:
                    self.store.delete(store_key)
                self.index.forget([instance_id for instance_id, _ in rows])
            if not rows:
                return swept
            swept += len(rows)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Sweep nothing while the block runs. An export that is being resumed is not active yet, so that nothing else
        protects what it found to be still there.
        """
        with self._turn:
            self._holders += 1
        try:
            yield
        finally:
            with self._turn:
                self._holders -= 1
