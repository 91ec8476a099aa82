"""What changes the index: adding, replacing and deleting instances, each within a transaction of the caller's.

Storing one instance runs some ten statements. They are built and compiled once, here: that takes longer than any
database needs to run them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.sql.dml import ReturningInsert

from dicom_depot.adapters.index_search_values import arrived, columns_at, index_tags, left, replace_values
from dicom_depot.adapters.prepared import Prepared
from dicom_depot.adapters.schema import changes, counters, instance_metadata, instances, series, studies
from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.domain.search import Level, attributes_of
from dicom_depot.ports import AddOutcome, ChangeAction, KnownInstance

_STUDY_COLUMNS = [attribute.column for attribute in attributes_of(Level.STUDY)]
_SERIES_COLUMNS = [attribute.column for attribute in attributes_of(Level.SERIES)]
_INSTANCE_COLUMNS = [attribute.column for attribute in attributes_of(Level.INSTANCE)]


def _find_statement() -> sa.Select[Any]:
    row = sa.func.json_each(sa.bindparam("wanted", type_=sa.Text)).table_valued("value")
    study, series_uid, sop = (sa.func.json_extract(row.c.value, f"$[{n}]", type_=sa.String) for n in range(3))
    wanted = (
        sa.select(study.label("study_uid"), series_uid.label("series_uid"), sop.label("sop")).select_from(row).cte()
    )
    return sa.select(wanted, instances.c.sha256, instances.c.size, instances.c.id).select_from(
        wanted.join(studies, studies.c.study_uid == wanted.c.study_uid)
        .join(series, (series.c.study_id == studies.c.id) & (series.c.series_uid == wanted.c.series_uid))
        .join(
            instances,
            (instances.c.series_id == series.c.id)
            & (instances.c.sop_instance_uid == wanted.c.sop)
            & (instances.c.deleted_sequence == 0),
        )
    )


def _known_statement(table: sa.Table, keys: tuple[str, ...], attributes: list[str]) -> sa.Select[Any]:
    return sa.select(table.c.id, *(table.c[name] for name in attributes)).where(
        *(table.c[name] == sa.bindparam(name) for name in keys)
    )


def _upsert_statement(table: sa.Table, keys: tuple[str, ...], attributes: list[str]) -> ReturningInsert[int]:
    """The attributes of a study or series are those of the instance that was stored last."""
    statement = insert(table).values({name: sa.bindparam(name) for name in (*keys, *attributes)})
    return statement.on_conflict_do_update(
        index_elements=keys, set_={name: statement.excluded[name] for name in attributes}
    ).returning(table.c.id)


_FIND = Prepared(_find_statement())
_KEYS = {Level.STUDY: ("study_uid",), Level.SERIES: ("study_id", "series_uid")}
_KNOWN = {
    Level.STUDY: Prepared(_known_statement(studies, _KEYS[Level.STUDY], _STUDY_COLUMNS)),
    Level.SERIES: Prepared(_known_statement(series, _KEYS[Level.SERIES], _SERIES_COLUMNS)),
}
_UPSERT = {
    Level.STUDY: Prepared(_upsert_statement(studies, _KEYS[Level.STUDY], _STUDY_COLUMNS)),
    Level.SERIES: Prepared(_upsert_statement(series, _KEYS[Level.SERIES], _SERIES_COLUMNS)),
}
_TAKE_NUMBERS = Prepared(
    sa.update(counters)
    .where(counters.c.name == "sequence")
    .values(value=counters.c.value + sa.bindparam("count"))
    .returning(counters.c.value)
)
_LAST_ID = Prepared(sa.select(sa.func.max(instances.c.id)))
_INSERT_INSTANCES = Prepared(
    sa.insert(instances),
    [
        *("series_id", "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "store_key", "size", "sha256"),
        *("xxh3", "stored_at", "created_sequence"),
        *_INSTANCE_COLUMNS,
    ],
)
_INSERT_CHANGES = Prepared(sa.insert(changes), list(changes.c.keys()))
_INSERT_METADATA = Prepared(sa.insert(instance_metadata), list(instance_metadata.c.keys()))
_MARK_DELETED = Prepared(
    sa.update(instances)
    .where(instances.c.id == sa.bindparam("row_id"))
    .values(deleted_sequence=sa.bindparam("number"), deleted_at=sa.bindparam("moment"))
)


def find(connection: sa.Connection, refs: Sequence[InstanceRef]) -> dict[InstanceRef, KnownInstance]:
    """The live instances among `refs`."""
    return {ref: known for ref, (known, _) in _find(connection, refs).items()}


def without_repeats(records: Sequence[InstanceRecord]) -> Iterator[list[InstanceRecord]]:
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


def add(connection: sa.Connection, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
    """Insert what is new, replace what may be replaced; one outcome a record, in order."""
    known = _find(connection, [record.ref for record in records])
    checksums = {ref: instance.sha256 for ref, (instance, _) in known.items()}
    fresh: list[InstanceRecord] = []
    outcomes: list[AddOutcome] = []
    for record in records:
        earlier = checksums.get(record.ref)
        if earlier == record.sha256:
            outcomes.append(AddOutcome.ALREADY_THERE)
        elif earlier is not None and not record.may_replace:
            outcomes.append(AddOutcome.CONFLICTING)
        else:
            checksums[record.ref] = record.sha256
            fresh.append(record)
            outcomes.append(AddOutcome.STORED if earlier is None else AddOutcome.REPLACED)
    if fresh:
        _insert(connection, fresh, {ref: id_ for ref, (_, id_) in known.items()})
    return outcomes


def mark_deleted(connection: sa.Connection, rows: Sequence[tuple[int, int, str]]) -> None:
    """Turn live rows, given as (internal id, series, SOP instance UID), into tombstones with a number each."""
    first = _take_numbers(connection, len(rows))
    now = _now()
    _MARK_DELETED.many(
        connection, [{"row_id": row[0], "number": number, "moment": now} for number, row in enumerate(rows, first)]
    )
    _record_changes(
        connection, [(number, row[1], row[2], ChangeAction.DELETE) for number, row in enumerate(rows, first)], now
    )
    left(connection, [(row[0], row[1]) for row in rows])


def _find(connection: sa.Connection, refs: Sequence[InstanceRef]) -> dict[InstanceRef, tuple[KnownInstance, int]]:
    """Live instances, with their internal ids. Identifiers travel as one JSON parameter, however many they are."""
    wanted = json.dumps([(ref.study_uid, ref.series_uid, ref.sop_instance_uid) for ref in refs])
    return {
        InstanceRef(study, series_uid, sop): (KnownInstance(sha256, size), id_)
        for study, series_uid, sop, sha256, size, id_ in _FIND.all(connection, {"wanted": wanted})
    }


def _take_numbers(connection: sa.Connection, count: int) -> int:
    """Reserve `count` numbers of the sequence and return the first.

    Taken after everything that may block, right before the rows are written: the counter row stays locked until the
    commit, so numbers become visible in their order.
    """
    return int(_TAKE_NUMBERS.one(connection, {"count": count})[0]) - count + 1


def _insert(connection: sa.Connection, records: Sequence[InstanceRecord], live_ids: dict[InstanceRef, int]) -> None:
    """`live_ids`: the rows that give way, among others."""
    parents = _parents(connection, records)
    first = _take_numbers(connection, len(records))
    now = _now()
    changed: list[tuple[int, int, str, ChangeAction]] = []
    outdated: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, ((_, series_id), record) in enumerate(zip(parents, records, strict=True), first):
        sop = record.ref.sop_instance_uid
        earlier = live_ids.get(record.ref)
        changed.append((number, series_id, sop, ChangeAction.CREATE if earlier is None else ChangeAction.UPDATE))
        if earlier is not None:
            outdated.append({"row_id": earlier, "number": number, "moment": now})
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
            | {name: record.header.attributes.get(name) for name in _INSTANCE_COLUMNS}
        )
    if outdated:
        _MARK_DELETED.many(connection, outdated)
    _INSERT_INSTANCES.many(connection, rows)
    _record_changes(connection, changed, now)
    # The rows went in by order, nobody else's between them while the counter is locked: theirs are the last ids.
    first_id = _LAST_ID.one(connection, {})[0] - len(records) + 1
    _count(connection, parents, [action is ChangeAction.CREATE for _, _, _, action in changed], first_id)
    _insert_metadata(connection, records, parents, first_id)


def _count(
    connection: sa.Connection, parents: Sequence[tuple[int, int]], are_more: Sequence[bool], first_id: int
) -> None:
    """Tell each study and series of its new instances; one that replaces another is no more than before."""
    for level, owners in (
        (Level.STUDY, [study for study, _ in parents]),
        (Level.SERIES, [each for _, each in parents]),
    ):
        newest = {owner: first_id + place for place, owner in enumerate(owners)}
        more = Counter(owner for owner, is_more in zip(owners, are_more, strict=True) if is_more)
        for owner, instance_id in newest.items():
            arrived(connection, level, owner, more[owner], instance_id)


def _parents(connection: sa.Connection, records: Sequence[InstanceRecord]) -> list[tuple[int, int]]:
    """The study and the series of each record; their rows are made or brought up to date."""
    by_study = {record.ref.study_uid: record for record in records}
    by_series = {(record.ref.study_uid, record.ref.series_uid): record for record in records}
    study_ids = {
        study: _row_id(connection, Level.STUDY, {"study_uid": study}, record) for study, record in by_study.items()
    }
    series_ids = {
        (study, series_uid): _row_id(
            connection, Level.SERIES, {"study_id": study_ids[study], "series_uid": series_uid}, record
        )
        for (study, series_uid), record in by_series.items()
    }
    return [
        (study_ids[record.ref.study_uid], series_ids[record.ref.study_uid, record.ref.series_uid]) for record in records
    ]


def _row_id(connection: sa.Connection, level: Level, keys: dict[str, Any], record: InstanceRecord) -> int:
    """A row that says what it said before is left alone: writing it anew would write all of its indexes."""
    columns = columns_at(level, record.header.attributes)
    known = _KNOWN[level].all(connection, keys)
    if known and known[0][1:] == tuple(columns.values()):
        return int(known[0][0])
    row_id = int(_UPSERT[level].one(connection, keys | columns)[0])
    replace_values(connection, level, row_id, columns)
    return row_id


def _insert_metadata(
    connection: sa.Connection, records: Sequence[InstanceRecord], parents: Sequence[tuple[int, int]], first_id: int
) -> None:
    found = [
        (id_, record.metadata, parent)
        for id_, (record, parent) in enumerate(zip(records, parents, strict=True), first_id)
        if record.metadata is not None
    ]
    if found:
        rows = [{"instance_id": id_, "dicom_json": each.dicom_json, "layout": each.layout} for id_, each, _ in found]
        _INSERT_METADATA.many(connection, rows)
        index_tags(connection, [(id_, *parent, each.dicom_json) for id_, each, parent in found])


def _record_changes(
    connection: sa.Connection, entries: Sequence[tuple[int, int, str, ChangeAction]], now: datetime
) -> None:
    """(number, series, SOP instance UID, action) of each change."""
    _INSERT_CHANGES.many(
        connection,
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


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
