"""The processes of an installation, found from outside: by command line, by title, by descent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil
from sqlalchemy import select

from benchmarks.chaos.installation import Installation
from control_plane.db import Database
from control_plane.tables import SchedulerLease

FIND_S = 60


def find(installation: Installation, part: str) -> psutil.Process:
    """The process of a part; waited for a while, since a part may just be starting. Raises LookupError."""
    deadline = time.monotonic() + FIND_S
    while True:
        with suppress(LookupError, psutil.NoSuchProcess):
            return _find(installation, part)
        if time.monotonic() > deadline:
            raise LookupError(f"there is no {part}")
        time.sleep(0.1)


def whole(installation: Installation, part: str) -> list[psutil.Process]:
    """All processes that are the part, or that do its work: what must stand still together."""
    victim = find(installation, part)
    if part in ("mlflow", "node"):
        return [victim, *victim.children(recursive=True)]
    return [victim]


def child(installation: Installation) -> psutil.Process | None:
    """The trainer of the job that runs."""
    return next(iter(installation.house.trainer_children()), None)


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def _find(installation: Installation, part: str) -> psutil.Process:
    match part:
        case "api":
            return _by_line("control_plane.cli", "serve")
        case "mlflow":
            return _by_line("mlflow", "server")
        case "scheduler" | "standby":
            leader = asyncio.run(_holder(installation.database_url))
            ours = (p for p in _all("python") if p.cmdline()[1:3] == ["-m", "scheduler"])
            return _the(p for p in ours if (p.pid == leader) is (part == "scheduler"))
        case "supervisor":
            return _the((p for p in psutil.process_iter() if _title(p).startswith("ray::Supervisor")), alone=True)
        case "head":
            return _the(_all("gcs_server"))
        case "node":
            assert installation.node
            return installation.node.init
    trainer = child(installation)
    if trainer is None:
        raise LookupError("no trainer")
    match part:
        case "child":
            return trainer
        case "rank":
            return _the(p for p in trainer.parents() if _title(p).startswith("ray::"))
        case "raylet":
            return _the(p for p in trainer.parents() if p.name() == "raylet")
    raise ValueError(part)


def _by_line(*words: str) -> psutil.Process:
    return _the(p for p in _all("python") if set(words) <= set(p.cmdline()) and p.ppid() != 1)


def _the(found: Iterable[psutil.Process], *, alone: bool = False) -> psutil.Process:
    living = [process for process in found if lives(process)]
    if not living or (alone and len(living) > 1):
        raise LookupError(f"{len(living)} processes")
    return living[0]


def _all(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name().startswith(name) and process.cmdline():
                found.append(process)
    return found


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
