"""The change feed in SQL. Rows are written by `index_sql`, in the transaction of the change itself."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.schema import changes, instances, series, studies
from dicom_depot.domain.identifiers import InstanceRef, Uid
from dicom_depot.ports import Change, ChangeAction, ChangeState


class SqlChangeFeed:
    """`ports.ChangeFeed` on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def changes(
        self, after: int, limit: int, since: datetime | None = None, before: datetime | None = None
    ) -> list[Change]:
        if since is None and before is None:
            with self._database.read() as connection:
                return _read(connection, _ENTRIES.where(changes.c.sequence > after).limit(limit))
        condition: sa.ColumnElement[bool] = sa.true()
        if since is not None:
            condition &= changes.c.occurred_at >= _naive(since)
        if before is not None:
            condition &= changes.c.occurred_at < _naive(before)
        # A writer takes its time before it commits. Whoever holds the writers' turn has seen all of them end, and later
        # ones take later times: nothing can still appear before the end of a window that has passed.
        with self._database.write() as connection:
            return _read(connection, _ENTRIES.where(condition).offset(after).limit(limit))

    def latest_change(self) -> Change | None:
        with self._database.read() as connection:
            found = _read(connection, _ENTRIES.order_by(None).order_by(changes.c.sequence.desc()).limit(1))
        return found[0] if found else None


def _read(connection: sa.Connection, statement: sa.Select[Any]) -> list[Change]:
    return [
        Change(
            row.sequence,
            InstanceRef(Uid(row.study_uid), Uid(row.series_uid), Uid(row.sop_instance_uid)),
            ChangeAction(row.action),
            _state(row.sequence, row.live_sequence),
            row.occurred_at.replace(tzinfo=UTC),
            row.live_id if row.live_sequence == row.sequence else None,
        )
        for row in connection.execute(statement)
    ]


_ENTRIES: sa.Select[Any] = (
    sa.select(
        changes.c.sequence,
        studies.c.study_uid,
        series.c.series_uid,
        changes.c.sop_instance_uid,
        changes.c.action,
        changes.c.occurred_at,
        instances.c.id.label("live_id"),
        instances.c.created_sequence.label("live_sequence"),
    )
    .select_from(
        changes.join(series)
        .join(studies)
        .outerjoin(
            instances,
            (instances.c.series_id == changes.c.series_id)
            & (instances.c.sop_instance_uid == changes.c.sop_instance_uid)
            & (instances.c.deleted_sequence == 0),
        )
    )
    .order_by(changes.c.sequence)
)


def _state(sequence: int, live_sequence: int | None) -> ChangeState:
    """By what is live under the same identifiers now: nothing, this very version, or a later one."""
    if live_sequence is None:
        return ChangeState.DELETED
    return ChangeState.CURRENT if live_sequence == sequence else ChangeState.REPLACED


def _naive(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None)
