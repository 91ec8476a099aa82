"""Searching the index in SQL.

A query becomes nested `id IN (SELECT ...)`: conditions on studies within those on series within those on instances.
It is answered in one of two ways, because no database without statistics knows which one suits:

    gather   let the indexes find all ids, sort them, cut out the page: for whatever matches few
    walk     go from the newest row to the oldest, look up each one's parents, stop when the page is full: for
             whatever matches very many

Gathering is tried first and given up after GATHERED_MAX ids, so that neither costs more than the other could save.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.schema import counters, instances, search_values, series, studies
from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.domain.matching import words_name
from dicom_depot.domain.search import (
    MODALITIES_IN_STUDY,
    Attribute,
    Between,
    Condition,
    Exactly,
    Found,
    Held,
    Level,
    Match,
    Pattern,
    SearchQuery,
    StudyCounts,
    Words,
)
from dicom_depot.ports import SearchPage

GATHERED_MAX = 20_000

_TABLES = {Level.STUDY: studies, Level.SERIES: series, Level.INSTANCE: instances}
_LAST_CHARACTER = "\U0010ffff"
_Condition = sa.ColumnElement[bool]


class SqlSearch:
    """`ports.SearchIndex` on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def newest(self, level: Level) -> int:
        with self._database.read() as connection:
            return int(connection.execute(sa.select(sa.func.max(_TABLES[level].c.id))).scalar_one() or 0)

    def page(self, query: SearchQuery, limit: int, offset: int, newest: int | None = None) -> SearchPage:
        with self._database.read() as connection:
            ids, remaining = _page(connection, query, limit, offset, newest)
            return SearchPage(_found(connection, query.level, ids), remaining)

    def study_counts(self, study_ids: Sequence[int]) -> dict[int, StudyCounts]:
        wanted = sorted(set(study_ids))
        modalities: dict[int, set[str]] = defaultdict(set)
        series_count: dict[int, int] = defaultdict(int)
        with self._database.read() as connection:
            rows = connection.execute(
                sa.select(series.c.study_id, series.c.modality, sa.func.count())
                .where(series.c.study_id.in_(wanted), series.c.instance_count > 0)
                .group_by(series.c.study_id, series.c.modality)
            )
            for study_id, modality, count in rows:
                series_count[study_id] += count
                if modality is not None:
                    modalities[study_id].add(modality.upper())  # as code strings are (PS3.5 section 6.2)
            instance_counts = connection.execute(
                sa.select(studies.c.id, studies.c.instance_count).where(studies.c.id.in_(wanted))
            )
            return {
                id_: StudyCounts(series_count[id_], count, tuple(sorted(modalities[id_])))
                for id_, count in instance_counts
            }

    def snapshot(self, query: SearchQuery) -> tuple[int, array[int]]:
        with self._database.read() as connection:
            cutoff = connection.execute(sa.select(counters.c.value).where(counters.c.name == "sequence")).scalar_one()
            conditions = _series_conditions(query, is_walk=False)
            of_instances = _own(query, Level.INSTANCE, is_walk=False)
            if of_instances:
                met_in = sa.select(instances.c.series_id).where(instances.c.deleted_sequence == 0, *of_instances)
                conditions.append(series.c.id.in_(met_in))
            statement = sa.select(series.c.id).where(*conditions)
            return int(cutoff), array("q", sorted(connection.execute(statement).scalars()))


def _page(
    connection: sa.Connection, query: SearchQuery, limit: int, offset: int, newest: int | None
) -> tuple[list[int], int | None]:
    """The ids of a page, newest first, and how many more there are: None where there are more than are counted."""
    key = _TABLES[query.level].c.id
    bound = [] if newest is None else [key <= newest]
    if query.conditions:
        statement = sa.select(key).where(*_conditions(query, is_walk=False), *bound).limit(GATHERED_MAX + 1)
        ids = sorted(connection.execute(statement).scalars(), reverse=True)
        if len(ids) <= GATHERED_MAX:
            return ids[offset : offset + limit], max(0, len(ids) - offset - limit)
        begin = _beginning(connection, query)
        if begin is not None:
            bound = [key <= (begin if newest is None else min(begin, newest))]
    statement = (
        sa.select(key)
        .where(*_conditions(query, is_walk=True), *bound)
        .order_by(key.desc())
        .limit(limit + 1)
        .offset(offset)
    )
    ids = list(connection.execute(statement).scalars())
    return ids[:limit], None if len(ids) > limit else 0


def _beginning(connection: sa.Connection, query: SearchQuery) -> int | None:
    """The newest instance of all series that match: a walk over instances need not begin before it."""
    if query.level is not Level.INSTANCE or all(each.attribute.level is Level.INSTANCE for each in query.conditions):
        return None
    statement = sa.select(sa.func.max(series.c.newest_id)).where(*_series_conditions(query, is_walk=False))
    begin: int | None = connection.execute(statement).scalar_one()
    return begin


def _conditions(query: SearchQuery, *, is_walk: bool) -> list[_Condition]:
    match query.level:
        case Level.STUDY:
            return _study_conditions(query, is_walk=is_walk)
        case Level.SERIES:
            return _series_conditions(query, is_walk=is_walk)
        case Level.INSTANCE:
            return instance_conditions(query, is_walk=is_walk)


def _study_conditions(query: SearchQuery, *, is_walk: bool) -> list[_Condition]:
    return [studies.c.instance_count > 0, *_own(query, Level.STUDY, is_walk=is_walk)]


