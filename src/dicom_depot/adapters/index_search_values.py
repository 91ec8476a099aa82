"""What searches look at, kept in step with what is live: counts, the newest instance of each study and series, the
columns that it fills, and the values that are held apart. All within a transaction of the caller's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicom_depot.adapters.prepared import Prepared
from dicom_depot.adapters.schema import (
    extended_query_tag_errors,
    extended_query_tags,
    instance_metadata,
    instances,
    search_values,
    series,
    studies,
)
from dicom_depot.codec.search_values import DicomJson, columns_of, loads, tag_values
from dicom_depot.domain.instance import AttributeValues
from dicom_depot.domain.matching import column_form, value_rows, values_apart, words_name
from dicom_depot.domain.query_tags import QueryTag, TagStatus
from dicom_depot.domain.search import Held, Level, attributes_of

_TABLES = {Level.STUDY: studies, Level.SERIES: series}
_ATTRIBUTES = {level: attributes_of(level) for level in Level}
_APART = {
    level: [
        name
        for each in _ATTRIBUTES[level]
        if each.held is Held.VALUES
        for name in ((each.column, words_name(each.column)) if each.vr == "PN" else (each.column,))
    ]
    for level in Level
}

_DELETE_VALUES = Prepared(
    sa.delete(search_values).where(
        search_values.c.name == sa.bindparam("of"), search_values.c.owner_id == sa.bindparam("owner")
    )
)
_INSERT_VALUES = Prepared(insert(search_values).on_conflict_do_nothing(), ["name", "value", "owner_id"])
_ARRIVED = {
    level: Prepared(
        sa.update(table)
        .where(table.c.id == sa.bindparam("row_id"))
        .values(instance_count=table.c.instance_count + sa.bindparam("more"), newest_id=sa.bindparam("newest"))
    )
    for level, table in _TABLES.items()
}
_LEFT_SERIES = Prepared(
    sa.update(series)
    .where(series.c.id == sa.bindparam("row_id"))
    .values(instance_count=series.c.instance_count - sa.bindparam("fewer"))
    .returning(series.c.study_id, series.c.newest_id)
)
_LEFT_STUDY = Prepared(
    sa.update(studies)
    .where(studies.c.id == sa.bindparam("row_id"))
    .values(instance_count=studies.c.instance_count - sa.bindparam("fewer"))
    .returning(studies.c.newest_id)
)
_NEWEST = {
    Level.SERIES: Prepared(
        sa.select(sa.func.coalesce(sa.func.max(instances.c.id), 0)).where(
            instances.c.series_id == sa.bindparam("row_id"), instances.c.deleted_sequence == 0
        )
    ),
    Level.STUDY: Prepared(
        sa.select(sa.func.coalesce(sa.func.max(series.c.newest_id), 0)).where(
            series.c.study_id == sa.bindparam("row_id")
        )
    ),
}
_METADATA = Prepared(
    sa.select(instance_metadata.c.dicom_json).where(instance_metadata.c.instance_id == sa.bindparam("instance"))
)
_TAG_COLUMNS = [
    extended_query_tags.c[name]
    for name in ("id", "path", "vr", "private_creator", "level", "status", "is_enabled", "error_count", "operation_id")
]
_TAGS = Prepared(sa.select(*_TAG_COLUMNS).order_by(extended_query_tags.c.id))


def columns_at(level: Level, values: AttributeValues) -> AttributeValues:
    """The columns of a row at `level`, in the form in which they are compared."""
    return {each.column: column_form(each, values.get(each.column)) for each in _ATTRIBUTES[level]}


def replace_values(connection: sa.Connection, level: Level, owner_id: int, columns: AttributeValues) -> None:
    """Hold apart the values that a row's columns give."""
    _DELETE_VALUES.many(connection, [{"of": name, "owner": owner_id} for name in _APART[level]])
    insert_values(connection, owner_id, values_apart(level, columns))


def insert_values(connection: sa.Connection, owner_id: int, rows: Iterable[tuple[str, str]]) -> None:
    _INSERT_VALUES.many(connection, [{"name": name, "value": value, "owner_id": owner_id} for name, value in rows])


def arrived(connection: sa.Connection, level: Level, row_id: int, more: int, newest: int) -> None:
    """`more` instances are live below a row, of which `newest` is the newest one."""
    _ARRIVED[level].many(connection, [{"row_id": row_id, "more": more, "newest": newest}])


def left(connection: sa.Connection, gone: Sequence[tuple[int, int]]) -> None:
    """Instances, given as (internal id, series), are no longer live. Where the newest one is among them, its series and
    study become what the newest of the others says; the last one's go on saying what it said, unseen.
    """
    ids = {id_ for id_, _ in gone}
    fewer_of_study: Counter[int] = Counter()
    for series_id, fewer in Counter(series_id for _, series_id in gone).items():
        study_id, newest = _LEFT_SERIES.one(connection, {"row_id": series_id, "fewer": fewer})
        fewer_of_study[study_id] += fewer
        if newest in ids:
            _take_newest(connection, Level.SERIES, series_id)
    for study_id, fewer in fewer_of_study.items():
        (newest,) = _LEFT_STUDY.one(connection, {"row_id": study_id, "fewer": fewer})
        if newest in ids:
            _take_newest(connection, Level.STUDY, study_id)


