"""What an operation is about, as its row holds it: identifiers, a query with its answer, or neither for everything."""

from __future__ import annotations

import json
import zlib
from typing import Any, assert_never

from dicom_depot.domain.export import Answered, DecidedSource, Everything, Listed, Matching, pack_ids, unpack_ids
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.search import Level


def source_columns(source: DecidedSource) -> dict[str, Any]:
    """The columns of `operations` that hold a source, but for those that stay empty."""
    match source:
        case Everything():
            return {}
        case Listed(identifiers):
            return {"identifiers": zlib.compress(json.dumps([str(ref) for ref in identifiers]).encode())}
        case Answered(asked, series_ids, tag_ids):
            query = {
                "level": asked.level.value,
                "filters": dict(asked.filters),
                "fuzzymatching": asked.is_fuzzy,
                "tagIds": list(tag_ids),
            }
            return {"query": query, "series_ids": zlib.compress(pack_ids(series_ids))}
        case _:
            assert_never(source)


def source_of(identifiers: bytes | None, query: dict[str, Any] | None, series_ids: bytes | None) -> DecidedSource:
    """Read these columns. Of an operation that indexes, the query names tags: it is about everything."""
    if identifiers is not None:
        return Listed(tuple(map(parse_identifier, json.loads(zlib.decompress(identifiers)))))
    if query is None or "tags" in query:
        return Everything()
    assert series_ids is not None
    asked = Matching(Level(query["level"]), query["filters"], query["fuzzymatching"])
    return Answered(asked, unpack_ids(zlib.decompress(series_ids)), tuple(query["tagIds"]))
