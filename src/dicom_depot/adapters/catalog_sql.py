"""What is stored now, for retrieval, in SQL. Reads rows by the unique index over series, instance and deletion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.schema import counters, instance_metadata, instances, series, studies
from dicom_depot.domain.errors import NotFound
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef, Uid
from dicom_depot.domain.instance import Metadata
from dicom_depot.ports import Cursor, ResourceVersion, StoredInstance

_FILLED = "metadata"
"""The counter that says how far the back-fill of metadata has come."""

_COLUMNS = "id, sop_instance_uid, store_key, size, transfer_syntax_uid, created_sequence"


class SqlCatalog:
    """`ports.InstanceCatalog` on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def version_of(self, ref: Ref) -> ResourceVersion:
        with self._database.read() as connection:
            statement = _among_live(ref, sa.func.max(instances.c.created_sequence), sa.func.count())
            last, count = connection.execute(statement).one()
        if not count:
            raise not_found(ref)
        return ResourceVersion(last, count)

    def instances(self, ref: Ref, after: Cursor | None, limit: int) -> tuple[list[StoredInstance], Cursor | None]:
        start_series, start_sop = after or (0, "")
        chosen: list[StoredInstance] = []
        with self._database.read() as connection:
            for series_id, study_uid, series_uid in _series_below(connection, ref):
                if series_id < start_series:
                    continue
                if isinstance(ref, InstanceRef):
                    condition, sop_uid = "=", str(ref.sop_instance_uid)
                else:
                    condition, sop_uid = ">", start_sop if series_id == start_series else ""
                rows = connection.exec_driver_sql(
                    f"SELECT {_COLUMNS} FROM instances WHERE series_id = ? AND deleted_sequence = 0"
                    f" AND sop_instance_uid {condition} ? ORDER BY sop_instance_uid LIMIT ?",
                    (series_id, sop_uid, limit - len(chosen)),
                )
                for id_, sop, key, size, syntax, sequence in rows:
                    instance = InstanceRef(study_uid, series_uid, Uid(sop))
                    chosen.append(StoredInstance(id_, instance, key, size, syntax, sequence))
                if len(chosen) >= limit and condition == ">":
                    return chosen, (series_id, chosen[-1].ref.sop_instance_uid)
        return chosen, None

    def transfer_syntaxes(self, ref: Ref) -> frozenset[str]:
        with self._database.read() as connection:
            statement = _among_live(ref, instances.c.transfer_syntax_uid).distinct()
            return frozenset(connection.execute(statement).scalars())

    def metadata(self, instance_ids: Sequence[int]) -> dict[int, Metadata]:
        numbers = ",".join(str(int(id_)) for id_ in instance_ids)
        with self._database.read() as connection:
            rows = connection.exec_driver_sql(
                f"SELECT instance_id, dicom_json, layout FROM instance_metadata WHERE instance_id IN ({numbers})"
            )
            return {id_: Metadata(dicom_json, layout) for id_, dicom_json, layout in rows}

    def without_metadata(self, limit: int) -> tuple[list[StoredInstance], int | None]:
        position = sa.select(counters.c.value).where(counters.c.name == _FILLED)
        lacks = ~sa.exists().where(instance_metadata.c.instance_id == instances.c.id)
        with self._database.read() as connection:
            start = connection.execute(position).scalar_one_or_none() or 0
            statement = (
                sa.select(
                    instances.c.id,
                    studies.c.study_uid,
                    series.c.series_uid,
                    instances.c.sop_instance_uid,
                    instances.c.store_key,
                    instances.c.size,
                    instances.c.transfer_syntax_uid,
                    instances.c.created_sequence,
                    lacks.label("lacks"),
                )
                .select_from(instances.join(series).join(studies))
                .where(instances.c.id > start, instances.c.deleted_sequence == 0)
                .order_by(instances.c.id)
                .limit(limit)
            )
            rows = connection.execute(statement).all()
        found = [
            StoredInstance(row[0], InstanceRef(row[1], row[2], row[3]), row[4], row[5], row[6], row[7])
            for row in rows
            if row.lacks
        ]
        return found, rows[-1].id if rows else None

    def add_metadata(self, found: Mapping[int, Metadata], done_up_to: int) -> None:
        with self._database.write() as connection:
            alive = set(
                connection.execute(sa.select(instances.c.id).where(instances.c.id.in_(list(found)))).scalars()
            )  # a sweep may have come first
            rows = [
                {"instance_id": id_, "dicom_json": each.dicom_json, "layout": each.layout}
                for id_, each in found.items()
                if id_ in alive
            ]
            if rows:
                connection.execute(insert(instance_metadata).on_conflict_do_nothing(), rows)
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


def _among_live(ref: Ref, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    statement: sa.Select[Any] = (
        sa.select(*columns)
        .select_from(studies.join(series).join(instances))
        .where(studies.c.study_uid == ref.study_uid, instances.c.deleted_sequence == 0)
    )
    if not isinstance(ref, StudyRef):
        statement = statement.where(series.c.series_uid == ref.series_uid)
    if isinstance(ref, InstanceRef):
        statement = statement.where(instances.c.sop_instance_uid == ref.sop_instance_uid)
    return statement


def _series_below(connection: sa.Connection, ref: Ref) -> Iterator[tuple[int, Uid, Uid]]:
    """(internal id, study UID, series UID) of the series that hold what `ref` names, by internal id."""
    statement = (
        sa.select(series.c.id, studies.c.study_uid, series.c.series_uid)
        .select_from(series.join(studies))
        .where(studies.c.study_uid == ref.study_uid)
        .order_by(series.c.id)
    )
    if not isinstance(ref, StudyRef):
        statement = statement.where(series.c.series_uid == ref.series_uid)
    for row in connection.execute(statement).all():
        yield row[0], Uid(row[1]), Uid(row[2])
