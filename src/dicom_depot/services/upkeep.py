"""What must happen now and then: forget operations after their retention, sweep what was deleted long enough ago."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from dicom_depot.ports import BlobStore, InstanceIndex, OperationStore

_log = logging.getLogger(__name__)

_BATCH = 500


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Every method may be interrupted anywhere and run again."""

    index: InstanceIndex
    store: BlobStore
    operations: OperationStore
    retention: timedelta
    delete_delay: timedelta

    def run(self) -> None:
        """Do everything that is due."""
        purged = 0
        while ids := self.operations.purge(datetime.now(UTC) - self.retention):
            purged += len(ids)
        swept = self.sweep()
        if purged or swept:
            _log.info("upkeep: %d ended operations forgotten, %d deleted instances swept", purged, swept)

    def sweep(self) -> int:
        """Remove bytes, then rows, of instances deleted before the delay that no running export still needs."""
        swept = 0
        while True:
            oldest = self.operations.oldest_active_cutoff()
            rows = self.index.sweepable(datetime.now(UTC) - self.delete_delay, oldest, _BATCH)
            if not rows:
                return swept
            for _, store_key in rows:
                self.store.delete(store_key)
            self.index.forget([instance_id for instance_id, _ in rows])
            swept += len(rows)
