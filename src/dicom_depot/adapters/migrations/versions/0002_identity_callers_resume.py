"""Switches, the creator of an operation, and how often it was resumed."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("operations", sa.Column("generation", sa.Integer(), server_default="1", nullable=False))
    op.add_column(
        "operations", sa.Column("created_by", sa.String(length=512), server_default=sa.text("''"), nullable=False)
    )
    op.create_table(
        "switches",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("is_on", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_switches")),
    )
