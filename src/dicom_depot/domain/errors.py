"""The one error tree. Each class is a stable code plus a message written for the person who must act.

    DepotError
    ├── InvalidRequest            the caller's input is wrong; `target` names the place
    │   ├── InvalidIdentifier     not <study>[/<series>[/<instance>]]
    │   ├── DestinationRefused    the destination is not allowed, unreachable or not writable
    │   ├── PayloadTooLarge       a body over its limit
    │   ├── UnsupportedMediaType  a body of the wrong content type
    │   └── TagBusy               an extended query tag is being added
    ├── Unauthenticated           no bearer token, or one that is not accepted
    ├── Forbidden                 the caller's roles do not allow the action
    ├── TooManyOperations         a limit of operations at the same time
    ├── RequestTimeout            a body that stopped arriving
    ├── IdentityUnavailable       the host gives no managed identity, or no token for it
    │   └── IdentityDisabled      the managed identity is switched off
    ├── NotFound                  unknown operation, study, series, instance or frame
    ├── NotAcceptable             nothing that the resource can be sent as is accepted
    │   └── NotTranscodable       an instance cannot be brought into a transfer syntax without loss
    ├── Conflict                  the resource is not in a state that allows the request
    │   ├── DestinationDiffers    a resumed operation goes on where it began
    │   ├── SecretErased          what signed the operation in is gone; the caller must give it again
    │   ├── InstancesSwept        instances that an operation still needs are gone for good
    │   ├── QueryTagGone          an extended query tag that an export's query names was removed
    │   ├── TagExists             an extended query tag is there already
    │   └── ReindexRunning        another operation adds extended query tags
    ├── IdempotencyKeyReused      same Idempotency-Key, another specification
    ├── NotDicom / BrokenInstance a file that cannot be stored, and why
    ├── StorageFull               no space left where the service keeps its data
    ├── ServiceUnavailable        a resource of ours is busy or away; trying later may help
    ├── ConfigurationError        a setting or the data folder prevents the start
    └── Fault                     an object could not be moved; a value that the copier sorts, see below
        ├── SourceFault           our own store's side
        └── DestinationFault      the destination's side

HTTP statuses are not decided here: `web.errors` maps codes to statuses in one table.
"""

from __future__ import annotations

from enum import StrEnum


