"""Reads the file that says which role may do what.

[roles]
radiologist = ["read"]
research-desk = ["read", "export"]
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from dicom_depot.domain.access import BUILT_IN_ROLES, Action, Roles
from dicom_depot.domain.errors import ConfigurationError

_ACTIONS = tuple(action.value for action in Action)


def read_roles(path: Path | None) -> Roles:
    """The roles of the file, which replace the built-in ones; those where there is no file.

    Raises ConfigurationError that names the place and what to write instead.
    """
    if path is None:
        return BUILT_IN_ROLES
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The roles file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The roles file {path} is not valid TOML: {error}") from None
    unknown = sorted(set(content) - {"roles"})
    table = content.get("roles")
    if unknown or not isinstance(table, dict) or not table:
        raise ConfigurationError(
            f"The roles file {path} must hold one table, [roles], with at least one line such as "
            'exporter = ["read", "export"]' + (f"; it also has: {', '.join(unknown)}." if unknown else ".")
        )
    roles: dict[str, frozenset[Action]] = {}
    for name, actions in table.items():
        if name.lower() in roles:
            raise ConfigurationError(
                f"The roles file {path} has the role '{name}' twice: letter case makes no difference."
            )
        roles[name.lower()] = _actions(path, name, actions)
    return roles


def _actions(path: Path, name: str, actions: Any) -> frozenset[Action]:
    if not isinstance(actions, list) or not actions or not all(isinstance(action, str) for action in actions):
        raise ConfigurationError(
            f"The roles file {path}: '{name}' must be a list of one or more of {', '.join(_ACTIONS)}."
        )
    for action in actions:
        if action not in _ACTIONS:
            near = difflib.get_close_matches(action.lower(), _ACTIONS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigurationError(
                f"The roles file {path}: '{name}' names the action '{action}', which does not exist. "
                f"Actions: {', '.join(_ACTIONS)}.{hint}"
            )
    return frozenset(Action(action) for action in actions)
