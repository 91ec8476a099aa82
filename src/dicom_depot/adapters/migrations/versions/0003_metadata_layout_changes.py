"""Where bulk data lies, and the change feed, which begins with what the instances' rows still tell."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    # No release has written metadata before this one: the table is empty.
    with op.batch_alter_table("instance_metadata") as batch:
        batch.add_column(sa.Column("layout", sa.LargeBinary(), nullable=False))
    op.create_table(
        "changes",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("series_id", _big_id, nullable=False),
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=8), nullable=False),
        sa.Column("occurred_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["series_id"], ["series.id"], name=op.f("fk_changes_series_id")),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_changes")),
    )
    op.create_index(op.f("ix_changes_occurred_at"), "changes", ["occurred_at"], unique=False)
    for action, sequence, moment in (
        ("Create", "created_sequence", "stored_at"),
        ("Delete", "deleted_sequence", "deleted_at"),
    ):
        op.execute(
            "INSERT INTO changes (sequence, series_id, sop_instance_uid, action, occurred_at)"
            f" SELECT {sequence}, series_id, sop_instance_uid, '{action}', {moment} FROM instances"
            f" WHERE {sequence} <> 0"
        )
