"""The instance index in SQL. Statements are SQLAlchemy Core; the two hot reads are plain text with integers only."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.schema import changes, counters, instance_metadata, instances, series, studies
from dicom_depot.domain.export import PlannedInstance
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef
from dicom_depot.domain.instance import InstanceRecord, StoredObject
from dicom_depot.domain.search import Level, attributes_of
from dicom_depot.ports import AddOutcome, ChangeAction, Cursor, IndexEntry, KnownInstance, Remaining, SelectionPage

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
                found.update(_find(connection, batch))
        return found

    def add(self, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
        outcomes: list[AddOutcome] = []
        if not records:
            return outcomes
        with self._database.write() as connection:
            for part in _without_repeats(records):
                outcomes += _add(connection, part)
        return outcomes

    def delete(self, ref: Ref) -> int:
        with self._database.write() as connection:
            rows = connection.execute(_below(ref).where(instances.c.deleted_sequence == 0)).all()
            if not rows:
                return 0
            first = _take_numbers(connection, len(rows))
            now = _now()
            _mark_deleted(connection, [(row.id, first + n) for n, row in enumerate(rows)], now)
            _record_changes(
                connection,
                [(first + n, row.series_id, row.sop_instance_uid, ChangeAction.DELETE) for n, row in enumerate(rows)],
                now,
            )
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
                connection.execute(sa.delete(instance_metadata).where(instance_metadata.c.instance_id.in_(batch)))
                connection.execute(sa.delete(instances).where(instances.c.id.in_(batch)))

    def forgotten_up_to(self) -> int:
        statement = sa.select(counters.c.value).where(counters.c.name == _FORGOTTEN)
        with self._database.read() as connection:
            return int(connection.execute(statement).scalar_one_or_none() or 0)


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _visible(cutoff: int) -> sa.ColumnElement[bool]:
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


def _without_repeats(records: Sequence[InstanceRecord]) -> Iterator[list[InstanceRecord]]:
    """Cut where a record would replace an earlier one of the same call: that one must be there first."""
    part: list[InstanceRecord] = []
    refs: set[InstanceRef] = set()
    for record in records:
        if record.may_replace and record.ref in refs:
            yield part
            part, refs = [], set()
        part.append(record)
        refs.add(record.ref)
    yield part


def _add(connection: sa.Connection, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
    known: dict[InstanceRef, KnownInstance] = {}
    for batch in _batches([record.ref for record in records]):
        known.update(_find(connection, batch))
    fresh: list[InstanceRecord] = []
    replaced: set[InstanceRef] = set()
    outcomes: list[AddOutcome] = []
    for record in records:
        earlier = known.get(record.ref)
        if earlier is not None and earlier.sha256 == record.sha256:
            outcomes.append(AddOutcome.ALREADY_THERE)
        elif earlier is not None and not record.may_replace:
            outcomes.append(AddOutcome.CONFLICTING)
        else:
            known[record.ref] = KnownInstance(record.sha256, record.size)
            fresh.append(record)
            if earlier is not None:
                replaced.add(record.ref)
            outcomes.append(AddOutcome.STORED if earlier is None else AddOutcome.REPLACED)
    if fresh:
        _insert(connection, fresh, replaced)
    return outcomes


def _mark_deleted(connection: sa.Connection, numbers: Sequence[tuple[int, int]], now: datetime) -> None:
    """(internal id, number) of each row whose instance is there no more."""
    connection.execute(
        sa.update(instances)
        .where(instances.c.id == sa.bindparam("row_id"))
        .values(deleted_sequence=sa.bindparam("number"), deleted_at=now),
        [{"row_id": id_, "number": number} for id_, number in numbers],
    )


def _record_changes(
    connection: sa.Connection, entries: Sequence[tuple[int, int, str, ChangeAction]], now: datetime
) -> None:
    """(number, series, SOP instance UID, action) of each change."""
    connection.execute(
        sa.insert(changes),
        [
            {
                "sequence": number,
                "series_id": series_id,
                "sop_instance_uid": sop,
                "action": action.value,
                "occurred_at": now,
            }
            for number, series_id, sop, action in entries
        ],
    )


def _find(connection: sa.Connection, refs: Sequence[InstanceRef]) -> dict[InstanceRef, KnownInstance]:
    wanted = _wanted(refs)
    statement = sa.select(wanted, instances.c.sha256, instances.c.size).select_from(
        wanted.join(studies, studies.c.study_uid == wanted.c.study_uid)
        .join(series, (series.c.study_id == studies.c.id) & (series.c.series_uid == wanted.c.series_uid))
        .join(
            instances,
            (instances.c.series_id == series.c.id)
            & (instances.c.sop_instance_uid == wanted.c.sop_instance_uid)
            & (instances.c.deleted_sequence == 0),
        )
    )
    return {
        InstanceRef(study, series_, sop): KnownInstance(sha256, size)
        for study, series_, sop, sha256, size in connection.execute(statement)
    }


def _take_numbers(connection: sa.Connection, count: int) -> int:
    """Reserve `count` numbers of the sequence and return the first.

    Taken after everything that may block, right before the rows are written: the counter row stays locked until the
    commit, so numbers become visible in their order.
    """
    last = connection.execute(
        sa.update(counters)
        .where(counters.c.name == "sequence")
        .values(value=counters.c.value + count)
        .returning(counters.c.value)
    ).scalar_one()
    return int(last) - count + 1


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


def _insert(connection: sa.Connection, records: Sequence[InstanceRecord], replaced: AbstractSet[InstanceRef]) -> None:
    study_columns = [attribute.column for attribute in attributes_of(Level.STUDY)]
    series_columns = [attribute.column for attribute in attributes_of(Level.SERIES)]
    instance_columns = [attribute.column for attribute in attributes_of(Level.INSTANCE)]
    by_study = {record.ref.study_uid: record for record in records}
    study_ids = _upsert(
        connection,
        studies,
        [
            {"study_uid": uid} | {name: record.header.attributes.get(name) for name in study_columns}
            for uid, record in by_study.items()
        ],
        ("study_uid",),
        study_columns,
    )
    by_series = {(study_ids[record.ref.study_uid,], record.ref.series_uid): record for record in records}
    series_ids = _upsert(
        connection,
        series,
        [
            {"study_id": study_id, "series_uid": uid}
            | {name: record.header.attributes.get(name) for name in series_columns}
            for (study_id, uid), record in by_series.items()
        ],
        ("study_id", "series_uid"),
        series_columns,
    )
    now = _now()
    series_of = [series_ids[study_ids[record.ref.study_uid,], record.ref.series_uid] for record in records]
    former = _live_ids(
        connection,
        [
            (series_id, record.ref.sop_instance_uid)
            for series_id, record in zip(series_of, records, strict=True)
            if record.ref in replaced
        ],
    )
    first = _take_numbers(connection, len(records))
    changed: list[tuple[int, int, str, ChangeAction]] = []
    outdated: list[tuple[int, int]] = []
    rows: list[dict[str, Any]] = []
    for number, (series_id, record) in enumerate(zip(series_of, records, strict=True), first):
        sop = record.ref.sop_instance_uid
        earlier = former.get((series_id, sop))
        changed.append((number, series_id, sop, ChangeAction.CREATE if earlier is None else ChangeAction.UPDATE))
        if earlier is not None:
            outdated.append((earlier, number))
        rows.append(
            {
                "series_id": series_id,
                "sop_instance_uid": sop,
                "sop_class_uid": record.header.sop_class_uid,
                "transfer_syntax_uid": record.header.transfer_syntax_uid,
                "store_key": record.store_key,
                "size": record.size,
                "sha256": record.sha256,
                "xxh3": record.xxh3 - (1 << 64) if record.xxh3 >> 63 else record.xxh3,
                "stored_at": now,
                "created_sequence": number,
            }
            | {name: record.header.attributes.get(name) for name in instance_columns}
        )
    if outdated:
        _mark_deleted(connection, outdated, now)
    connection.execute(sa.insert(instances), rows)
    _record_changes(connection, changed, now)
    _insert_metadata(connection, records)


def _live_ids(connection: sa.Connection, keys: Sequence[tuple[int, str]]) -> dict[tuple[int, str], int]:
    """Internal ids of live rows by series and SOP instance UID: few, those that are being replaced."""
    found: dict[tuple[int, str], int] = {}
    for series_id, sop in keys:
        statement = sa.select(instances.c.id).where(
            instances.c.series_id == series_id,
            instances.c.sop_instance_uid == sop,
            instances.c.deleted_sequence == 0,
        )
        found[series_id, sop] = connection.execute(statement).scalar_one()
    return found


def _insert_metadata(connection: sa.Connection, records: Sequence[InstanceRecord]) -> None:
    """The rows went in by order, nobody else's between them while the counter is locked: theirs are the last ids."""
    if all(record.metadata is None for record in records):
        return
    last_id = connection.execute(sa.select(sa.func.max(instances.c.id))).scalar_one()
    found = [
        {"instance_id": id_, "dicom_json": record.metadata.dicom_json, "layout": record.metadata.layout}
        for id_, record in enumerate(records, last_id - len(records) + 1)
        if record.metadata is not None
    ]
    connection.execute(sa.insert(instance_metadata), found)


