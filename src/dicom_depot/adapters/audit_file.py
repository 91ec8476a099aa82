"""The audit trail as a file of JSON lines.

Each line is one write to a file opened for appending, so that lines of several processes do not mix. A file that was
moved away (log rotation) is noticed before the next line, and a new one is begun.

The same lines go to the logger `dicom_depot.audit`, where a handler can be attached that sends them elsewhere. They are
never mixed with the service's own log.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from dicom_depot.domain.errors import ConfigurationError
from dicom_depot.telemetry import REQUEST_ID

_log = logging.getLogger(__name__)
_lines = logging.getLogger("dicom_depot.audit")
_lines.addHandler(logging.NullHandler())
_lines.setLevel(logging.INFO)
_lines.propagate = False

_MODE = 0o600
_TEXT_LENGTH_MAX = 1024


class AuditFile:
    """`ports.AuditTrail` in one file. Safe for many threads and processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._file = -1
        self._is_torn = False
        try:
            self._open()
        except OSError as error:
            raise ConfigurationError(
                f"The audit trail {path} cannot be written: {error.strerror}. Set DICOM_DEPOT_AUDIT_LOG to a file "
                "that this user may append to."
            ) from None

    def record(self, event: str, **fields: object) -> None:
        line: dict[str, object] = {
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "event": event,
            "requestId": REQUEST_ID.get(),
        }
        line |= {_camel(name): _short(value) for name, value in fields.items()}
        content = {name: value for name, value in line.items() if value is not None}
        try:
            text = json.dumps(content, default=str)
            _lines.info("%s", text)
            self._append(text.encode() + b"\n")
        except Exception:
            _log.exception("an audit line could not be written: %s", event)

    def close(self) -> None:
        """Let go of the file; a later line opens it again."""
        with self._turn:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def _append(self, line: bytes) -> None:
        with self._turn:
            if self._file < 0 or self._was_moved():
                self._open()
            if self._is_torn:
                line = b"\n" + line
            written = os.write(self._file, line)
            self._is_torn = written < len(line)
            if self._is_torn:  # a full disk; the next line must not continue this one
                raise OSError(f"{written} of {len(line)} bytes")

    def _was_moved(self) -> bool:
        ours = os.fstat(self._file)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True
        return (there.st_ino, there.st_dev) != (ours.st_ino, ours.st_dev)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        opened = os.open(self._path, flags, _MODE)
        if self._file >= 0:
            os.close(self._file)
        self._file = opened


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _short(value: object) -> object:
    return value[:_TEXT_LENGTH_MAX] if isinstance(value, str) else value