def _series_conditions(query: SearchQuery, *, is_walk: bool) -> list[_Condition]:
    conditions = [series.c.instance_count > 0, *_own(query, Level.SERIES, is_walk=is_walk)]
    if any(each.attribute.level is Level.STUDY for each in query.conditions):
        parents = sa.select(studies.c.id).where(*_study_conditions(query, is_walk=False))
        conditions.append(_column(series.c.study_id, is_walk=is_walk).in_(parents))
    return conditions


def instance_conditions(query: SearchQuery, *, is_walk: bool) -> list[_Condition]:
    conditions = [instances.c.deleted_sequence == 0, *_own(query, Level.INSTANCE, is_walk=is_walk)]
    if any(each.attribute.level is not Level.INSTANCE for each in query.conditions):
        parents = sa.select(series.c.id).where(*_series_conditions(query, is_walk=False))
        conditions.append(_column(instances.c.series_id, is_walk=is_walk).in_(parents))
    return conditions


def _own(query: SearchQuery, level: Level, *, is_walk: bool) -> list[_Condition]:
    return [condition_on(each, is_walk=is_walk) for each in query.conditions if each.attribute.level is level]


def condition_on(condition: Condition, *, is_walk: bool = False) -> _Condition:
    """One condition on the rows of its attribute's level."""
    attribute, match = condition.attribute, condition.match
    table = _TABLES[attribute.level]
    if attribute.held is Held.COLUMN:
        return _matches(_column(table.c[attribute.column], is_walk=is_walk), match)
    key = _column(table.c.id, is_walk=is_walk)
    if attribute == MODALITIES_IN_STUDY:
        owners = sa.select(series.c.study_id).where(series.c.instance_count > 0, _matches(series.c.modality, match))
        return key.in_(owners)
    if isinstance(match, Words):
        return sa.and_(*(key.in_(_owners_of_word(attribute, word)) for word in match.beginnings))
    owners = sa.select(search_values.c.owner_id).where(
        search_values.c.name == attribute.column, _matches(search_values.c.value, match)
    )
    return key.in_(owners)


def looked_up(condition: Condition) -> _Condition:
    """One condition on instances, for a statement that finds few of them otherwise and runs often: it costs a look at
    each of these, and no more.
    """
    attribute, match = condition.attribute, condition.match
    if attribute.held is Held.COLUMN:
        return condition_on(condition, is_walk=True)
    value = search_values.c.value
    if isinstance(match, Words):
        words = words_name(attribute.column)
        return sa.and_(*(_has_value(words, *_begins_with(value, word)) for word in match.beginnings))
    return _has_value(attribute.column, _matches(value, match))


def _has_value(name: str, *conditions: _Condition) -> _Condition:
    values = sa.exists().where(search_values.c.name == name, search_values.c.owner_id == instances.c.id, *conditions)
    return values.correlate(instances)


def _owners_of_word(attribute: Attribute, beginning: str) -> sa.Select[tuple[int]]:
    return sa.select(search_values.c.owner_id).where(
        search_values.c.name == words_name(attribute.column), *_begins_with(search_values.c.value, beginning)
    )


def _matches(column: sa.ColumnElement[Any], match: Match) -> _Condition:
    match match:
        case Exactly((value,)):
            return column == value
        case Exactly(values):
            return column.in_(values)
        case Between(low, high):
            ends = [] if low is None else [column >= low]
            return sa.and_(*ends, *([] if high is None else [column <= high]))
        case Pattern(text):
            beginning = text.replace("?", "*").partition("*")[0]
            pattern = text.translate(_LIKE)
            return sa.and_(*_begins_with(column, beginning), column.like(pattern, escape="\\"))
        case Words():
            raise TypeError("words are of names, and the words of names are held apart")


_LIKE = str.maketrans({"\\": "\\\\", "%": "\\%", "_": "\\_", "*": "%", "?": "_"})


def _begins_with(column: sa.ColumnElement[Any], beginning: str) -> list[_Condition]:
    """As a range, which an index can serve."""
    return [column >= beginning, column < beginning + _LAST_CHARACTER] if beginning else []


def _column(column: sa.Column[Any], *, is_walk: bool) -> sa.ColumnElement[Any]:
    """The column; behind a plus sign, which changes nothing but that no index is looked for, where rows are walked."""
    if not is_walk:
        return column
    return sa.type_coerce(sa.literal_column(f"+{column.table.name}.{column.name}"), column.type)


def _found(connection: sa.Connection, level: Level, ids: Sequence[int]) -> list[Found]:
    """What the rows of `ids` are, in that order."""
    if not ids:
        return []
    key = _TABLES[level].c.id
    speaker = instances.c.id == (studies.c.newest_id if level is Level.STUDY else series.c.newest_id)
    tables = {
        Level.STUDY: studies.join(instances, speaker).join(series, series.c.id == instances.c.series_id),
        Level.SERIES: series.join(studies).join(instances, speaker),
        Level.INSTANCE: instances.join(series).join(studies),
    }[level]
    rows = connection.execute(
        sa.select(
            studies.c.id,
            studies.c.study_uid,
            series.c.series_uid,
            instances.c.sop_instance_uid,
            studies.c.newest_id,
            series.c.newest_id,
            instances.c.id,
            series.c.instance_count,
            key,
        )
        .select_from(tables)
        .where(key.in_(ids))
    )
    by_id = {row[8]: Found(row[0], InstanceRef(row[1], row[2], row[3]), row[4], row[5], row[6], row[7]) for row in rows}
    return [by_id[id_] for id_ in ids]
