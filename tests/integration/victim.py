"""A process that imports once and forks a child for each deed that is to be killed (see test_kill_at_syscalls.py).

A line on standard input, ``DEED FOLDER``; answers ``pid N``. The child waits until somebody has written to
``FOLDER/go``, does the deed, and says ``done`` when it is acknowledged; then ``ended STATUS`` (of waitpid) follows.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from control_plane.db import Database
from control_plane.storage import Storage
from control_plane.tables import Attempt, TrainingJob
from scheduler import ledger
from scheduler.cluster.staging import upload_folder
from trainer import checkpoint
from trainer.checkpoint import Checkpoint, State

PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
PREFIX = "mlflow/1/run/artifacts/checkpoints"
JOB, ATTEMPT = "job", "attempt"
USED_MS = 20_000


def content(step: int) -> Checkpoint:
    """Of the checkpoint of a step; the same every time."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3) + step}
    return Checkpoint(State(step=step), tensors, {"0.exp_avg": torch.full((3,), float(step))}, tensors)


def save(folder: Path, step: int = 2) -> None:
    checkpoint.save(content(step), folder / "output" / f"a1-s{step}", epoch=0)


def upload(folder: Path, step: int = 2) -> None:
    asyncio.run(_upload(Storage((folder / "objects").as_uri()), folder / "output" / f"a1-s{step}"))


async def _upload(storage: Storage, folder: Path) -> None:
    """In one thread, so that its calls can be counted."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    await upload_folder(storage, folder, f"{PREFIX}/{folder.name}")


def post(folder: Path) -> None:
    asyncio.run(_post(Database(f"sqlite+aiosqlite:///{folder}/ledger.sqlite3")))


async def _post(database: Database) -> None:
    async with database.write() as session:
        job, attempt = await session.get_one(TrainingJob, JOB), await session.get_one(Attempt, ATTEMPT)
        await ledger.record(session, attempt, {"0": {"training": USED_MS}})
        await ledger.post(session, job, attempt)
    os.write(1, b"done\n")
    os._exit(0)


DEEDS: dict[str, Callable[[Path], None]] = {"save": save, "upload": upload, "post": post}


def main() -> None:
    for line in sys.stdin:
        deed, folder = line.split()
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
            with open(Path(folder) / "go") as go:
                go.read()
            DEEDS[deed](Path(folder))
            os.write(1, b"done\n")
            os._exit(0)
        os.write(1, f"pid {pid}\n".encode())
        os.write(1, f"ended {os.waitpid(pid, 0)[1]}\n".encode())


if __name__ == "__main__":
    main()
