import asyncio

import click

from control_plane.migrations import upgrade
from control_plane.settings import Settings


@click.command()
def migrate() -> None:
    """Bring the database to this version's tables. Repeating it is harmless."""
    click.echo(f"database is at {asyncio.run(upgrade(Settings.from_env()))}")
