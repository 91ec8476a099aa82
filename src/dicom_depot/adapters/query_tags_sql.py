"""The extended query tags in SQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC

import sqlalchemy as sa

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_search_values import index_tag, tags
from dicom_depot.adapters.operation_limits import refuse_too_many
from dicom_depot.adapters.operations_sql import insert_operation
from dicom_depot.adapters.schema import (
    counters,
    extended_query_tag_errors,
    extended_query_tags,
    instances,
    operations,
    search_values,
    series,
    studies,
)
from dicom_depot.codec.search_values import loads
from dicom_depot.domain.errors import NotFound, ReindexRunning, ServiceUnavailable, TagBusy, TagExists
from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.domain.matching import words_name
from dicom_depot.domain.operation import ACTIVE_STATUSES, OperationId, OperationType
from dicom_depot.domain.query_tags import TAGS_MAX, NewQueryTag, QueryTag, TagStatus
from dicom_depot.domain.search import Level
from dicom_depot.ports import NewOperation, OperationLimits, TagError

_SWEPT_AT_ONCE = 5000
_tags = extended_query_tags
_errors = extended_query_tag_errors


class SqlQueryTags:
    """`ports.QueryTags` on a Database."""

    def __init__(self, database: Database, limits: OperationLimits | None = None) -> None:
        self._database = database
        self._limits = limits

    def all(self) -> list[QueryTag]:
        with self._database.read() as connection:
            return tags(connection)

    def add(self, wanted: Sequence[NewQueryTag], operation: NewOperation) -> OperationId:
        with self._database.write() as connection:
            _refuse_second(connection)
            present = {tag.path for tag in tags(connection)}
            for tag in wanted:
                if tag.path in present:
                    raise TagExists(f"The extended query tag {tag.path} is there already.", target=tag.path)
            if len(present) + len(wanted) > TAGS_MAX:
                raise ServiceUnavailable(
                    f"There are {len(present)} extended query tags and at most {TAGS_MAX} can be; remove some first."
                )
            refuse_too_many(connection, self._limits, operation.created_by)
            connection.execute(
                sa.insert(_tags),
                [
                    {
                        "path": tag.path,
                        "vr": tag.vr,
                        "private_creator": tag.private_creator,
                        "level": tag.level,
                        "status": TagStatus.ADDING,
                        "is_enabled": True,
                        "operation_id": operation.id,
                    }
                    for tag in wanted
                ],
            )
            cutoff = connection.execute(sa.select(counters.c.value).where(counters.c.name == "sequence")).scalar_one()
            insert_operation(connection, dataclasses.replace(operation, cutoff=cutoff))
            return operation.id

    def enable(self, path: str, *, is_enabled: bool) -> QueryTag:
        with self._database.write() as connection:
            _get(connection, path)
            connection.execute(sa.update(_tags).where(_tags.c.path == path).values(is_enabled=is_enabled))
            return _get(connection, path)

    def remove(self, path: str) -> None:
        with self._database.write() as connection:
            tag = _get(connection, path)
            if tag.operation_id is not None and tag.status is TagStatus.ADDING:
                running = sa.select(operations.c.id).where(
                    operations.c.id == tag.operation_id, operations.c.status.in_(sorted(ACTIVE_STATUSES))
                )
                if connection.execute(running).first() is not None:
                    raise TagBusy(
                        f"The extended query tag {path} is being added by operation {tag.operation_id}; wait for its "
                        "end, or cancel it.",
                        target=path,
                    )
            connection.execute(sa.delete(_tags).where(_tags.c.path == path))
        self.sweep()

    def errors(self, path: str, limit: int, offset: int) -> list[TagError]:
        with self._database.read() as connection:
            tag = _get(connection, path)
            rows = connection.execute(
                sa.select(
                    studies.c.study_uid,
                    series.c.series_uid,
                    instances.c.sop_instance_uid,
                    _errors.c.occurred_at,
                    _errors.c.message,
                )
                .select_from(
                    sa.join(_errors, instances, instances.c.id == _errors.c.instance_id)
                    .join(series, series.c.id == instances.c.series_id)
                    .join(studies, studies.c.id == series.c.study_id)
                )
                .where(_errors.c.tag_id == tag.id)
                .order_by(_errors.c.instance_id)
                .limit(limit)
                .offset(offset)
            )
            return [TagError(InstanceRef(*row[:3]), row[3].replace(tzinfo=UTC), row[4]) for row in rows]

    def index(self, operation_id: OperationId, contents: Mapping[int, bytes]) -> int:
        with self._database.write() as connection:
            wanted = [tag for tag in tags(connection) if tag.operation_id == operation_id]
            rows = connection.execute(
                sa.select(instances.c.id, series.c.id, studies.c.id, series.c.newest_id, studies.c.newest_id)
                .select_from(instances.join(series).join(studies))
                .where(instances.c.id.in_(list(contents)), instances.c.deleted_sequence == 0)
                .order_by(instances.c.id)
            ).all()
            for instance_id, series_id, study_id, newest_of_series, newest_of_study in rows:
                content = loads(contents[instance_id])
                # What a study or series says is what its newest instance says: the others must not speak for it.
                owners = {Level.INSTANCE: instance_id}
                if instance_id == newest_of_series:
                    owners[Level.SERIES] = series_id
                if instance_id == newest_of_study:
                    owners[Level.STUDY] = study_id
                for tag in wanted:
                    if tag.level in owners:
                        index_tag(connection, tag, owners[tag.level], instance_id, content)
            return len(rows)

    def complete(self, operation_id: OperationId) -> None:
        with self._database.write() as connection:
            connection.execute(
                sa.update(_tags).where(_tags.c.operation_id == operation_id).values(status=TagStatus.READY)
            )

    def sweep(self) -> int:
        swept = 0
        for name in self._orphans():
            key = sa.tuple_(search_values.c.name, search_values.c.value, search_values.c.owner_id)
            some = (
                sa.select(search_values.c.name, search_values.c.value, search_values.c.owner_id)
                .where(search_values.c.name == name)
                .limit(_SWEPT_AT_ONCE)
            )
            swept += self._sweep(sa.delete(search_values).where(key.in_(some)))
        with self._database.read() as connection:
            ids = sa.select(_tags.c.id)
            orphans = list(
                connection.execute(sa.select(_errors.c.tag_id).where(_errors.c.tag_id.not_in(ids)).distinct()).scalars()
            )
        for tag_id in orphans:
            swept += self._sweep(sa.delete(_errors).where(_errors.c.tag_id == tag_id))
        return swept

    def _orphans(self) -> list[str]:
        """The names of values whose tag is gone. Found by leaps from name to name, however many values each has."""
        found: list[str] = []
        with self._database.read() as connection:
            present = {name for tag in tags(connection) for name in _names(tag)}
            after = "tag:"
            while True:
                following = sa.select(search_values.c.name).where(
                    search_values.c.name > after, search_values.c.name < "tag;"
                )
                name = connection.execute(following.order_by(search_values.c.name).limit(1)).scalar()
                if name is None:
                    return found
                after = name
                if name not in present:
                    found.append(name)

    def _sweep(self, statement: sa.Delete) -> int:
        """Run until nothing is left, each time in a transaction of its own: others write in between."""
        swept = 0
        while True:
            with self._database.write() as connection:
                count = connection.execute(statement).rowcount
            swept += count
            if not count:
                return swept


def _names(tag: QueryTag) -> tuple[str, str]:
    return tag.attribute.column, words_name(tag.attribute.column)


def _get(connection: sa.Connection, path: str) -> QueryTag:
    for tag in tags(connection):
        if tag.path == path:
            return tag
    raise NotFound(f"There is no extended query tag {path}.", target="tagPath")


def _refuse_second(connection: sa.Connection) -> None:
    running = sa.select(operations.c.id).where(
        operations.c.type == OperationType.REINDEX, operations.c.status.in_(sorted(ACTIVE_STATUSES))
    )
    operation_id = connection.execute(running).scalar()
    if operation_id is not None:
        raise ReindexRunning(
            f"Operation {operation_id} is adding extended query tags; add more when it has ended.",
            operation_id=operation_id,
        )
