"""One engine per data folder: an exclusive lock that the kernel releases when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import time
from pathlib import Path

from dicom_depot.domain.errors import ConfigurationError

_NAME = "engine.lock"
_WAIT_SECONDS = 4.0
"""Longer than a server worker outlives its killed parent."""


class FolderLock:
    """Held from `acquire` to `release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises ConfigurationError, with the holder's process id and the remedy, when another process has it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                    os.close(descriptor)
                    raise ConfigurationError(
                        f"The data folder {self._path.parent} is in use by process {holder}. Stop that process, "
                        "send requests to it instead, or choose another folder with DICOM_DEPOT_DATA_DIR."
                    ) from None
                time.sleep(0.1)
        # A server worker's parent would only replace it: the parent is the process to stop.
        parent = multiprocessing.parent_process()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid() if parent is None else parent.pid).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
