"""Whether an export to a destination would work, tried step by step with an empty object that is then deleted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum

from dicom_depot.domain.errors import DestinationFault, IdentityDisabled, IdentityUnavailable, Obstacle
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.domain.operation import new_operation_id
from dicom_depot.ports import Destination, DestinationFactory, LogOutdated


class Step(StrEnum):
    """What is tried, in this order. All but the last are needed by an export."""

    REACH = "reach"
    SIGN_IN = "signIn"
    CONTAINER = "container"
    CREATE = "create"
    OVERWRITE = "overwrite"
    DELETE = "delete"


class StepOutcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_TRIED = "notTried"


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step and what came of it. `message` is a sentence without secrets."""

    step: Step
    outcome: StepOutcome
    message: str


@dataclass(frozen=True, slots=True)
class DestinationCheck:
    """`is_ok`: an export can write there. `remedy`: what to do where it cannot, if that is known."""

    is_ok: bool
    steps: tuple[StepResult, ...]
    remedy: str | None


_PASSED = {
    Step.REACH: "The destination answers.",
    Step.SIGN_IN: "The sign-in is accepted.",
    Step.CONTAINER: "The container or folder is there.",
    Step.CREATE: "An object can be created.",
    Step.OVERWRITE: "An object can be overwritten.",
    Step.DELETE: "Objects can be deleted, which an export does not need. Nothing is left of this check.",
}
_FAILED_STEPS = {
    Obstacle.REACH: Step.REACH,
    Obstacle.SIGN_IN: Step.SIGN_IN,
    Obstacle.CONTAINER: Step.CONTAINER,
}
_NO_TOKEN_CODES = frozenset({IdentityUnavailable.code, IdentityDisabled.code})


def check_destination(destinations: DestinationFactory, spec: DestinationSpec) -> DestinationCheck:
    """Try what an export needs. Leaves nothing behind where deleting is allowed, and says so where it is not.

    Raises DestinationRefused, before anything is reached.
    """
    key = f"{new_operation_id()}/permission-check"
    with closing(destinations.open(spec)) as destination:
        try:
            etag = destination.create_log(key)
        except DestinationFault as fault:
            # A request that failed without an answer may have been carried out.
            is_unsure = fault.obstacle is Obstacle.REACH and not destination.remove_log(key)
            return _failed(fault, _FAILED_STEPS.get(fault.obstacle, Step.CREATE), _left(key) if is_unsure else None)
        return _overwritten(destination, key, etag)


def _overwritten(destination: Destination, key: str, etag: str | None) -> DestinationCheck:
    try:
        destination.write_log(key, (), if_match=etag)
    except DestinationFault as fault:
        return _failed(fault, Step.OVERWRITE, _deleted(destination, key))
    except LogOutdated:
        message = "The destination changed the object by itself right after it was created."
        overwrite = StepResult(Step.OVERWRITE, StepOutcome.FAILED, message)
        return DestinationCheck(
            is_ok=False, steps=(*_passed_before(Step.OVERWRITE), overwrite, _deleted(destination, key)), remedy=None
        )
    steps = (*_passed_before(Step.DELETE), _deleted(destination, key))
    return DestinationCheck(is_ok=True, steps=steps, remedy=None)


def _deleted(destination: Destination, key: str) -> StepResult:
    if destination.remove_log(key):
        return StepResult(Step.DELETE, StepOutcome.PASSED, _PASSED[Step.DELETE])
    message = f"Objects cannot be deleted, which an export does not need. {key} was left behind, empty."
    return StepResult(Step.DELETE, StepOutcome.FAILED, message)


def _left(key: str) -> StepResult:
    return StepResult(Step.DELETE, StepOutcome.NOT_TRIED, f"If the request arrived, {key} was left behind, empty.")


def _failed(fault: DestinationFault, step: Step, delete: StepResult | None) -> DestinationCheck:
    """The steps before the failed one passed; those that its answer says nothing of were not tried."""
    steps = [*_passed_before(step), StepResult(step, StepOutcome.FAILED, fault.message)]
    if step is Step.SIGN_IN and fault.code in _NO_TOKEN_CODES:
        steps[0] = _not_tried(Step.REACH)
    if step is Step.CREATE:
        steps[2] = StepResult(Step.CONTAINER, StepOutcome.NOT_TRIED, "The answer does not tell whether it is there.")
    steps += [_not_tried(later) for later in tuple(Step)[len(steps) :]]
    if delete is not None:
        steps[-1] = delete
    return DestinationCheck(is_ok=False, steps=tuple(steps), remedy=fault.remedy)


def _passed_before(step: Step) -> Sequence[StepResult]:
    earlier = tuple(Step)[: tuple(Step).index(step)]
    return [StepResult(each, StepOutcome.PASSED, _PASSED[each]) for each in earlier]


def _not_tried(step: Step) -> StepResult:
    return StepResult(step, StepOutcome.NOT_TRIED, "Not tried.")
