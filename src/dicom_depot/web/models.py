"""The JSON that the API answers with, in the wire's spelling. Also the source of the OpenAPI document's schemas."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from dicom_depot.domain.identity import IdentityDescription
from dicom_depot.domain.operation import (
    Operation,
    OperationId,
    OperationStatus,
    OperationType,
    WireVersion,
    wire_status,
)
from dicom_depot.domain.query_tags import QueryTag, TagStatus
from dicom_depot.export.destination_check import DestinationCheck, Step, StepOutcome
from dicom_depot.export.planner import DryRun
from dicom_depot.ports import ChangeAction, ChangeState, TagError


class _Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """As sent: camelCase, absent members left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class ErrorBody(_Wire):
    """What every error answers with."""

    code: str = Field(description="Stable name of what is wrong.")
    message: str = Field(description="What is wrong and what to do about it.")
    target: str | None = Field(description="The place in the request, e.g. `source.settings.values[3]`.")


class OperationReference(_Wire):
    """A reference to a long-running operation."""

    id: str
    href: str


class ExportResults(_Wire):
    """What an export has done so far."""

    error_href: str = Field(description="Where the error log lies; relative to the root for folder destinations.")
    exported: int = Field(description="Instances copied.")
    skipped: int = Field(description="Instances that could not be copied, and identifiers that matched nothing.")
    total: int = Field(description="Instances and unmatched identifiers planned; final once planning is complete.")
    bytes: int = Field(description="Bytes copied.")


class OperationErrorBody(_Wire):
    """Why an operation failed."""

    code: str
    message: str


class OperationState(_Wire):
    """The state of an operation."""

    operation_id: str
    type: str
    created_time: str
    last_updated_time: str
    status: str
    percent_complete: int
    resources: list[str] | None = Field(default=None, description="The extended query tags that a `reindex` adds.")
    results: ExportResults | None = Field(default=None, description="Of an `export`.")
    error: OperationErrorBody | None = None


class OperationPage(_Wire):
    """Operations, newest first."""

    operations: list[OperationState]
    continuation_token: str | None = Field(
        default=None, description="Pass it on for the next page; absent on the last."
    )


class DryRunResult(_Wire):
    """What an export would copy now."""

    count: int = Field(description="Instances.")
    bytes: int = Field(description="Bytes of these instances.")
    unmatched: list[str] = Field(description="Identifiers that match nothing.")


class HealthDetail(_Wire):
    name: str
    status: str
    description: str


class Health(_Wire):
    """Whether the service can do its work."""

    overall_status: str
    details: list[HealthDetail]


class ChangeEntry(_Wire):
    """One entry of the change feed."""

    sequence: int
    partition_name: str
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    action: ChangeAction
    timestamp: str
    state: ChangeState = Field(description="What has become of this version of the instance since.")
    metadata: dict[str, Any] | None = Field(default=None, description="DICOM JSON of a current instance.")


class TagErrors(_Wire):
    """How many instances could not be indexed, and where they are listed."""

    count: int
    href: str


class QueryTagEntry(_Wire):
    """An extended query tag."""

    path: str = Field(description="The tag as eight hexadecimal digits.")
    vr: str
    private_creator: str | None = None
    level: Literal["study", "series", "instance"]
    status: Literal["adding", "ready"]
    query_status: Literal["enabled", "disabled"]
    errors: TagErrors | None = None
    operation: OperationReference | None = Field(default=None, description="Present while the tag is being added.")


class QueryTagErrorEntry(_Wire):
    """An instance whose value of an extended query tag could not be indexed."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    created_time: str
    error_message: str


class IdentityState(_Wire):
    """The service's managed identity. All but `status` is absent while it is off."""

    status: Literal["On", "Off"]
    principal_id: str | None = Field(default=None, description="The object id that roles are granted to.")
    tenant_id: str | None = None
    client_id: str | None = None
    host: str | None = Field(default=None, description="What gives the service its identity.")
    token_expires_on: str | None = None
    error: ErrorBody | None = Field(default=None, description="Why no token can be had at present.")


class DestinationCheckStep(_Wire):
    """One step of a check."""

    step: Step
    outcome: StepOutcome
    message: str


class DestinationCheckResult(_Wire):
    """Whether an export to a destination would work."""

    ok: bool
    steps: list[DestinationCheckStep] = Field(description="`delete` is reported and never required.")
    remedy: str | None = Field(description="What to do where it would not work; null where nothing is to be said.")


