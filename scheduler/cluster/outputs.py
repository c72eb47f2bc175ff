"""Uploads of what the child writes, in the background: the child never waits for the object store."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from control_plane.storage import Storage
from scheduler.cluster.staging import upload_folder
from trainer.protocol import Adapter, Checkpoint

WAITING_CHECKPOINTS = 4
"""With more waiting, the oldest that is not the best is given up: a slow store costs only resume points."""

Emit = Callable[[dict[str, Any]], None]


class Outputs:
    """One upload at a time, in order; a folder that has been dealt with is removed.

    ``emit`` hears ``stored``, ``adapter``, and a ``log`` for what was given up.
    """

    def __init__(self, storage: Storage, prefix: str, emit: Emit) -> None:
        self._storage, self._prefix, self._emit = storage, prefix, emit
        self._waiting: list[tuple[Checkpoint | Adapter, dict[str, int]]] = []
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._work())
        self._closing = self._uploading = False
        self.failed: str | None = None
        """Why the newest of them is not in the store."""

    def add(self, output: Checkpoint | Adapter, usage: dict[str, int]) -> None:
        """``usage``: milliseconds by kind as of now, for a checkpoint's ``stored`` event."""
        self._waiting.append((output, usage))
        checkpoints = [waiting for waiting, _ in self._waiting if isinstance(waiting, Checkpoint)]
        if len(checkpoints) > WAITING_CHECKPOINTS:
            given_up = next((checkpoint for checkpoint in checkpoints if not checkpoint.best), checkpoints[0])
            self._waiting = [entry for entry in self._waiting if entry[0] is not given_up]
            shutil.rmtree(given_up.path, ignore_errors=True)
            self._warn(f"the checkpoint of step {given_up.step} was not stored: the object store is too slow")
        self._wake.set()

    @property
    def busy(self) -> bool:
        return not self._task.done() and (self._uploading or bool(self._waiting))

    async def drain(self) -> None:
        """Until all is uploaded or given up."""
        self._closing = True
        self._wake.set()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()

    def give_up(self) -> None:
        """Time is up: what is not in the store by now does not get there."""
        if self.busy:
            self.failed = "the object store did not take it in time"
            self._warn(f"what was saved last was not stored: {self.failed}")
        self._task.cancel()

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _work(self) -> None:
        while self._waiting or not self._closing:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            output, usage = self._waiting.pop(0)
            self._uploading = True
            try:
                if isinstance(output, Checkpoint):
                    await self._store_checkpoint(output, usage)
                else:
                    await self._store_adapter(output)
                self.failed = None
            except Exception as error:
                self.failed = f"{Path(output.path).name} could not be stored: {type(error).__name__}: {error}"
                self._warn(self.failed)
            self._uploading = False
            await asyncio.to_thread(shutil.rmtree, output.path, ignore_errors=True)

    async def _store_checkpoint(self, checkpoint: Checkpoint, usage: dict[str, int]) -> None:
        key = f"{self._prefix}/checkpoints/{Path(checkpoint.path).name}"
        await upload_folder(self._storage, Path(checkpoint.path), key)
        event = msgspec.to_builtins(checkpoint)
        del event["path"]
        self._emit({"best": False, **event, "type": "stored", "key": key, "usage": usage})

    async def _store_adapter(self, adapter: Adapter) -> None:
        files = await upload_folder(self._storage, Path(adapter.path), f"{self._prefix}/adapter")
        self._emit({"type": "adapter", "files": files, "best_step": adapter.best_step})

    def _warn(self, message: str) -> None:
        self._emit({"type": "log", "level": "WARNING", "message": message})
