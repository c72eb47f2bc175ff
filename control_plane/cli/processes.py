"""Child processes that are kept alive: started, waited for, started again when they die, ended with all their own.

Every process started here carries a mark in its environment that names the data folder and the part. So whatever a
part has started in turn is found and ended too, even when its parents are gone, and so is what a killed
``brightrun up`` left behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from control_plane.cli.parts import Command
from control_plane.cli.readiness import Probe

MARK = "BRIGHTRUN_PART"
TAIL_LINES = 20
READY_TIMEOUT_S = 120.0
READY_POLL_S = 0.1
START_TRIES = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S = 10.0
"""A part that was ready for so long is started again at once when it dies; another one after a growing pause."""
LIVENESS_POLL_S = 2.0
HUNG_S = 20.0
"""A part that gives no sign of life for so long is ended by force and started again."""


@dataclass(frozen=True)
class Part:
    name: str
    command: Command
    probe: Callable[[], Probe]
    """Called before each start; what it gives is asked until it says that the part is ready."""
    url: str = ""
    after: str = ""
    """Name of the part that must be ready before this one is started."""
    grace_s: float = 10.0
    """Between SIGTERM and SIGKILL."""
    alive: Callable[[], Probe] | None = None
    """Like ``probe``, asked while the part is up: does it give a sign of life? None: its process says enough."""
    hung_s: float = HUNG_S
    listener: socket.socket | None = None
    """Handed down to the part (``serve --fd``): while it is started again its callers wait, and are not refused."""


class PartFailed(Exception):
    """A part did not come up; the message ends with the last lines of its log."""


def folder_mark(folder: Path) -> str:
    """Names a folder, whatever its path is today."""
    stat = folder.stat()
    return f"{stat.st_dev:x}-{stat.st_ino:x}"


def family(mark: str) -> set[psutil.Process]:
    """All processes that carry the mark, or one that begins with it, and their descendants."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            carried = process.environ().get(MARK, "")
            if f"{carried}/".startswith(f"{mark}/") and process.pid != os.getpid():
                found.update([process, *process.children(recursive=True)])
    return found


def kill(mark: str, known: Iterable[psutil.Process] = ()) -> int:
    """SIGKILL ``known`` and the mark's family until none is left; returns how many there were."""
    killed: set[psutil.Process] = set()
    while left := {process for process in family(mark).union(known) if _alive(process)}:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        killed |= left
        time.sleep(0.02)  # psutil's own wait would reap our children, which is asyncio's to do
    return len(killed)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


class Keeper:
    """Keeps one part alive."""

    def __init__(self, part: Part, mark: str, log: Path, note: Callable[[str], None]) -> None:
        self.part = part
        self.log = log
        self.ready = asyncio.Event()
        self.process: Process | None = None
        self._mark = f"{mark}/{part.name}"
        self._note = note

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def keep(self, after: Keeper | None = None) -> None:
        """Runs until cancelled. Raises PartFailed if the part never comes up."""
        if after:
            await after.ready.wait()
        tries, pause_s = 0, 0.0
        while True:
            reason, ready_s = await self._one_life()
            tries += 1
            if tries >= START_TRIES and not self.ready.is_set():
                raise PartFailed(f"{self.part.name} {reason}, {tries} times; {self.log} ends with:\n{tail(self.log)}")
            pause_s = 0.0 if ready_s > STEADY_S else pause_s
            self._note(f"{self.part.name:<9} {reason}; starting it again in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(max(FIRST_PAUSE_S, pause_s * 2), LONGEST_PAUSE_S)

    async def _one_life(self) -> tuple[str, float]:
        """Start the part, and return when nothing of it is left: how it ended, and how long it was ready."""
        begun, ready_s, reason = time.monotonic(), 0.0, "was not ready in time"
        ready = self.part.probe()
        process = await self._spawn()
        if await self._comes_up(process, ready):
            again = "again " if self.ready.is_set() else ""
            self._note(f"{self.part.name:<9} ready {again}after {time.monotonic() - begun:4.1f} s  {self.part.url}")
            self.ready.set()
            begun = time.monotonic()
            await self._until_ended_or_hung(process)
            ready_s = time.monotonic() - begun
            reason = f"gave no sign of life for {self.part.hung_s:.0f} s"
        if process.returncode is not None:
            reason = "ended"
        await asyncio.to_thread(kill, self._mark)
        return f"{reason} ({_described(await process.wait())})", ready_s

    async def _until_ended_or_hung(self, process: Process) -> None:
        if self.part.alive is None:
            await process.wait()
            return
        alive, seen = self.part.alive(), time.monotonic()
        ended = asyncio.create_task(process.wait())
        try:
            while time.monotonic() - seen < self.part.hung_s:
                if (await asyncio.wait({ended}, timeout=LIVENESS_POLL_S))[0]:
                    return
                if await alive():
                    seen = time.monotonic()
        finally:
            ended.cancel()

    async def end(self, hurry: asyncio.Event) -> None:
        """SIGTERM, up to the grace period (or until told to hurry), then SIGKILL for all that is left."""
        if self.process is None:
            return
        known = await asyncio.to_thread(family, self._mark)
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            ways_out = [asyncio.create_task(self.process.wait()), asyncio.create_task(hurry.wait())]
            await asyncio.wait(ways_out, timeout=self.part.grace_s, return_when=asyncio.FIRST_COMPLETED)
            for task in ways_out:
                task.cancel()
        killed = await asyncio.to_thread(kill, self._mark, known)
        await self.process.wait()
        self._note(f"{self.part.name:<9} ended" + (f", {killed} processes by force" if killed else ""))

    async def _spawn(self) -> Process:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.part.command.argv,
                env=self.part.command.environment() | {MARK: self._mark},
                stdin=DEVNULL,
                stdout=log,
                stderr=STDOUT,
                start_new_session=True,
                pass_fds=[self.part.listener.fileno()] if self.part.listener else [],
            )
        return self.process

    async def _comes_up(self, process: Process, ready: Probe) -> bool:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while process.returncode is None and time.monotonic() < deadline:
            if await ready():
                return True
            await asyncio.sleep(READY_POLL_S)
        return False


def _described(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
