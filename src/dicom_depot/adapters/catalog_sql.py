"""What is stored now, for retrieval, in SQL. Reads rows by the unique index over series, instance and deletion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_search_values import back_filled
from dicom_depot.adapters.prepared import Prepared
from dicom_depot.adapters.schema import counters, instance_metadata, instances, series, studies
from dicom_depot.domain.errors import NotFound
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef, Uid
from dicom_depot.domain.instance import Metadata
from dicom_depot.ports import Cursor, ResourceVersion, StoredInstance

_FILLED = "metadata"
"""The counter that says how far the back-fill of metadata has come."""


def _statements(*columns: sa.ColumnElement[Any], is_distinct: bool = False) -> dict[type[Ref], Prepared]:
    """These columns of all live instances below a study, a series, an instance: statements that are made once."""
    found: dict[type[Ref], Prepared] = {}
    select = sa.select(*columns).distinct() if is_distinct else sa.select(*columns)
    statement: sa.Select[Any] = select.select_from(studies.join(series).join(instances)).where(
        studies.c.study_uid == sa.bindparam("study"), instances.c.deleted_sequence == 0
    )
    found[StudyRef] = Prepared(statement)
    statement = statement.where(series.c.series_uid == sa.bindparam("series"))
    found[SeriesRef] = Prepared(statement)
    statement = statement.where(instances.c.sop_instance_uid == sa.bindparam("sop"))
    found[InstanceRef] = Prepared(statement)
    return found


_INSTANCE_COLUMNS = (
    instances.c.id,
    instances.c.sop_instance_uid,
    instances.c.store_key,
    instances.c.size,
    instances.c.transfer_syntax_uid,
    instances.c.created_sequence,
)
_FULL_COLUMNS = (
    instances.c.id,
    studies.c.study_uid,
    series.c.series_uid,
    instances.c.sop_instance_uid,
    instances.c.store_key,
    instances.c.size,
    instances.c.transfer_syntax_uid,
    instances.c.created_sequence,
)
_VERSIONS = _statements(sa.func.max(instances.c.created_sequence), sa.func.count())
_SYNTAXES = _statements(instances.c.transfer_syntax_uid, is_distinct=True)
_ONE = _statements(*_INSTANCE_COLUMNS)[InstanceRef]
_SERIES_OF_STUDY = Prepared(
    sa.select(series.c.id, series.c.series_uid)
    .select_from(series.join(studies))
    .where(studies.c.study_uid == sa.bindparam("study"))
    .order_by(series.c.id)
)
_PAGE_OF_SERIES = Prepared(
    sa.select(*_INSTANCE_COLUMNS)
    .where(
        instances.c.series_id == sa.bindparam("series_id"),
        instances.c.deleted_sequence == 0,
        instances.c.sop_instance_uid > sa.bindparam("after"),
    )
    .order_by(instances.c.sop_instance_uid)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)


class SqlCatalog:
    """`ports.InstanceCatalog` on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def version_of(self, ref: Ref) -> ResourceVersion:
        with self._database.read() as connection:
            last, count = _VERSIONS[type(ref)].one(connection, _bound(ref))
        if not count:
            raise not_found(ref)
        return ResourceVersion(last, count)

    def instances(self, ref: Ref, after: Cursor | None, limit: int) -> tuple[list[StoredInstance], Cursor | None]:
        with self._database.read() as connection:
            if isinstance(ref, InstanceRef):
                return [_stored(ref, *row[2:], id_=row[0]) for row in _ONE.all(connection, _bound(ref))], None
            return _page(connection, ref, after, limit)

    def transfer_syntaxes(self, ref: Ref) -> frozenset[str]:
        with self._database.read() as connection:
            return frozenset(row[0] for row in _SYNTAXES[type(ref)].all(connection, _bound(ref)))

    def metadata(self, instance_ids: Sequence[int]) -> dict[int, Metadata]:
        numbers = ",".join(str(int(id_)) for id_ in instance_ids)
        with self._database.read() as connection:
            rows = connection.exec_driver_sql(
                f"SELECT instance_id, dicom_json, layout FROM instance_metadata WHERE instance_id IN ({numbers})"
            )
            return {id_: Metadata(dicom_json, layout) for id_, dicom_json, layout in rows}

    def by_ids(self, instance_ids: Sequence[int]) -> list[StoredInstance]:
        statement = (
            sa.select(*_FULL_COLUMNS)
            .select_from(instances.join(series).join(studies))
            .where(instances.c.id.in_(instance_ids), instances.c.deleted_sequence == 0)
        )
        with self._database.read() as connection:
            return [_full(row) for row in connection.execute(statement)]

    def without_metadata(self, limit: int) -> tuple[list[StoredInstance], int | None]:
        position = sa.select(counters.c.value).where(counters.c.name == _FILLED)
        lacks = ~sa.exists().where(instance_metadata.c.instance_id == instances.c.id)
        with self._database.read() as connection:
            start = connection.execute(position).scalar_one_or_none() or 0
            statement = (
                sa.select(*_FULL_COLUMNS, lacks.label("lacks"))
                .select_from(instances.join(series).join(studies))
                .where(instances.c.id > start, instances.c.deleted_sequence == 0)
                .order_by(instances.c.id)
                .limit(limit)
            )
            rows = connection.execute(statement).all()
        found = [_full(row) for row in rows if row.lacks]
        return found, rows[-1].id if rows else None

    def add_metadata(self, found: Mapping[int, Metadata], done_up_to: int) -> None:
        with self._database.write() as connection:
            alive = set(
                connection.execute(sa.select(instances.c.id).where(instances.c.id.in_(list(found)))).scalars()
            )  # a sweep may have come first
            ids = [id_ for id_ in found if id_ in alive]
            if ids:
                connection.execute(
                    insert(instance_metadata).on_conflict_do_nothing(),
                    [
                        {"instance_id": id_, "dicom_json": found[id_].dicom_json, "layout": found[id_].layout}
                        for id_ in ids
                    ],
                )
                back_filled(connection, ids)
            moved = insert(counters).values(name=_FILLED, value=done_up_to)
            connection.execute(
                moved.on_conflict_do_update(
                    index_elements=("name",),
                    set_={"value": moved.excluded.value},
                    where=counters.c.value < moved.excluded.value,
                )
            )