def _take_newest(connection: sa.Connection, level: Level, row_id: int) -> None:
    table = _TABLES[level]
    (newest,) = _NEWEST[level].one(connection, {"row_id": row_id})
    connection.execute(sa.update(table).where(table.c.id == row_id).values(newest_id=newest))
    content = metadata_of(connection, newest)
    if content is not None:
        _say(connection, level, row_id, newest, content)


def back_filled(connection: sa.Connection, instance_ids: Sequence[int]) -> None:
    """Metadata of these instances was added: studies and series that they speak for say what it says."""
    for level, table in _TABLES.items():
        rows = connection.execute(sa.select(table.c.id, table.c.newest_id).where(table.c.newest_id.in_(instance_ids)))
        for row_id, instance_id in rows.all():
            content = metadata_of(connection, instance_id)
            if content is not None:
                _say(connection, level, row_id, instance_id, content)


def _say(connection: sa.Connection, level: Level, row_id: int, instance_id: int, content: DicomJson) -> None:
    """A study or series says what an instance says."""
    table, columns = _TABLES[level], columns_at(level, columns_of(content))
    connection.execute(sa.update(table).where(table.c.id == row_id).values(columns))
    replace_values(connection, level, row_id, columns)
    for tag in tags(connection):
        if tag.level is level:
            index_tag(connection, tag, row_id, instance_id, content)


def metadata_of(connection: sa.Connection, instance_id: int) -> DicomJson | None:
    """The DICOM JSON of an instance, where the index has it."""
    found = _METADATA.all(connection, {"instance": instance_id})
    return loads(found[0][0]) if found else None


def tags(connection: sa.Connection) -> list[QueryTag]:
    """The extended query tags, in the order in which they were added."""
    return [
        QueryTag(
            tag=int(path, 16),
            vr=vr,
            level=Level(level),
            private_creator=creator,
            id=id_,
            status=TagStatus(status),
            is_enabled=bool(is_enabled),
            error_count=error_count,
            operation_id=operation_id,
        )
        for id_, path, vr, creator, level, status, is_enabled, error_count, operation_id in _TAGS.all(connection, {})
    ]


def index_tags(connection: sa.Connection, stored: Sequence[tuple[int, int, int, bytes]]) -> None:
    """Index instances that were just stored, given as (internal id, study, series, packed JSON), in their order."""
    wanted = tags(connection)
    if not wanted:
        return
    last = {
        owner: place for place, row in enumerate(stored) for owner in ((Level.STUDY, row[1]), (Level.SERIES, row[2]))
    }
    for place, (instance_id, study_id, series_id, packed) in enumerate(stored):
        content = loads(packed)
        owners = {Level.STUDY: study_id, Level.SERIES: series_id, Level.INSTANCE: instance_id}
        for tag in wanted:
            owner = owners[tag.level]
            if last.get((tag.level, owner), place) == place:
                index_tag(connection, tag, owner, instance_id, content)


def index_tag(connection: sa.Connection, tag: QueryTag, owner_id: int, instance_id: int, content: DicomJson) -> bool:
    """Make the values of a tag those that an instance has; false, and noted as the tag's error, where they are none."""
    attribute = tag.attribute
    names = (attribute.column, words_name(attribute.column)) if tag.vr == "PN" else (attribute.column,)
    _DELETE_VALUES.many(connection, [{"of": name, "owner": owner_id} for name in names])
    values, error = tag_values(tag, content)
    if error is None:
        insert_values(connection, owner_id, value_rows(attribute.column, tag.vr, values))
        return True
    noted = connection.execute(
        insert(extended_query_tag_errors)
        .values(
            tag_id=tag.id,
            instance_id=instance_id,
            message=error,
            occurred_at=datetime.now(UTC).replace(tzinfo=None),
        )
        .on_conflict_do_nothing()
    )
    if noted.rowcount:
        connection.execute(
            sa.update(extended_query_tags)
            .where(extended_query_tags.c.id == tag.id)
            .values(
                error_count=extended_query_tags.c.error_count + 1,
                # The first error disables it; who enabled it since knows that there are some.
                is_enabled=extended_query_tags.c.is_enabled & (extended_query_tags.c.error_count > 0),
            )
        )
    return False


def forget_values(connection: sa.Connection, instance_ids: Sequence[int]) -> None:
    """Drop what is held of instances that are removed for good."""
    for tag in tags(connection):
        if tag.level is Level.INSTANCE:
            names = [tag.attribute.column, words_name(tag.attribute.column)]
            connection.execute(
                sa.delete(search_values).where(
                    search_values.c.name.in_(names), search_values.c.owner_id.in_(list(instance_ids))
                )
            )
