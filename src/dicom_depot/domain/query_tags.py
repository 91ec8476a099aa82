"""Extended query tags: attributes that an operator makes searchable beyond the table in `domain.search`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dicom_depot.domain.search import Attribute, Held, Level

TAGS_MAX = 128
"""How many there may be at a time."""

QUERY_TAG_VRS = frozenset(
    ["AE", "AS", "CS", "DA", "DT", "FD", "FL", "IS", "LO", "PN", "SH", "SL", "SS", "TM", "UI", "UL", "US"]
)
"""The VRs that an extended query tag may have."""


class TagStatus(StrEnum):
    """Stored spellings: only ever added to."""

    ADDING = "adding"
    """Instances that were stored before it are being indexed."""
    READY = "ready"


@dataclass(frozen=True, slots=True)
class NewQueryTag:
    """An extended query tag that is wanted."""

    tag: int
    vr: str
    level: Level
    private_creator: str | None = None

    @property
    def path(self) -> str:
        """Eight hexadecimal digits."""
        return f"{self.tag:08X}"


@dataclass(frozen=True, slots=True)
class QueryTag(NewQueryTag):
    """An extended query tag. `error_count`: instances whose value could not be indexed. `operation_id`: of the
    operation that indexes, or indexed, the instances that were there before it.
    """

    id: int = 0
    status: TagStatus = TagStatus.ADDING
    is_enabled: bool = True
    error_count: int = 0
    operation_id: str | None = None

    @property
    def attribute(self) -> Attribute:
        """What queries name."""
        return Attribute(self.path, self.tag, self.vr, self.level, f"tag:{self.id}", held=Held.VALUES)