def not_found(ref: Ref) -> NotFound:
    """Names what is not there, by its level and UIDs."""
    match ref:
        case StudyRef():
            level = "study"
        case SeriesRef():
            level = "series"
        case InstanceRef():
            level = "instance"
    return NotFound(f"There is no {level} {ref}.", target=level)


def _bound(ref: Ref) -> dict[str, str]:
    match ref:
        case StudyRef(study):
            return {"study": study}
        case SeriesRef(study, series_uid):
            return {"study": study, "series": series_uid}
        case InstanceRef(study, series_uid, sop):
            return {"study": study, "series": series_uid, "sop": sop}


def _full(row: Sequence[Any]) -> StoredInstance:
    return StoredInstance(row[0], InstanceRef(row[1], row[2], row[3]), row[4], row[5], row[6], row[7])


def _stored(ref: InstanceRef, key: str, size: int, syntax: str, sequence: int, *, id_: int) -> StoredInstance:
    return StoredInstance(id_, ref, key, size, syntax, sequence)


def _page(
    connection: sa.Connection, ref: StudyRef | SeriesRef, after: Cursor | None, limit: int
) -> tuple[list[StoredInstance], Cursor | None]:
    """Walk the series in order of their internal id, each by the unique index over series, instance and deletion."""
    start_series, start_sop = after or (0, "")
    chosen: list[StoredInstance] = []
    for series_id, series_uid in _SERIES_OF_STUDY.all(connection, {"study": ref.study_uid}):
        if series_id < start_series or (isinstance(ref, SeriesRef) and series_uid != ref.series_uid):
            continue
        rows = _PAGE_OF_SERIES.all(
            connection,
            {
                "series_id": series_id,
                "after": start_sop if series_id == start_series else "",
                "limit": limit - len(chosen),
            },
        )
        chosen += [_stored(InstanceRef(ref.study_uid, series_uid, Uid(row[1])), *row[2:], id_=row[0]) for row in rows]
        if len(chosen) >= limit:
            return chosen, (series_id, chosen[-1].ref.sop_instance_uid)
    return chosen, None
