import click

from control_plane.cli import parts
from control_plane.settings import Settings


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--store", help="SQLAlchemy URL of MLflow's own database.  [default: SQLite in the data folder]")
def mlflow(host: str, store: str | None) -> None:
    """Run the MLflow server alone, on the port of BRIGHTRUN_MLFLOW_URL."""
    parts.mlflow(Settings.from_env(), host=host, store=store).exec()
