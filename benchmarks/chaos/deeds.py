"""What is done to an installation: each deed begins, is seen to have happened, lasts a while, and is undone."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos import victims
from benchmarks.chaos.installation import Installation
from benchmarks.chaos.probe import Silences
from benchmarks.chaos.proxy import Mood, Proxy

SEEN_S = 10
MIB = 1024 * 1024


@dataclass(frozen=True)
class Fault:
    """``part`` has ``deed`` done to it. ``ends_attempt``: the job needs another attempt; None: it may."""

    deed: str
    part: str
    hold_s: float = 0.0
    ends_attempt: bool | None = False

    @property
    def name(self) -> str:
        return f"{self.deed} {self.part}"

    @property
    def kills(self) -> bool:
        return self.deed == "kill"


class NotDone(Exception):
    """The deed could not be seen to have happened."""


ENDING = ("child", "rank", "supervisor", "raylet", "head", "node")
KILLS = tuple(
    Fault("kill", part, ends_attempt=part in ENDING) for part in ("api", "scheduler", "standby", "mlflow", *ENDING)
)
STOPS = (
    Fault("stop", "api", 2.5),
    Fault("stop", "scheduler", 8),
    Fault("stop", "standby", 5),
    Fault("stop", "mlflow", 6),
    Fault("stop", "supervisor", 7),
    Fault("stop", "rank", 7),
    Fault("stop", "child", 6),
    Fault("stop", "raylet", 6),
    Fault("stop", "head", 6),
    Fault("stop", "node", 6),
    Fault("hang", "api"),
)
OTHERS = (
    Fault("fill", "disk", 5, ends_attempt=None),
    Fault("slow", "store", 12),
    Fault("fail", "store", 10),
    Fault("away", "database", 6),
)


@contextmanager
def done(installation: Installation, fault: Fault, silences: Silences) -> Iterator[None]:
    """Within it, the deed is done. Raises NotDone, LookupError (nobody to do it to)."""
    with _DEEDS[fault.deed](installation, fault, silences):
        yield


@contextmanager
def _kill(installation: Installation, fault: Fault, silences: Silences) -> Iterator[None]:
    victim = victims.find(installation, fault.part)
    if fault.part == "api":
        silences.api_deaths.append(time.monotonic())
    victim.send_signal(signal.SIGKILL)
    _seen(lambda: not victims.lives(victim), f"{victim} is dead")
    yield


@contextmanager
def _stop(installation: Installation, fault: Fault, _silences: Silences) -> Iterator[None]:
    stopped = victims.whole(installation, fault.part)
    try:
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        _seen(lambda: stopped[0].status() == psutil.STATUS_STOPPED, f"{stopped[0]} stands still")
        yield
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


@contextmanager
def _hang(installation: Installation, fault: Fault, silences: Silences) -> Iterator[None]:
    """Stopped for good: the watcher must see it and start another."""
    victim = victims.find(installation, fault.part)
    victim.send_signal(signal.SIGSTOP)
    _seen(lambda: victim.status() == psutil.STATUS_STOPPED, f"{victim} stands still")
    _seen(lambda: not victims.lives(victim), f"{victim} was ended by its watcher", 60)
    silences.api_deaths.append(time.monotonic())
    yield


@contextmanager
def _fill(installation: Installation, _fault: Fault, _silences: Silences) -> Iterator[None]:
    ballast = installation.data_dir / "ballast"
    try:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(MIB))
        _top_up(ballast)
        yield
    finally:
        ballast.unlink(missing_ok=True)


def _top_up(ballast: Path) -> None:
    """The last pages, too."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    free = os.statvfs(ballast.parent)
    if free.f_bavail * free.f_frsize > MIB:
        raise NotDone(f"the disk has {free.f_bavail * free.f_frsize} bytes free")


@contextmanager
def _trouble(installation: Installation, fault: Fault, _silences: Silences) -> Iterator[None]:
    """The object store is slow, or fails."""
    assert installation.store
    proxy = installation.store.proxy
    with _mood(proxy, Mood.SLOW if fault.deed == "slow" else Mood.FAILING):
        yield


@contextmanager
def _away(installation: Installation, _fault: Fault, silences: Silences) -> Iterator[None]:
    begun = time.monotonic()
    try:
        if installation.postgres:
            with _mood(installation.postgres.proxy, Mood.AWAY):
                yield
        else:
            with _locked(installation.data_dir / "brightrun.sqlite3"):
                yield
    finally:
        silences.database_away.append((begun, time.monotonic()))


@contextmanager
def _mood(proxy: Proxy, mood: Mood) -> Iterator[None]:
    before = proxy.hit
    proxy.mood = mood
    try:
        yield
        if proxy.hit == before:
            raise NotDone("nobody asked")
    finally:
        proxy.mood = Mood.HONEST


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    connection = sqlite3.connect(file, timeout=30, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _seen(condition: Callable[[], bool], what: str, timeout_s: float = SEEN_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise NotDone(f"not seen: {what}")
        time.sleep(0.02)


_DEEDS = {"kill": _kill, "stop": _stop, "hang": _hang, "fill": _fill, "slow": _trouble, "fail": _trouble, "away": _away}
