"""How the service logs. Lines go to stderr; they never hold header values, secrets or tokens."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that the present work belongs to; it stands in log lines and in the audit trail."""


def set_up_logging(level: str) -> None:
    """Send log lines of this process to stderr. Called by entry points only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s"))
    handler.addFilter(_add_request)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("azure", "msal", "urllib3", "httpx", "httpcore", "alembic", "pydicom", "openjpeg"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _add_request(record: logging.LogRecord) -> bool:
    request_id = REQUEST_ID.get()
    record.request = "" if request_id is None else f"[{request_id}] "
    return True
