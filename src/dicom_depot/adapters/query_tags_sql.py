"""The extended query tags in SQL."""

from __future__ import annotations

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_search_values import tags
from dicom_depot.domain.query_tags import QueryTag


class SqlQueryTags:
    """`ports.QueryTags` on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[QueryTag]:
        with self._database.read() as connection:
            return tags(connection)
