"""What a store request is answered with: status, and a data set of outcomes (PS3.18 section 10.5.3, table 10.5.3-1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dicom_depot.domain.identifiers import Uid
from dicom_depot.domain.operation import WireVersion
from dicom_depot.services.store import StoreOutcome

_SOP_CLASS, _SOP_INSTANCE, _RETRIEVE_URL = "00081150", "00081155", "00081190"
_WARNING, _FAILURE = "00081196", "00081197"
_FAILED, _REFERENCED = "00081198", "00081199"
_FAILED_ATTRIBUTES, _ERROR_COMMENT = "00741048", "00000902"


def status_of(outcomes: Sequence[StoreOutcome], version: WireVersion) -> int:
    """200 all stored; 202 some failed, or stored with warnings (version 2); 204 nothing was sent; 409 none stored."""
    if not outcomes:
        return 204
    failed = sum(outcome.failure is not None for outcome in outcomes)
    if failed == len(outcomes):
        return 409
    is_warned = version == 2 and any(outcome.warning is not None for outcome in outcomes)
    return 202 if failed or is_warned else 200


def answer_of(
    outcomes: Sequence[StoreOutcome], version: WireVersion, studies_url: str, study: Uid | None
) -> dict[str, Any]:
    """The data set, as DICOM JSON."""
    answer: dict[str, Any] = {}
    stored = [outcome for outcome in outcomes if outcome.failure is None]
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    if study is not None and stored:
        answer[_RETRIEVE_URL] = _value("UR", f"{studies_url}/{study}")
    if failed:
        answer[_FAILED] = _sequence([_failed_item(outcome) for outcome in failed])
    if stored:
        answer[_REFERENCED] = _sequence([_stored_item(outcome, version, studies_url) for outcome in stored])
    return answer


def _stored_item(outcome: StoreOutcome, version: WireVersion, studies_url: str) -> dict[str, Any]:
    ref = outcome.ref
    assert ref is not None
    url = f"{studies_url}/{ref.study_uid}/series/{ref.series_uid}/instances/{ref.sop_instance_uid}"
    item = _uids(outcome) | {_RETRIEVE_URL: _value("UR", url)}
    if outcome.warning is not None:
        item[_WARNING] = _value("US", int(outcome.warning))
    if version == 2:
        item[_FAILED_ATTRIBUTES] = _comments(outcome)
    return item


def _failed_item(outcome: StoreOutcome) -> dict[str, Any]:
    assert outcome.failure is not None
    item = _uids(outcome) | {_FAILURE: _value("US", int(outcome.failure))}
    if outcome.comments:
        item[_FAILED_ATTRIBUTES] = _comments(outcome)
    return item


def _uids(outcome: StoreOutcome) -> dict[str, Any]:
    uids = {_SOP_CLASS: outcome.sop_class_uid, _SOP_INSTANCE: outcome.sop_instance_uid}
    return {tag: _value("UI", uid) for tag, uid in uids.items() if uid is not None}


def _comments(outcome: StoreOutcome) -> dict[str, Any]:
    return _sequence([{_ERROR_COMMENT: _value("LO", f"DICOM100: {comment}")} for comment in outcome.comments])


def _value(vr: str, value: str | int) -> dict[str, Any]:
    return {"vr": vr, "Value": [value]}


def _sequence(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}
