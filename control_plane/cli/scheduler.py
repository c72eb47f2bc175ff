import click

from control_plane.cli import parts
from control_plane.settings import Settings


@click.command()
def scheduler() -> None:
    """Run the scheduler alone. Several may run; one acts, the others stand by."""
    parts.scheduler(Settings.from_env()).exec()
