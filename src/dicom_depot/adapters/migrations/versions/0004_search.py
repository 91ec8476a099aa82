"""What search needs: indexes, values in the form in which they are compared, live counts, extended query tags."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from dicom_depot.codec.search_values import columns_of, loads
from dicom_depot.domain.matching import column_form, values_apart
from dicom_depot.domain.search import Attribute, Level, attributes_of

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_BATCH = 1000
_INDEXED = {
    "studies": (
        *("study_date", "study_time", "accession_number", "study_description", "patient_id", "patient_birth_date"),
        *("patient_sex", "dicom_study_id"),
    ),
    "series": (
        *("series_uid", "modality", "series_description", "manufacturer_model_name", "series_number"),
        *("performed_procedure_step_start_date", "performed_procedure_step_start_time"),
    ),
    "instances": ("sop_instance_uid", "sop_class_uid", "instance_number"),
}


def upgrade() -> None:
    op.add_column("series", sa.Column("scheduled_procedure_step_id", sa.Text()))
    op.add_column("series", sa.Column("requested_procedure_id", sa.Text()))
    for table in ("studies", "series"):
        op.add_column(table, sa.Column("instance_count", sa.Integer(), nullable=False, server_default="0"))
        op.add_column(table, sa.Column("newest_id", _big_id, nullable=False, server_default="0"))
    op.create_table(
        "search_values",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("owner_id", _big_id, nullable=False),
        sa.PrimaryKeyConstraint("name", "value", "owner_id", name=op.f("pk_search_values")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_search_values_name_owner_id", "search_values", ["name", "owner_id"])
    op.create_table(
        "extended_query_tags",
        sa.Column("id", _big_id, nullable=False),
        sa.Column("path", sa.String(length=8), nullable=False),
        sa.Column("vr", sa.String(length=2), nullable=False),
        sa.Column("private_creator", sa.String(length=64)),
        sa.Column("level", sa.String(length=8), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("is_enabled", sa.Boolean(), nullable=False),
        sa.Column("error_count", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("operation_id", sa.String(length=32)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_extended_query_tags")),
        sa.UniqueConstraint("path", name=op.f("uq_extended_query_tags_path")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "extended_query_tag_errors",
        sa.Column("tag_id", _big_id, nullable=False),
        sa.Column("instance_id", _big_id, nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("occurred_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("tag_id", "instance_id", name=op.f("pk_extended_query_tag_errors")),
    )
    op.add_column("operations", sa.Column("query", sa.JSON()))
    op.add_column("operations", sa.Column("series_ids", sa.LargeBinary()))
    connection = op.get_bind()
    _count_live(connection)
    _bring_into_form(connection, "studies", Level.STUDY)
    _bring_into_form(connection, "series", Level.SERIES)
    for table, columns in _INDEXED.items():
        for column in columns:
            op.create_index(f"ix_{table}_{column}", table, [column])


def _count_live(connection: sa.Connection) -> None:
    live = "SELECT {} FROM instances WHERE instances.series_id = series.id AND deleted_sequence = 0"
    below = "SELECT {} FROM series WHERE series.study_id = studies.id"
    for table, rows, count, newest in (
        ("series", live, "count(*)", "coalesce(max(id), 0)"),
        ("studies", below, "coalesce(sum(instance_count), 0)", "coalesce(max(newest_id), 0)"),
    ):
        connection.execute(
            sa.text(f"UPDATE {table} SET instance_count = ({rows.format(count)}), newest_id = ({rows.format(newest)})")
        )


def _bring_into_form(connection: sa.Connection, table: str, level: Level) -> None:
    attributes = attributes_of(level)
    columns = ", ".join(attribute.column for attribute in attributes)
    last = 0
    while True:
        rows = connection.execute(
            sa.text(f"SELECT id, newest_id, {columns} FROM {table} WHERE id > :last ORDER BY id LIMIT {_BATCH}"),
            {"last": last},
        )
        found = [dict(row) for row in rows.mappings()]
        if not found:
            return
        last = found[-1]["id"]
        for values in found:
            _write_row(
                connection, table, level, attributes, values | _told(connection, values["newest_id"], attributes)
            )


def _write_row(
    connection: sa.Connection, table: str, level: Level, attributes: tuple[Attribute, ...], values: dict[str, Any]
) -> None:
    formed = {each.column: column_form(each, values[each.column]) for each in attributes}
    settings = ", ".join(f"{name} = :{name}" for name in formed)
    connection.execute(sa.text(f"UPDATE {table} SET {settings} WHERE id = :id"), formed | {"id": values["id"]})
    apart = [{"name": name, "value": value, "owner": values["id"]} for name, value in values_apart(level, formed)]
    if apart:
        connection.execute(
            sa.text("INSERT INTO search_values (name, value, owner_id) VALUES (:name, :value, :owner)"), apart
        )


def _told(connection: sa.Connection, instance_id: int, attributes: tuple[Attribute, ...]) -> dict[str, Any]:
    """What an instance says, where that is known: rows said what was stored last, whether or not it is live."""
    packed = connection.execute(
        sa.text("SELECT dicom_json FROM instance_metadata WHERE instance_id = :id"), {"id": instance_id}
    ).scalar_one_or_none()
    if packed is None:
        return {}
    columns = columns_of(loads(packed))
    return {each.column: columns[each.column] for each in attributes}
