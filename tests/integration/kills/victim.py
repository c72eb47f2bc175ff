"""A process that imports once and forks a child for each deed that is to be killed (see syscalls.py).

A line on standard input, ``DEED FOLDER``; answers ``pid N``. The child waits until somebody has written to
``FOLDER/go``, does the deed, and says ``done`` when it is acknowledged; then ``ended STATUS`` (of waitpid) follows.
A deed of ``postings`` is done to the job ``FOLDER/job`` in the database ``FOLDER/url``.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from control_plane.db import Database
from control_plane.storage import Storage
from scheduler.cluster.staging import upload_folder
from tests.integration.kills import postings
from trainer import checkpoint
from trainer.checkpoint import Checkpoint, State

PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
PREFIX = "mlflow/1/run/artifacts/checkpoints"


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


async def _post(deed: str, folder: Path) -> None:
    database = Database((folder / "url").read_text())
    await postings.act(deed, database, folder, (folder / "job").read_text())
    _acknowledge()


def do(deed: str, folder: Path) -> None:
    if deed in postings.DEEDS:
        asyncio.run(_post(deed, folder))
    else:
        {"save": save, "upload": upload}[deed](folder)


def _acknowledge() -> None:
    os.write(1, b"done\n")
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        deed, folder = line.split()
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
            with open(Path(folder) / "go") as go:
                go.read()
            do(deed, Path(folder))
            _acknowledge()
        os.write(1, f"pid {pid}\n".encode())
        os.write(1, f"ended {os.waitpid(pid, 0)[1]}\n".encode())


if __name__ == "__main__":
    main()
