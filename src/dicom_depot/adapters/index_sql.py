"""The instance index in SQL. Statements are SQLAlchemy Core; the two hot reads are plain text with integers only."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_search_values import forget_values, left
from dicom_depot.adapters.index_writes import add, find, mark_deleted, without_repeats
from dicom_depot.adapters.schema import counters, instance_metadata, instances, series, studies
from dicom_depot.adapters.search_sql import looked_up
from dicom_depot.domain.export import PlannedInstance
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef
from dicom_depot.domain.instance import InstanceRecord, StoredObject
from dicom_depot.domain.search import Condition
from dicom_depot.ports import AddOutcome, Cursor, IndexEntry, KnownInstance, Remaining, SelectionPage

_BATCH = 500
"""Identifiers in one statement: far below every database's limit of bound parameters."""

_T = TypeVar("_T")

_UINT64 = (1 << 64) - 1
_FORGOTTEN = "forgotten"


class SqlIndex:
    """`ports.InstanceIndex` on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, refs: Sequence[InstanceRef]) -> dict[InstanceRef, KnownInstance]:
        found: dict[InstanceRef, KnownInstance] = {}
        with self._database.read() as connection:
            for batch in _batches(refs):
                found.update(find(connection, batch))
        return found

    def add(self, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
        outcomes: list[AddOutcome] = []
        if not records:
            return outcomes
        with self._database.write() as connection:
            for part in without_repeats(records):
                outcomes += add(connection, part)
        return outcomes

    def delete(self, ref: Ref) -> int:
        with self._database.write() as connection:
            rows = connection.execute(_below(ref).where(instances.c.deleted_sequence == 0)).all()
            if not rows:
                return 0
            mark_deleted(connection, [(row.id, row.series_id, row.sop_instance_uid) for row in rows])
            return len(rows)

    def sequence(self) -> int:
        with self._database.read() as connection:
            return int(
                connection.execute(sa.select(counters.c.value).where(counters.c.name == "sequence")).scalar_one()
            )

    def unmatched(self, refs: Sequence[Ref], cutoff: int) -> list[Ref]:
        matched: set[Ref] = set()
        with self._database.read() as connection:
            for batch in _batches(refs):
                matched.update(_matched(connection, batch, cutoff))
        return [ref for ref in refs if ref not in matched]

    def select(self, refs: Sequence[Ref] | None, cutoff: int, after: Cursor | None, limit: int) -> SelectionPage:
        with self._database.read() as connection:
            if refs is None:
                return _select_all(connection, cutoff, after, limit)
            series_ids: list[int] = []
            single: list[PlannedInstance] = []
            for batch in _batches(refs):
                match batch[0]:
                    case InstanceRef():
                        single.extend(_select_instances(connection, batch, cutoff))
                    case _:
                        series_ids.extend(_series_ids(connection, batch))
            if single:
                return _page_of(single, after, limit)
            return _select_series(connection, sorted(series_ids), cutoff, after, limit)

    def select_in_series(
        self,
        series_ids: Sequence[int],
        conditions: Sequence[Condition],
        cutoff: int,
        after: Cursor | None,
        limit: int,
    ) -> SelectionPage:
        with self._database.read() as connection:
            return _select_series(connection, series_ids, cutoff, after, limit, conditions)

    def totals(self, cutoff: int) -> tuple[int, int]:
        with self._database.read() as connection:
            row = connection.execute(
                sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(instances.c.size), 0)).where(_visible(cutoff))
            ).one()
            return int(row[0]), int(row[1])

    def fetch(self, instance_ids: Sequence[int]) -> list[StoredObject]:
        found: dict[int, StoredObject] = {}
        with self._database.read() as connection:
            for batch in _batches(instance_ids):
                numbers = ",".join(str(int(id_)) for id_ in batch)
                # One row with all of them: between two rows the driver lets go of the interpreter, and while many
                # threads copy, getting it back takes longer than reading the row.
                rows = connection.exec_driver_sql(
                    "SELECT json_group_array(json_array("
                    "i.id, t.study_uid, s.series_uid, i.sop_instance_uid, i.store_key, i.size, i.xxh3))"
                    " FROM instances i JOIN series s ON s.id = i.series_id JOIN studies t ON t.id = s.study_id"
                    f" WHERE i.id IN ({numbers})"
                ).scalar_one()
                for id_, study, series_, sop, key, size, xxh3 in json.loads(rows):
                    found[id_] = StoredObject(id_, study, series_, sop, key, size, xxh3 & _UINT64)
        return [found[id_] for id_ in instance_ids if id_ in found]

    def remaining(self, instance_ids: Sequence[int]) -> Remaining:
        count, deleted_keys = 0, list[str]()
        with self._database.read() as connection:
            for batch in _batches(instance_ids):
                numbers = ",".join(str(int(id_)) for id_ in batch)
                rows = f"FROM instances WHERE id IN ({numbers})"
                count += connection.exec_driver_sql(f"SELECT count(*) {rows}").scalar_one()
                deleted = connection.exec_driver_sql(f"SELECT store_key {rows} AND deleted_sequence <> 0")
                deleted_keys.extend(deleted.scalars())
        return Remaining(count, deleted_keys)

    def scan(self, after: int, limit: int) -> list[IndexEntry]:
        statement = (
            sa.select(
                instances.c.id,
                studies.c.study_uid,
                series.c.series_uid,
                instances.c.sop_instance_uid,
                instances.c.store_key,
                instances.c.size,
                instances.c.sha256,
                instances.c.deleted_sequence,
            )
            .select_from(instances.join(series).join(studies))
            .where(instances.c.id > after)
            .order_by(instances.c.id)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [
                IndexEntry(id_, f"{study}/{series_}/{sop}", key, size, sha256, deleted != 0)
                for id_, study, series_, sop, key, size, sha256, deleted in connection.execute(statement)
            ]

    def sweepable(self, deleted_before: datetime, oldest_cutoff: int | None, limit: int) -> list[tuple[int, str]]:
        condition = instances.c.deleted_at < deleted_before.astimezone(UTC).replace(tzinfo=None)
        if oldest_cutoff is not None:
            condition &= instances.c.deleted_sequence <= oldest_cutoff
        statement = sa.select(instances.c.id, instances.c.store_key).where(condition).limit(limit)
        with self._database.read() as connection:
            return [(id_, key) for id_, key in connection.execute(statement)]

    def forget(self, instance_ids: Sequence[int]) -> None:
        with self._database.write() as connection:
            for batch in _batches(instance_ids):
                _note_forgotten(connection, batch)
                live = connection.execute(
                    sa.select(instances.c.id, instances.c.series_id).where(
                        instances.c.id.in_(batch), instances.c.deleted_sequence == 0
                    )
                ).all()
                forget_values(connection, batch)
                connection.execute(sa.delete(instance_metadata).where(instance_metadata.c.instance_id.in_(batch)))
                connection.execute(sa.delete(instances).where(instances.c.id.in_(batch)))
                left(connection, [(row.id, row.series_id) for row in live])

    def forgotten_up_to(self) -> int:
        statement = sa.select(counters.c.value).where(counters.c.name == _FORGOTTEN)
        with self._database.read() as connection:
            return int(connection.execute(statement).scalar_one_or_none() or 0)


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _visible(cutoff: int | sa.BindParameter[int]) -> sa.ColumnElement[bool]:
    """Stored by the cut-off and not deleted by then: what was planned stays, whatever is deleted or replaced later."""
    return (instances.c.created_sequence <= cutoff) & (
        (instances.c.deleted_sequence == 0) | (instances.c.deleted_sequence > cutoff)
    )


def _wanted(refs: Sequence[Ref]) -> sa.CTE:
    """The identifiers, all of one kind, as a table to join with.

    They travel as one JSON parameter: a statement with a parameter for each is compiled anew each time, which takes
    several times as long as running it.
    """
    rows: list[tuple[str, ...]] = []
    for ref in refs:
        match ref:
            case StudyRef(study):
                rows.append((study,))
            case SeriesRef(study, series_):
                rows.append((study, series_))
            case InstanceRef(study, series_, sop):
                rows.append((study, series_, sop))
    row = sa.func.json_each(json.dumps(rows)).table_valued("value")
    columns = ("study_uid", "series_uid", "sop_instance_uid")[: len(rows[0])]
    parts = [
        sa.func.json_extract(row.c.value, f"$[{n}]", type_=sa.String).label(name) for n, name in enumerate(columns)
    ]
    return sa.select(*parts).select_from(row).cte("wanted")


def _note_forgotten(connection: sa.Connection, instance_ids: Sequence[int]) -> None:
    """Keep the highest number of a deletion whose row goes now."""
    highest = sa.select(sa.func.max(instances.c.deleted_sequence)).where(instances.c.id.in_(instance_ids))
    number = connection.execute(highest).scalar_one() or 0
    statement = insert(counters).values(name=_FORGOTTEN, value=number)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=("name",),
            set_={"value": statement.excluded.value},
            where=counters.c.value < statement.excluded.value,
        )
    )


def _below(ref: Ref) -> sa.Select[tuple[int, int, str]]:
    columns = (instances.c.id, instances.c.series_id, instances.c.sop_instance_uid)
    statement = sa.select(*columns).select_from(instances.join(series).join(studies))
    match ref:
        case StudyRef(study):
            return statement.where(studies.c.study_uid == study)
        case SeriesRef(study, series_):
            return statement.where(studies.c.study_uid == study, series.c.series_uid == series_)
        case InstanceRef(study, series_, sop):
            return statement.where(
                studies.c.study_uid == study,
                series.c.series_uid == series_,
                instances.c.sop_instance_uid == sop,
            )


def _matched(connection: sa.Connection, refs: Sequence[Ref], cutoff: int) -> Iterator[Ref]:
    for kind in (StudyRef, SeriesRef, InstanceRef):
        of_kind = [ref for ref in refs if type(ref) is kind]
        if not of_kind:
            continue
        wanted = _wanted(of_kind)
        tables = wanted.join(studies, studies.c.study_uid == wanted.c.study_uid)
        on_series = series.c.study_id == studies.c.id
        condition = instances.c.series_id == series.c.id
        if kind is not StudyRef:
            on_series &= series.c.series_uid == wanted.c.series_uid
        if kind is InstanceRef:
            condition &= instances.c.sop_instance_uid == wanted.c.sop_instance_uid
        visible = sa.exists().where(condition, _visible(cutoff)).correlate(series, wanted)
        statement = sa.select(wanted).distinct().select_from(tables.join(series, on_series)).where(visible)
        for row in connection.execute(statement):
            yield kind(*row)


def _series_ids(connection: sa.Connection, refs: Sequence[Ref]) -> list[int]:
    wanted = _wanted(refs)
    on_series = series.c.study_id == studies.c.id
    if isinstance(refs[0], SeriesRef):
        on_series &= series.c.series_uid == wanted.c.series_uid
    tables = wanted.join(studies, studies.c.study_uid == wanted.c.study_uid).join(series, on_series)
    return list(connection.execute(sa.select(series.c.id).select_from(tables)).scalars())


def _select_instances(connection: sa.Connection, refs: Sequence[Ref], cutoff: int) -> Iterator[PlannedInstance]:
    wanted = _wanted(refs)
    tables = (
        wanted.join(studies, studies.c.study_uid == wanted.c.study_uid)
        .join(series, (series.c.study_id == studies.c.id) & (series.c.series_uid == wanted.c.series_uid))
        .join(
            instances,
            (instances.c.series_id == series.c.id)
            & (instances.c.sop_instance_uid == wanted.c.sop_instance_uid)
            & _visible(cutoff),
        )
    )
    rows = connection.execute(sa.select(instances.c.id, instances.c.size).select_from(tables).order_by(instances.c.id))
    return (PlannedInstance(id_, size) for id_, size in rows)


def _page_of(instances_: list[PlannedInstance], after: Cursor | None, limit: int) -> SelectionPage:
    """A page, by internal id, of a selection that was read as a whole: listed instances are few at a time."""
    start = after[0] if after else 0
    rest = sorted(instance for instance in instances_ if instance.instance_id > start)
    page = rest[:limit]
    return SelectionPage(page, (page[-1].instance_id, "") if len(rest) > limit else None)


_IN_SERIES = (
    "SELECT id, size, sop_instance_uid FROM instances"
    " WHERE series_id = :series AND sop_instance_uid > :after AND created_sequence <= :cutoff"
    " AND (deleted_sequence = 0 OR deleted_sequence > :cutoff) ORDER BY sop_instance_uid LIMIT :most"
)


def _in_series_meeting(conditions: Sequence[Condition]) -> sa.Select[tuple[int, int, str]]:
    """The same with conditions."""
    return (
        sa.select(instances.c.id, instances.c.size, instances.c.sop_instance_uid)
        .where(
            instances.c.series_id == sa.bindparam("series"),
            instances.c.sop_instance_uid > sa.bindparam("after"),
            _visible(sa.bindparam("cutoff", type_=sa.BigInteger)),
            *map(looked_up, conditions),
        )
        .order_by(instances.c.sop_instance_uid)
        .limit(sa.bindparam("most", type_=sa.Integer))
    )


def _select_series(
    connection: sa.Connection,
    series_ids: Sequence[int],
    cutoff: int,
    after: Cursor | None,
    limit: int,
    conditions: Sequence[Condition] = (),
) -> SelectionPage:
    """Walk the series in order of their internal id, each by SOP instance UID: the order of the unique index."""
    chosen: list[PlannedInstance] = []
    start_series, start_sop = after or (0, "")
    meeting = _in_series_meeting(conditions) if conditions else None
    for series_id in series_ids[bisect_left(series_ids, start_series) :]:
        values = {
            "series": series_id,
            "after": start_sop if series_id == start_series else "",
            "cutoff": cutoff,
            "most": limit - len(chosen),
        }
        if meeting is None:
            rows: Sequence[Any] = connection.exec_driver_sql(_IN_SERIES, values).all()
        else:
            rows = connection.execute(meeting, values).all()
        chosen += [PlannedInstance(id_, size) for id_, size, _ in rows]
        if len(chosen) >= limit:
            return SelectionPage(chosen, (series_id, rows[-1][2]))
    return SelectionPage(chosen, None)


def _select_all(connection: sa.Connection, cutoff: int, after: Cursor | None, limit: int) -> SelectionPage:
    rows = connection.exec_driver_sql(
        f"SELECT id, size FROM instances WHERE id > {after[0] if after else 0:d} AND created_sequence <= {cutoff:d}"
        f" AND (deleted_sequence = 0 OR deleted_sequence > {cutoff:d}) ORDER BY id LIMIT {limit:d}"
    ).all()
    chosen = [PlannedInstance(row[0], row[1]) for row in rows]
    return SelectionPage(chosen, (chosen[-1].instance_id, "") if len(chosen) == limit else None)
