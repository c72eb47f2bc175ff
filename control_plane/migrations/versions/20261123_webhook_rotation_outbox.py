"""webhook rotation, outbox index"""

import sqlalchemy as sa
from alembic import op

revision = "20261123_webhook_rotation_outbox"
down_revision = "20261123_webhook_health_accrual"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("outbox", schema=None) as batch_op:
        batch_op.alter_column(
            "channel", existing_type=sa.VARCHAR(length=16), type_=sa.String(length=24), existing_nullable=False
        )
        batch_op.create_index(batch_op.f("ix_outbox_target_created_at"), ["target", "created_at"], unique=False)

    with op.batch_alter_table("webhooks", schema=None) as batch_op:
        batch_op.add_column(sa.Column("previous_secret", sa.String(length=128), nullable=True))
        batch_op.add_column(sa.Column("previous_secret_until", sa.DateTime(timezone=True), nullable=True))
