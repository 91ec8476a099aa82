"""Who may do what: data actions, roles that grant them, and the caller of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from dicom_depot.domain.errors import Forbidden


class Action(StrEnum):
    """A data action. Stored spellings are configuration and API: only ever added to."""

    READ = "read"
    WRITE = "write"
    DELETE = "delete"
    EXPORT = "export"
    MANAGE = "manage"


Roles = Mapping[str, frozenset[Action]]
"""Role name, in lower case, to the actions that it grants."""

BUILT_IN_ROLES: Roles = {
    "reader": frozenset({Action.READ}),
    "writer": frozenset({Action.READ, Action.WRITE}),
    "exporter": frozenset({Action.READ, Action.EXPORT}),
    "administrator": frozenset(Action),
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `key` tells callers apart: issuer and subject; empty where there is no sign-in."""

    key: str
    actions: frozenset[Action]

    def require(self, action: Action) -> None:
        """Raises Forbidden that names the missing action."""
        if action not in self.actions:
            raise Forbidden(f"This needs the action '{action}', which none of the caller's roles grants.")

    def may_see(self, created_by: str) -> bool:
        """Operations are visible to their creator and to those who manage."""
        return created_by == self.key or Action.MANAGE in self.actions


ANONYMOUS = Caller("", frozenset(Action))
"""The caller where no sign-in is configured: may do everything."""


def granted(roles: Roles, names: Iterable[str]) -> frozenset[Action]:
    """The union of what these roles grant; role names in any letter case, unknown ones grant nothing."""
    return frozenset(action for name in names for action in roles.get(name.lower(), ()))