class DepotError(Exception):
    """An error with a stable code. `str(error)` is safe to show: no header values, no secrets."""

    code = "InternalError"

    def __init__(self, message: str, *, target: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.target = target


class InvalidRequest(DepotError):
    """What was asked for is malformed. `target` is the place, e.g. `source.settings.values[3]`."""

    code = "InvalidRequest"


class InvalidIdentifier(InvalidRequest):
    """Not a study, series or instance identifier."""

    code = "InvalidIdentifier"


class DestinationRefused(InvalidRequest):
    """The destination cannot be used as given. The message says what to do."""

    def __init__(self, message: str, *, code: str = "DestinationRefused", target: str | None = None) -> None:
        super().__init__(message, target=target)
        self.code = code


class PayloadTooLarge(DepotError):
    """A body is over its limit."""

    code = "PayloadTooLarge"


class UnsupportedMediaType(DepotError):
    """The body's content type is not one that the route reads."""

    code = "UnsupportedMediaType"


class Unauthenticated(DepotError):
    """The request has no bearer token, or one that is not accepted. The message never repeats the token."""

    code = "Unauthenticated"


class Forbidden(DepotError):
    """The caller is known, and its roles do not allow the action. The message names the action."""

    code = "Forbidden"


class TooManyOperations(DepotError):
    """A limit of operations at the same time is reached."""

    code = "TooManyOperations"


class RequestTimeout(DepotError):
    """The body stopped arriving."""

    code = "RequestTimeout"


class IdentityUnavailable(DepotError):
    """The host gives the service no identity, or no token for it."""

    code = "IdentityUnavailable"


class IdentityDisabled(IdentityUnavailable):
    """An operator has not switched the managed identity on."""

    code = "ManagedIdentityDisabled"


class NotFound(DepotError):
    """What the request names does not exist."""

    code = "NotFound"


class NotAcceptable(DepotError):
    """Nothing that the resource can be sent as is in the request's Accept header. The message lists what is offered."""

    code = "NotAcceptable"


class NotTranscodable(NotAcceptable):
    """An instance cannot be given in a transfer syntax without loss. The message says why, and holds no values."""

    code = "NotTranscodable"


class Conflict(DepotError):
    """The resource is not in a state that allows the request."""

    code = "Conflict"


class DestinationDiffers(Conflict):
    """The destination given for a resume is not the operation's."""

    code = "DestinationDiffers"


class SecretErased(Conflict):
    """The operation signed in with a secret that was erased when it ended."""

    code = "SecretErased"


class InstancesSwept(Conflict):
    """Instances that the operation planned were deleted and swept after it ended."""

    code = "InstancesSwept"


class QueryTagGone(Conflict):
    """The query of an export names an extended query tag that was removed: what it matches can no longer be told."""

    code = "QueryTagGone"


class TagExists(Conflict):
    """An extended query tag is there already."""

    code = "TagExists"


class ReindexRunning(Conflict):
    """Another operation indexes at present: `operation_id`."""

    code = "ReindexRunning"

    def __init__(self, message: str, *, target: str | None = None, operation_id: str = "") -> None:
        super().__init__(message, target=target)
        self.operation_id = operation_id


class TagBusy(InvalidRequest):
    """An extended query tag is being added."""

    code = "TagBusy"


class IdempotencyKeyReused(DepotError):
    """The key was used before for another specification."""

    code = "IdempotencyKeyReused"


class NotDicom(DepotError):
    """The bytes are not a DICOM instance."""

    code = "NotDicom"


class BrokenInstance(DepotError):
    """DICOM, but without what storing it needs (its four identifying attributes, valid UIDs).

    `sop_class_uid` and `sop_instance_uid` where they could be read.
    """

    code = "BrokenInstance"

    def __init__(self, message: str, sop_class_uid: str | None = None, sop_instance_uid: str | None = None) -> None:
        super().__init__(message)
        self.sop_class_uid = sop_class_uid
        self.sop_instance_uid = sop_instance_uid


class StorageFull(DepotError):
    """No space left in the data folder, the store or the database."""

    code = "StorageFull"


class ServiceUnavailable(DepotError):
    """A resource of ours is busy or away."""

    code = "ServiceUnavailable"


class ConfigurationError(DepotError):
    """The process must not start like this."""

    code = "ConfigurationError"


class FaultKind(StrEnum):
    """What a fault means for the export (the rules of docs/explanation/exactness.md)."""

    INSTANCE = "instance"
    """Only this instance cannot be copied: it is skipped, with the fault's code."""
    TRANSIENT = "transient"
    """May pass: retried with back-off, never a skip."""
    PERMANENT = "permanent"
    """Nothing more can be copied: the operation fails with the fault's message."""


class Fault(DepotError):
    """An object could not be read or written. Transient or permanent is decided in the adapter, once."""

    side = "unknown"

    def __init__(self, code: str, message: str, kind: FaultKind, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[type[Fault], tuple[str, str, FaultKind]]:
        return type(self), (self.code, self.message, self.kind)


class SourceFault(Fault):
    """Our own store could not give the bytes that the index promises."""

    side = "source"


class Obstacle(StrEnum):
    """What stood in the way of a write, as far as the destination's answer tells."""

    REACH = "reach"
    SIGN_IN = "signIn"
    CONTAINER = "container"
    WRITE = "write"


class DestinationFault(Fault):
    """The destination did not take an object. `remedy`, where there is one, is also part of the message."""

    side = "destination"

    def __init__(
        self,
        code: str,
        message: str,
        kind: FaultKind,
        *,
        retry_after_seconds: float | None = None,
        obstacle: Obstacle = Obstacle.WRITE,
        remedy: str | None = None,
    ) -> None:
        super().__init__(code, message, kind, retry_after_seconds=retry_after_seconds)
        self.obstacle = obstacle
        self.remedy = remedy
