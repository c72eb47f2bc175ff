"""The processes of an installation, found from outside: by command line, by title, by descent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil
from sqlalchemy import select

from benchmarks.chaos import sandbox
from benchmarks.chaos.installation import Installation
from control_plane.cli.processes import family, folder_mark
from control_plane.db import Database
from control_plane.tables import SchedulerLease

TITLE = "ray::"


def find(installation: Installation, part: str, timeout_s: float) -> psutil.Process:
    """The process of a part; waited for a while, since a part may just be starting. Raises LookupError."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(LookupError, psutil.NoSuchProcess):
            return _find(installation, part)
        if time.monotonic() > deadline:
            raise LookupError(f"there is no {part}")
        time.sleep(0.1)


def is_there(installation: Installation, part: str) -> bool:
    try:
        return bool(find(installation, part, 0))
    except LookupError:
        return False


def whole(victim: psutil.Process, part: str) -> list[psutil.Process]:
    """All processes that are the part, or that do its work: what must stand still together."""
    if part in ("mlflow", "node"):
        return [victim, *victim.children(recursive=True)]
    return [victim]


def of_attempts(installation: Installation) -> list[psutil.Process]:
    """Trainers, ranks and supervisors that live, and whatever else stands still."""
    found = [p for p in installation.house.trainer_children() if lives(p)]
    for process in _ours(installation):
        actor = _title(process).startswith((f"{TITLE}Rank", f"{TITLE}Supervisor"))
        with suppress(psutil.NoSuchProcess):
            if actor or process.status() == psutil.STATUS_STOPPED:
                found.append(process)
    return found


def child(installation: Installation) -> psutil.Process | None:
    """The trainer of the job that runs."""
    return next(iter(installation.house.trainer_children()), None)


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def _find(installation: Installation, part: str) -> psutil.Process:
    ours = _ours(installation)
    match part:
        case "api":
            return _the(p for p in ours if _runs(p, "control_plane.cli", "serve"))
        case "mlflow":
            return _the(p for p in ours if _runs(p, "mlflow", "server"))
        case "scheduler" | "standby":
            leader = asyncio.run(_holder(installation.database_url))
            return _the(p for p in ours if _runs(p, "scheduler") and (p.pid == leader) is (part == "scheduler"))
        case "supervisor":
            return _the((p for p in ours if _title(p).startswith(f"{TITLE}Supervisor")), alone=True)
        case "rank":
            return _the((p for p in ours if _title(p).startswith(f"{TITLE}Rank")), alone=True)
        case "raylet":
            return _the(p for p in _find(installation, "rank").parents() if p.name() == "raylet")
        case "head":
            return _the(p for p in ours if p.name().startswith("gcs_server"))
        case "node":
            assert installation.node
            return installation.node.init
        case "child":
            return _the(installation.house.trainer_children())
    raise ValueError(part)


def _ours(installation: Installation) -> Iterable[psutil.Process]:
    """In a sandbox all are; else what descends from the installation's parts."""
    if sandbox.is_inside():
        return list(psutil.process_iter())
    found = family(folder_mark(installation.data_dir))
    with suppress(psutil.NoSuchProcess):
        standby = psutil.Process(installation.standby.process.pid)
        found |= {standby, *standby.children(recursive=True)}
    return found


def _runs(process: psutil.Process, *words: str) -> bool:
    """``python -m WORDS …``"""
    with suppress(psutil.Error):
        return process.name().startswith("python") and process.cmdline()[1 : 2 + len(words)] == ["-m", *words]
    return False


def _the(found: Iterable[psutil.Process], *, alone: bool = False) -> psutil.Process:
    living = [process for process in found if lives(process)]
    if not living or (alone and len(living) > 1):
        raise LookupError(f"{len(living)} processes")
    return living[0]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error, IndexError):
        return process.cmdline()[0]
    return ""


async def _holder(url: str) -> int:
    """The process that holds the lease."""
    database = Database(url)
    try:
        async with database.read() as session:
            holder = await session.scalar(select(SchedulerLease.holder))
    finally:
        await database.close()
    pid = (holder or "").split("/")[1:2]
    if not pid:
        raise LookupError("nobody holds the lease")
    return int(pid[0])
