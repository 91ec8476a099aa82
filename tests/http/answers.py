"""What an answer must be, whatever was asked; shared by the HTTP tests."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.depot import Depot
from tests.support.fault_endpoint import Delay, Rule

COMMON_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "content-security-policy": "frame-src 'self';",
    "cache-control": "no-store",
    "api-supported-versions": "1, 2",
}


def assert_error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """One JSON body `{"code", "message", "target"}`, and the headers that every answer carries."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()
    error = answer.json()
    assert list(error) == ["code", "message", "target"]
    assert error["code"] == code, error
    assert error["message"]
    return dict(error)


def slow_export(depot: Depot, name: str) -> str:
    """An export of three instances whose copies take so long that somebody can cancel it meanwhile."""
    destination = depot.faulty(name, Rule(Delay(12), "PUT", "*.dcm"))
    operation_id = depot.start(destination, "1.2.3")
    while depot.service.operation(operation_id)["results"]["total"] == 0:
        pass
    return operation_id