def identity_state(identity: IdentityDescription) -> IdentityState:
    return IdentityState(
        status="On",
        principal_id=identity.principal_id or None,
        tenant_id=identity.tenant_id or None,
        client_id=identity.client_id or None,
        host=identity.host,
        token_expires_on=identity.expires_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def destination_check_result(check: DestinationCheck) -> DestinationCheckResult:
    steps = [DestinationCheckStep(step=each.step, outcome=each.outcome, message=each.message) for each in check.steps]
    return DestinationCheckResult(ok=check.is_ok, steps=steps, remedy=check.remedy)


def operation_state(operation: Operation, version: WireVersion, root_url: str) -> OperationState:
    """root_url: the address of the API in that version, without a slash at its end."""
    is_failed = operation.status is OperationStatus.FAILED
    is_export = operation.type is OperationType.EXPORT
    return OperationState(
        operation_id=operation.id,
        type=operation.type,
        created_time=_time(operation.created_at),
        last_updated_time=_time(operation.updated_at),
        status=wire_status(operation.status, version),
        percent_complete=operation.percent_complete,
        resources=None if is_export else [f"{root_url}/extendedquerytags/{path}" for path in operation.tag_paths],
        results=ExportResults(
            error_href=operation.log_href,
            exported=operation.exported,
            skipped=operation.skipped,
            total=operation.total,
            bytes=operation.bytes_exported,
        )
        if is_export
        else None,
        error=OperationErrorBody(code=operation.error.code, message=operation.error.message)
        if operation.error is not None and is_failed
        else None,
    )


def query_tag_entry(tag: QueryTag, root_url: str) -> QueryTagEntry:
    """root_url: the address of the API, without a slash at its end."""
    is_adding = tag.status is TagStatus.ADDING and tag.operation_id is not None
    return QueryTagEntry(
        path=tag.path,
        vr=tag.vr,
        private_creator=tag.private_creator,
        level=tag.level.value,
        status=tag.status.value,
        query_status="enabled" if tag.is_enabled else "disabled",
        errors=TagErrors(count=tag.error_count, href=f"{root_url}/extendedquerytags/{tag.path}/errors")
        if tag.error_count
        else None,
        operation=OperationReference(id=str(tag.operation_id), href=f"{root_url}/operations/{tag.operation_id}")
        if is_adding
        else None,
    )


def query_tag_error(error: TagError) -> QueryTagErrorEntry:
    return QueryTagErrorEntry(
        study_instance_uid=error.ref.study_uid,
        series_instance_uid=error.ref.series_uid,
        sop_instance_uid=error.ref.sop_instance_uid,
        created_time=_time(error.occurred_at),
        error_message=error.message,
    )


def dry_run_result(dry_run: DryRun) -> DryRunResult:
    return DryRunResult(
        count=dry_run.count, bytes=dry_run.bytes_total, unmatched=[str(ref) for ref in dry_run.unmatched]
    )


def operation_reference(operation_id: OperationId, href: str) -> OperationReference:
    return OperationReference(id=operation_id, href=href)


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


_IDENTIFIERS_EXAMPLE = ["1.2.3", "12.3/4.5.678", "123.456/7.8/9.1011.12"]

_DESTINATION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["type", "settings"],
    "properties": {
        "type": {"type": "string", "enum": ["azureBlob", "file"]},
        "settings": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "blobContainerUri": {"type": "string", "format": "uri"},
                "connectionString": {"type": "string"},
                "blobContainerName": {"type": "string"},
                "useManagedIdentity": {"type": "boolean"},
                "folder": {"type": "string", "description": "For type `file`: relative to the root."},
            },
        },
    },
}

CHECK_REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["destination"],
    "properties": {"destination": _DESTINATION_SCHEMA},
}

IDENTITY_REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["status"],
    "properties": {"status": {"type": "string", "enum": ["On", "Off"]}},
}

QUERY_TAGS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": 128,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["path", "level"],
        "properties": {
            "path": {"type": "string", "description": "A keyword, or a tag as eight hexadecimal digits."},
            "vr": {"type": "string", "description": "Needed for private attributes."},
            "privateCreator": {"type": "string"},
            "level": {"type": "string", "enum": ["Study", "Series", "Instance"]},
        },
    },
    "example": [{"path": "ManufacturerModelName", "level": "Series"}, {"path": "00101020", "level": "Study"}],
}

QUERY_STATUS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["queryStatus"],
    "properties": {"queryStatus": {"type": "string", "enum": ["enabled", "disabled"]}},
}

RESUME_REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "description": "The operation's own destination with a fresh secret. Not needed where no secret was erased.",
    "properties": {"destination": _DESTINATION_SCHEMA},
}

_LISTED_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["type", "settings"],
    "properties": {
        "type": {"type": "string", "enum": ["identifiers"]},
        "settings": {
            "type": "object",
            "additionalProperties": False,
            "required": ["values"],
            "properties": {
                "values": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "string"},
                    "description": "<study>[/<series>[/<instance>]]",
                }
            },
        },
    },
}

_QUERY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["type", "settings"],
    "description": "What a search finds when the export is started.",
    "properties": {
        "type": {"type": "string", "enum": ["query"]},
        "settings": {
            "type": "object",
            "additionalProperties": False,
            "required": ["level", "filters"],
            "properties": {
                "level": {
                    "type": "string",
                    "enum": ["study", "series", "instance"],
                    "description": "What must match, and is exported whole. `filters` name attributes of studies and, "
                    "below them, down to this level.",
                },
                "filters": {
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {"type": "string"},
                    "description": "Attribute, by keyword or tag, to what it must match, as in a search.",
                    "example": {"Modality": "CT", "StudyDate": "20240101-20241231"},
                },
                "fuzzymatching": {
                    "type": "boolean",
                    "default": False,
                    "description": "Match the words of names by their beginnings.",
                },
            },
        },
    },
}

EXPORT_REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["destination"],
    "description": "Member names in any letter case. Without `source`, everything is exported.",
    "properties": {
        "source": {"oneOf": [_LISTED_SCHEMA, _QUERY_SCHEMA]},
        "destination": _DESTINATION_SCHEMA,
    },
    "example": {
        "source": {"type": "identifiers", "settings": {"values": _IDENTIFIERS_EXAMPLE}},
        "destination": {
            "type": "azureBlob",
            "settings": {"blobContainerUri": "https://dicomexport.blob.core.windows.net/export?sv=...&sig=..."},
        },
    },
}
