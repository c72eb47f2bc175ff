"""Write a migration from what the tables say and the versions do not: ``python -m control_plane.migrations TEXT``."""

import re
from datetime import UTC, datetime

import click
from alembic import command
from sqlalchemy import create_engine

from control_plane.migrations import config

MAX_REVISION = 32


@click.command()
@click.argument("message")
def write(message: str) -> None:
    slug = re.sub(r"\W+", "_", message.lower()).strip("_")
    revision = f"{datetime.now(UTC):%Y%m%d}_{slug}"[:MAX_REVISION].rstrip("_")
    with create_engine("sqlite://").begin() as connection:
        settings = config(connection)
        command.upgrade(settings, "head")
        command.revision(settings, message, autogenerate=True, rev_id=revision)


if __name__ == "__main__":
    write()
