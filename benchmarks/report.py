"""What every benchmark prints around its figures: versions, machine, tables; and the same as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "ray", "mlflow", "litestar", "SQLAlchemy", "aiosqlite", "asyncpg", "transformers", "peft")
GIB = 1024**3


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line: ``--json FILE``, and what the benchmark adds."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return made


def versions() -> dict[str, str]:
    found = {"brightrun": _commit(), "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory, kernel; nothing that tells which machine it is."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memoryGib": round(psutil.virtual_memory().total / GIB, 1),
        "kernel": platform.release(),
    }


def heading(title: str) -> None:
    """The title, then what it runs on."""
    here = machine()
    print(title)
    print("  " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"  {here['cpu']}, {here['cores']} cores, {here['memoryGib']} GiB, Linux {here['kernel']}\n", flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned columns; numbers to the right."""
    cells = [[_shown(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in ([*columns], ["─" * width for width in widths], *cells):
        padded = [cell.rjust(n) if _is_number(cell) else cell.ljust(n) for cell, n in zip(line, widths, strict=True)]
        print("  ".join(padded).rstrip())
    sys.stdout.flush()


def write(file: Path | None, benchmark: str, **figures: Any) -> None:
    """``--json``: the figures with versions, machine and time (UTC)."""
    if file is None:
        return
    told = {
        "benchmark": benchmark,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        **figures,
    }
    file.write_text(json.dumps(told, indent=2, default=str) + "\n")


def _commit() -> str:
    """Version and commit of the checkout, with a + when files differ from it."""
    here = version("brightrun")
    with suppress(OSError, subprocess.CalledProcessError):
        commit = _git("rev-parse", "--short", "HEAD")
        here += f" ({commit}{'+' if _git('status', '--porcelain') else ''})"
    return here


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _processor() -> str:
    told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return told[1] if told else platform.machine()


def _shown(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[\d,.]+", cell) is not None
