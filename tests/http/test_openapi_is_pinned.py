"""What others build on is pinned: the OpenAPI document, and which error has which status. `UPDATE_SNAPSHOTS=1` renews
the document; a difference is then reviewed like any other change of the API.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dicom_depot.domain import errors
from dicom_depot.domain.errors import DepotError
from dicom_depot.web.app import create_app
from dicom_depot.web.context import WebContext
from dicom_depot.web.errors import status_of
from tests.support.depot import Depot

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "openapi.json"

ERRORS = {
    "InvalidRequest": ("InvalidRequest", 400),
    "InvalidIdentifier": ("InvalidIdentifier", 400),
    "DestinationRefused": ("DestinationRefused", 400),
    "IdentityUnavailable": ("IdentityUnavailable", 400),
    "IdentityDisabled": ("ManagedIdentityDisabled", 400),
    "Unauthenticated": ("Unauthenticated", 401),
    "Forbidden": ("Forbidden", 403),
    "NotFound": ("NotFound", 404),
    "NotAcceptable": ("NotAcceptable", 406),
    "NotTranscodable": ("NotTranscodable", 406),
    "RequestTimeout": ("RequestTimeout", 408),
    "Conflict": ("Conflict", 409),
    "DestinationDiffers": ("DestinationDiffers", 409),
    "SecretErased": ("SecretErased", 409),
    "InstancesSwept": ("InstancesSwept", 409),
    "QueryTagGone": ("QueryTagGone", 409),
    "TagExists": ("TagExists", 409),
    "ReindexRunning": ("ReindexRunning", 409),
    "TagBusy": ("TagBusy", 400),
    "PayloadTooLarge": ("PayloadTooLarge", 413),
    "UnsupportedMediaType": ("UnsupportedMediaType", 415),
    "IdempotencyKeyReused": ("IdempotencyKeyReused", 422),
    "TooManyOperations": ("TooManyOperations", 429),
    "StorageFull": ("StorageFull", 503),
    "ServiceUnavailable": ("ServiceUnavailable", 503),
    # Errors of ours if they reach a caller, who then sees InternalError.
    "NotDicom": ("NotDicom", 500),
    "BrokenInstance": ("BrokenInstance", 500),
    "ConfigurationError": ("ConfigurationError", 500),
    "Fault": ("Code", 500),
    "SourceFault": ("Code", 503),
    "DestinationFault": ("Code", 500),
}


def document() -> dict[str, Any]:
    @asynccontextmanager
    async def never_opened() -> AsyncIterator[WebContext]:
        raise AssertionError("the document needs no open service")
        yield  # what makes it a generator

    return create_app(never_opened).openapi()


def test_the_openapi_document_is_the_pinned_one() -> None:
    text = json.dumps(document(), indent=2, ensure_ascii=False) + "\n"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
        DOCUMENT.write_text(text, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == text, "run with UPDATE_SNAPSHOTS=1 and look at the difference"


def test_the_service_serves_that_document(depot: Depot) -> None:
    for path in ("/v1/api.json", "/v2/api.json"):
        assert depot.client.get(path).json() == document()


def test_each_error_has_its_code_and_status() -> None:
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, DepotError) and kind is not DepotError
    }
    made = {
        name: kind("Code", "message", errors.FaultKind.TRANSIENT) if issubclass(kind, errors.Fault) else kind("message")
        for name, kind in kinds.items()
    }
    assert {name: (error.code, status_of(error)) for name, error in made.items()} == ERRORS


def test_the_document_promises_no_other_body_of_an_error() -> None:
    schemas = set()
    for operations in document()["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if status == "409" and operation["tags"] == ["store"]:
                    assert list(answer["content"]) == ["application/dicom+json"]  # why each instance was not stored
                elif status == "default" or (int(status) >= 400 and status != "503"):
                    schemas.add(answer["content"]["application/json"]["schema"]["$ref"])
    assert schemas == {"#/components/schemas/ErrorBody"}
