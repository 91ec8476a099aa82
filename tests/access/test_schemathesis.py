"""schemathesis reads the OpenAPI document and asks what it says, and much that it does not, as an administrator.

No answer may be a 500, and what is answered must be what the document says.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dicom_depot.config import Settings
from dicom_depot.web.app import create_app
from tests.support.secured import Secured

SECONDS = 60.0
"""For all operations together; the first of each is asked in any case."""
EXAMPLES = 50
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schemathesis.serializer("application/dicom", "multipart/related")
def instances(context: Any, value: Any) -> bytes:
    """Whatever was made up for the body of a store request, as bytes."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def deadline() -> float:
    return time.monotonic() + SECONDS


document = schemathesis.openapi.from_dict(create_app(None, Settings()).openapi())  # type: ignore[arg-type]  # not opened
OPERATIONS = {found.ok().label: found.ok() for found in document.get_all_operations() if isinstance(found, Ok)}
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_document_says_is_answered_and_nothing_is_a_500(
    label: str, mode: schemathesis.GenerationMode, secured: Secured, deadline: float
) -> None:
    token = secured.issuer.token("administrator", sub="schemathesis")
    strategy = OPERATIONS[label].as_strategy(generation_mode=mode)
    asked = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def ask(case: Any) -> None:
        nonlocal asked
        if asked == 0 or time.monotonic() < deadline:  # a slow machine asks fewer of them
            asked += 1
            case.call_and_validate(
                base_url=secured.service.url, headers={"Authorization": f"Bearer {token}"}, checks=CHECKS, timeout=10
            )

    try:
        ask()
        assert asked > 0
    except Unsatisfiable:  # nothing can be wrong with a request that takes nothing
        assert mode is schemathesis.GenerationMode.NEGATIVE
