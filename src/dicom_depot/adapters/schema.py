"""The tables as SQLAlchemy sees them. Their history is in `migrations`; a test compares the two.

studies 1─* series 1─* instances 1─? instance_metadata        operations 1─* operation_chunks 1─* operation_failures
                 1─* changes                                  extended_query_tags 1─* extended_query_tag_errors

An instance row is live while `deleted_sequence` is 0; a deleted one keeps the number of its deletion until it is swept.
The unique index over (series, SOP instance, deleted_sequence) therefore allows one live row and any tombstones.

Rows of studies and series stay for good. What they say is what their newest live instance says, in the form in which
values are compared (`domain.matching`); they are searched while `instance_count` is not 0.
"""

from __future__ import annotations

import sqlalchemy as sa

from dicom_depot.domain.search import SEARCHABLE, Held, Level, attributes_of

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_time = sa.DateTime(timezone=False)
"""UTC without an offset; the adapters add it."""


def _attribute_columns(level: Level) -> list[sa.Column[object]]:
    return [
        sa.Column(
            attribute.column,
            sa.BigInteger() if attribute.is_integer else sa.Text(),
            index=attribute in SEARCHABLE and attribute.held is Held.COLUMN,
        )
        for attribute in attributes_of(level)
    ]


def _live() -> list[sa.Column[int]]:
    """How many live instances lie below a row, and the newest of them."""
    return [
        sa.Column("instance_count", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("newest_id", _big_id, nullable=False, server_default="0"),
    ]


studies = sa.Table(
    "studies",
    metadata,
    sa.Column("id", _big_id, primary_key=True),
    sa.Column("study_uid", sa.String(64), nullable=False, unique=True),
    *_attribute_columns(Level.STUDY),
    *_live(),
    sqlite_autoincrement=True,
)

series = sa.Table(
    "series",
    metadata,
    sa.Column("id", _big_id, primary_key=True),
    sa.Column("study_id", _big_id, sa.ForeignKey("studies.id"), nullable=False),
    sa.Column("series_uid", sa.String(64), nullable=False, index=True),
    *_attribute_columns(Level.SERIES),
    *_live(),
    sa.UniqueConstraint("study_id", "series_uid"),
    sqlite_autoincrement=True,
)

instances = sa.Table(
    "instances",
    metadata,
    sa.Column("id", _big_id, primary_key=True),
    sa.Column("series_id", _big_id, sa.ForeignKey("series.id"), nullable=False),
    sa.Column("sop_instance_uid", sa.String(64), nullable=False, index=True),
    sa.Column("sop_class_uid", sa.String(64), nullable=False, index=True),
    sa.Column("transfer_syntax_uid", sa.String(64), nullable=False),
    sa.Column("store_key", sa.String(128), nullable=False),
    sa.Column("size", sa.BigInteger(), nullable=False),
    sa.Column("sha256", sa.LargeBinary(32), nullable=False),
    sa.Column("xxh3", sa.BigInteger(), nullable=False),
    sa.Column("stored_at", _time, nullable=False),
    sa.Column("created_sequence", sa.BigInteger(), nullable=False),
    sa.Column("deleted_sequence", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("deleted_at", _time, index=True),
    *_attribute_columns(Level.INSTANCE),
    sa.UniqueConstraint("series_id", "sop_instance_uid", "deleted_sequence"),
    sqlite_autoincrement=True,
)

instance_metadata = sa.Table(
    "instance_metadata",
    metadata,
    sa.Column("instance_id", _big_id, sa.ForeignKey("instances.id"), primary_key=True),
    sa.Column("dicom_json", sa.LargeBinary(), nullable=False),
    sa.Column("layout", sa.LargeBinary(), nullable=False),
)
"""`domain.instance.Metadata` of an instance; beside the instances so that scans of those stay short."""

search_values = sa.Table(
    "search_values",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text(), primary_key=True),
    sa.Column("owner_id", _big_id, primary_key=True),
    sa.Index("ix_search_values_name_owner_id", "name", "owner_id"),
    sqlite_with_rowid=False,
)
"""Values of which a study, series or instance (`owner_id`) has any number: person names and their words, what stands in
sequences, extended query tags. `domain.matching` gives name and value.
"""

extended_query_tags = sa.Table(
    "extended_query_tags",
    metadata,
    sa.Column("id", _big_id, primary_key=True),
    sa.Column("path", sa.String(8), nullable=False, unique=True),
    sa.Column("vr", sa.String(2), nullable=False),
    sa.Column("private_creator", sa.String(64)),
    sa.Column("level", sa.String(8), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("is_enabled", sa.Boolean(), nullable=False),
    sa.Column("error_count", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("operation_id", sa.String(32)),
    sqlite_autoincrement=True,
)
"""Ids are never used twice: the values and errors of a tag that was deleted are swept later."""

extended_query_tag_errors = sa.Table(
    "extended_query_tag_errors",
    metadata,
    sa.Column("tag_id", _big_id, primary_key=True),
    sa.Column("instance_id", _big_id, primary_key=True),
    sa.Column("message", sa.Text(), nullable=False),
    sa.Column("occurred_at", _time, nullable=False),
)

changes = sa.Table(
    "changes",
    metadata,
    sa.Column("sequence", sa.BigInteger(), primary_key=True, autoincrement=False),
    sa.Column("series_id", _big_id, sa.ForeignKey("series.id"), nullable=False),
    sa.Column("sop_instance_uid", sa.String(64), nullable=False),
    sa.Column("action", sa.String(8), nullable=False),
    sa.Column("occurred_at", _time, nullable=False, index=True),
)
"""The change feed: one row for each number of the sequence, kept for good."""

counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger(), nullable=False),
)

operations = sa.Table(
    "operations",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("created_at", _time, nullable=False),
    sa.Column("updated_at", _time, nullable=False),
    sa.Column("ended_at", _time, index=True),
    sa.Column("cutoff", sa.BigInteger(), nullable=False),
    sa.Column("identifiers", sa.LargeBinary()),
    sa.Column("destination", sa.JSON(), nullable=False),
    sa.Column("sealed_secret", sa.Text()),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("idempotency_key", sa.String(255), unique=True),
    sa.Column("next_chunk", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("plan_resume", sa.Text()),
    sa.Column("is_planned", sa.Boolean(), nullable=False),
    sa.Column("total", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("exported", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("skipped", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("bytes_total", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("bytes_exported", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text()),
    sa.Column("log_href", sa.Text(), nullable=False),
    sa.Column("log_etag", sa.Text()),
    sa.Column("log_lines", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("log_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("log_written_at", _time, nullable=False),
    sa.Column("generation", sa.Integer(), nullable=False, server_default="1"),
    sa.Column("created_by", sa.String(512), nullable=False, server_default=sa.text("''")),
    sa.Column("query", sa.JSON()),
    sa.Column("series_ids", sa.LargeBinary()),
    sa.Index("ix_operations_created_at_id", "created_at", "id"),
)

operation_chunks = sa.Table(
    "operation_chunks",
    metadata,
    sa.Column("operation_id", sa.String(32), sa.ForeignKey("operations.id"), primary_key=True),
    sa.Column("number", sa.Integer(), primary_key=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("instance_ids", sa.LargeBinary(), nullable=False),
    sa.Column("count", sa.Integer(), nullable=False),
    sa.Column("bytes_total", sa.BigInteger(), nullable=False),
    sa.Column("exported", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("skipped", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("bytes_exported", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Index("ix_operation_chunks_operation_id_status", "operation_id", "status"),
)

CHUNK_STATUSES = ("planned", "running", "stopped", "done")
"""Not claimed yet; in flight; stopped early with its operation, counting what it did; complete."""

operation_failures = sa.Table(
    "operation_failures",
    metadata,
    sa.Column("operation_id", sa.String(32), primary_key=True),
    sa.Column("chunk", sa.Integer(), primary_key=True),
    sa.Column("position", sa.Integer(), primary_key=True),
    sa.Column("identifier", sa.String(200), nullable=False),
    sa.Column("code", sa.String(64), nullable=False),
    sa.Column("error", sa.Text(), nullable=False),
    sa.Column("occurred_at", _time, nullable=False),
    sa.ForeignKeyConstraint(["operation_id", "chunk"], ["operation_chunks.operation_id", "operation_chunks.number"]),
)

switches = sa.Table(
    "switches",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("is_on", sa.Boolean(), nullable=False),
)
"""What an operator switches on and off at run time, for all processes: the managed identity."""
