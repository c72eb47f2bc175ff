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
    """``part`` has ``deed`` done to it. ``ends_attempt``: a job that trains needs another attempt; None: it may.
    ``only_in``: the one flavour of installation that has such a part."""

    deed: str
    part: str
    hold_s: float = 0.0
    ends_attempt: bool | None = False
    only_in: str | None = None

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
    Fault("kill", part, ends_attempt=part in ENDING, only_in="production" if part == "node" else None)
    for part in ("api", "scheduler", "standby", "mlflow", *ENDING)
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
    Fault("stop", "node", 6, only_in="production"),
    Fault("hang", "api"),
)
OTHERS = (
    Fault("fill", "disk", 5, ends_attempt=None),
    Fault("slow", "store", 12, only_in="production"),
    Fault("fail", "store", 10, only_in="production"),
    Fault("away", "database", 6, only_in="production"),
    Fault("lock", "database", 3, only_in="embedded"),
)


@dataclass
class Scene:
    """Where deeds are done."""

    installation: Installation
    silences: Silences
    find_s: float = 60.0
    """How long a part may be looked for: it may just be starting."""

    def victim(self, part: str) -> psutil.Process:
        return victims.find(self.installation, part, self.find_s)


@contextmanager
def done(scene: Scene, fault: Fault) -> Iterator[None]:
    """Within it, the deed is done. Raises NotDone, LookupError (nobody to do it to)."""
    with _DEEDS[fault.deed](scene, fault):
        yield


@contextmanager
def _kill(scene: Scene, fault: Fault) -> Iterator[None]:
    victim = scene.victim(fault.part)
    if fault.part == "api":
        scene.silences.api_deaths.append(time.monotonic())
    victim.send_signal(signal.SIGKILL)
    _seen(lambda: not victims.lives(victim), f"{victim} is dead")
    yield


@contextmanager
def _stop(scene: Scene, fault: Fault) -> Iterator[None]:
    stopped = victims.whole(scene.victim(fault.part), fault.part)
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
def _hang(scene: Scene, fault: Fault) -> Iterator[None]:
    """Stopped for good: the watcher must see it and start another."""
    victim = scene.victim(fault.part)
    begun = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    _seen(lambda: victim.status() == psutil.STATUS_STOPPED, f"{victim} stands still")
    try:
        yield
    finally:
        _seen(lambda: not victims.lives(victim), f"{victim} was ended by its watcher", 60)
        scene.silences.api_hung.append((begun, time.monotonic()))
        scene.silences.api_deaths.append(time.monotonic())


@contextmanager
def _fill(scene: Scene, _fault: Fault) -> Iterator[None]:
    ballast = scene.installation.data_dir / "ballast"
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
def _trouble(scene: Scene, fault: Fault) -> Iterator[None]:
    """The object store is slow, or fails."""
    assert scene.installation.store
    proxy = scene.installation.store.proxy
    with _mood(proxy, Mood.SLOW if fault.deed == "slow" else Mood.FAILING):
        yield


@contextmanager
def _away(scene: Scene, _fault: Fault) -> Iterator[None]:
    assert scene.installation.postgres
    begun = time.monotonic()
    try:
        with _mood(scene.installation.postgres.proxy, Mood.AWAY):
            yield
    finally:
        scene.silences.database_away.append((begun, time.monotonic()))


@contextmanager
def _lock(scene: Scene, _fault: Fault) -> Iterator[None]:
    """Somebody else has SQLite's file to himself: all wait, and nobody is refused."""
    connection = sqlite3.connect(scene.installation.data_dir / "brightrun.sqlite3", timeout=30, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


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


def _seen(condition: Callable[[], bool], what: str, timeout_s: float = SEEN_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise NotDone(f"not seen: {what}")
        time.sleep(0.02)


_DEEDS = {
    "kill": _kill,
    "stop": _stop,
    "hang": _hang,
    "fill": _fill,
    "slow": _trouble,
    "fail": _trouble,
    "away": _away,
    "lock": _lock,
}