def _upsert(
    connection: sa.Connection,
    table: sa.Table,
    rows: list[dict[str, Any]],
    keys: tuple[str, ...],
    attributes: list[str],
) -> dict[tuple[Any, ...], int]:
    """Insert or update study or series rows, and return their ids by key.

    The attributes of a study or series are those of the instance that was stored last.
    """
    ids: dict[tuple[Any, ...], int] = {}
    for batch in _batches(rows):
        statement = insert(table).values(list(batch))
        statement = statement.on_conflict_do_update(
            index_elements=keys, set_={name: statement.excluded[name] for name in attributes}
        )
        returned = connection.execute(statement.returning(table.c.id, *(table.c[key] for key in keys)))
        ids.update((tuple(row[1:]), row[0]) for row in returned)
    return ids


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


def _select_series(
    connection: sa.Connection, series_ids: list[int], cutoff: int, after: Cursor | None, limit: int
) -> SelectionPage:
    """Walk the series in order of their internal id, each by SOP instance UID: the order of the unique index."""
    chosen: list[PlannedInstance] = []
    start_series, start_sop = after or (0, "")
    for series_id in series_ids[bisect_left(series_ids, start_series) :]:
        rows = connection.exec_driver_sql(
            "SELECT id, size, sop_instance_uid FROM instances"
            " WHERE series_id = ? AND sop_instance_uid > ? AND created_sequence <= ?"
            " AND (deleted_sequence = 0 OR deleted_sequence > ?) ORDER BY sop_instance_uid LIMIT ?",
            (series_id, start_sop if series_id == start_series else "", cutoff, cutoff, limit - len(chosen)),
        ).all()
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
