from __future__ import annotations

import sys
from pathlib import Path

import click

from control_plane.cli.parts import Command
from control_plane.settings import Settings


@click.group()
def ledger() -> None:
    """What was charged, and whether it balances."""


@ledger.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of the installation; or BRIGHTRUN_DATA_DIR.")
@click.option("--all", "everything", is_flag=True, help="List every violation, not only the first.")
def verify(data_dir: Path | None, everything: bool) -> None:
    """Check every invariant of the ledger, whether the installation runs or not; nothing is written.

    Exit code 0: it balances. 1: it does not, and the first violation is named. 2: there is nothing to check.
    """
    settings = Settings.from_env(data_dir=data_dir)
    arguments = ["--all"] if everything else []
    Command([sys.executable, "-m", "scheduler.verify", *arguments], settings.to_env()).exec()
