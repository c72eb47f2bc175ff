"""The ``brightrun`` command. Each subcommand's module is imported only when it is the one that runs."""

from __future__ import annotations

import importlib

import click

SUBCOMMANDS = {
    "up": "Start, watch and end the whole installation on this machine.",
    "serve": "Run the API alone.",
    "scheduler": "Run the scheduler alone.",
    "mlflow": "Run the MLflow server alone.",
    "ray": "Run a local Ray head alone.",
    "migrate": "Bring the database to this version's tables.",
    "ledger": "Check the ledger.",
    "version": "Print the version.",
}
"""Name → one line of help. The command is the attribute of the same name in ``control_plane.cli.NAME``."""


class LazyGroup(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        command = getattr(importlib.import_module(f"control_plane.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """BrightRun: LoRA fine-tuning on GPUs that you own.

    Every setting is an environment variable BRIGHTRUN_…; the README lists them.
    """
