"""Whether the service can do its work. Open to everybody, and silent about the data."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from dicom_depot.web.context import context
from dicom_depot.web.models import Health, HealthDetail

router = APIRouter(tags=["health"])

_log = logging.getLogger(__name__)


@router.get("/health/check", response_model=Health, responses={503: {"model": Health}})
def check_health(request: Request) -> JSONResponse:
    """200 when index and store answer, 503 when one does not."""
    opened = context(request)
    details = [
        _detail("Index", opened.index.sequence),
        _detail("Store", opened.store.free_bytes),
    ]
    is_healthy = all(detail.status == "Healthy" for detail in details)
    health = Health(overall_status="Healthy" if is_healthy else "Unhealthy", details=details)
    return JSONResponse(health.to_json(), 200 if is_healthy else 503)


def _detail(name: str, check: Callable[[], object]) -> HealthDetail:
    try:
        check()
    except Exception:
        _log.exception("health check of the %s failed", name.lower())
        return HealthDetail(name=name, status="Unhealthy", description=f"The {name.lower()} does not answer.")
    return HealthDetail(name=name, status="Healthy", description=f"The {name.lower()} answers.")
