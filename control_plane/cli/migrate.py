import asyncio

import click

from control_plane.migrations import UnknownVersion, upgrade
from control_plane.settings import Settings


@click.command()
def migrate() -> None:
    """Bring the database to this version's tables. Repeating it is harmless."""
    try:
        click.echo(f"database is at {asyncio.run(upgrade(Settings.from_env()))}")
    except UnknownVersion as error:
        raise click.ClickException(str(error)) from error
