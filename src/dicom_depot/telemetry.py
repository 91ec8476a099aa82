"""How the service logs. Lines go to stderr; they never hold header values, secrets or tokens."""

from __future__ import annotations

import logging
import sys


def set_up_logging(level: str) -> None:
    """Send log lines of this process to stderr. Called by entry points only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("azure", "urllib3", "httpx", "httpcore", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
