"""What may become an extended query tag."""

from __future__ import annotations

import re

from pydicom.datadict import dictionary_VR

from dicom_depot.codec.qido import tag_path
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.query_tags import QUERY_TAG_VRS, NewQueryTag
from dicom_depot.domain.search import SEARCHABLE, Level

_CREATOR = re.compile(r"[^\\\x00-\x1f\x7f]{1,64}")
_CORE = {attribute.tag: attribute for attribute in SEARCHABLE if attribute.parent is None}


def tag_of_path(path: str) -> int:
    """The tag that a path in a URL names, as keyword or eight hexadecimal digits. Raises InvalidRequest."""
    path_ = tag_path(path)
    if len(path_) != 1:
        raise InvalidRequest("An extended query tag cannot stand in a sequence.", target="path")
    return path_[0]


def new_query_tag(path: str, vr: str | None, private_creator: str | None, level: str) -> NewQueryTag:
    """Check what is wanted. Raises InvalidRequest whose target is `path`, `vr`, `privateCreator` or `level`."""
    try:
        tag = tag_of_path(path.strip())
    except InvalidRequest as error:
        raise InvalidRequest(error.message, target="path") from None
    if tag in _CORE:
        raise InvalidRequest(f"{_CORE[tag].keyword} is searched without being an extended query tag.", target="path")
    wanted_level = next((each for each in Level if each.value == level.lower()), None)
    if wanted_level is None:
        raise InvalidRequest("It must be Study, Series or Instance.", target="level")
    is_private = bool(tag >> 16 & 1)
    wanted_vr = _vr(tag, vr, is_private=is_private)
    if is_private:
        if tag & 0xFFFF < 0x1000:
            raise InvalidRequest("This is no private attribute: its element is below 1000.", target="path")
        if not private_creator:
            raise InvalidRequest("A private attribute needs its private creator.", target="privateCreator")
        if not _CREATOR.fullmatch(private_creator):
            raise InvalidRequest("It must be a long string (LO) of at most 64 characters.", target="privateCreator")
    elif private_creator:
        raise InvalidRequest("The attribute is not private; leave the creator out.", target="privateCreator")
    return NewQueryTag(tag, wanted_vr, wanted_level, private_creator.strip() if private_creator else None)


def _vr(tag: int, vr: str | None, *, is_private: bool) -> str:
    vr = None if not vr else vr.strip().upper()
    if is_private:
        if vr is None:
            raise InvalidRequest("A private attribute needs its VR.", target="vr")
    else:
        known = dictionary_VR(tag)
        if vr is None:
            vr = known
        elif vr not in known.split(" or "):
            raise InvalidRequest(f"The attribute has VR {known}, not {vr}.", target="vr")
    if vr not in QUERY_TAG_VRS:
        raise InvalidRequest(
            f"Attributes of VR {vr} cannot be searched; of these they can: {', '.join(sorted(QUERY_TAG_VRS))}.",
            target="vr",
        )
    return vr
