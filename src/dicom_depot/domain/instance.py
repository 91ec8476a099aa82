"""What the service knows of one stored instance. No bytes, no storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dicom_depot.domain.identifiers import InstanceRef

AttributeValues = dict[str, str | int | None]
"""Column name (`domain.search.ATTRIBUTES`) to value; an absent or unreadable attribute is None."""


@dataclass(frozen=True, slots=True)
class InstanceHeader:
    """What the codec reads from one instance's header."""

    ref: InstanceRef
    sop_class_uid: str
    transfer_syntax_uid: str
    attributes: AttributeValues


@dataclass(frozen=True, slots=True)
class Metadata:
    """What answers for an instance without opening its file, packed as the index holds it.

    `dicom_json` is the DICOM JSON of its data set (PS3.18 annex F), bulk data left out; `layout` says where in the file
    the bulk data lies. `codec.dicom_json` and `codec.layout` pack and unpack them.
    """

    dicom_json: bytes
    layout: bytes


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One instance as the index holds it.

    `store_key` is random and never reused; `size` is in bytes; `sha256` is 32 bytes; `xxh3` is the unsigned 64-bit
    XXH3 of the same bytes, cheap enough to be checked on every read. `may_replace`: a live instance with the same
    identifiers gives way.
    """

    header: InstanceHeader
    store_key: str
    size: int
    sha256: bytes
    xxh3: int
    metadata: Metadata | None = None
    may_replace: bool = False

    @property
    def ref(self) -> InstanceRef:
        return self.header.ref


class StoredObject(NamedTuple):
    """The little that copying needs of one instance; a tuple, because an export makes millions of them."""

    instance_id: int
    study_uid: str
    series_uid: str
    sop_instance_uid: str
    store_key: str
    size: int
    xxh3: int

    @property
    def identifier(self) -> str:
        return f"{self.study_uid}/{self.series_uid}/{self.sop_instance_uid}"
