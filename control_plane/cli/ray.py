import click

from control_plane.cli import parts
from control_plane.settings import Settings


@click.command()
@click.option("--dashboard-port", type=int, default=8265, show_default=True, help="0: any free one.")
def ray(dashboard_port: int) -> None:
    """Run a local Ray head alone, on loopback and the port of BRIGHTRUN_RAY_ADDRESS."""
    parts.ray(Settings.from_env(), dashboard_port=dashboard_port).exec()
