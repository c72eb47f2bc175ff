"""A process that is killed at a system call of our choice, by strace, and what is to be looked at afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

CLASSES = {
    "write": ("write", "pwrite64", "writev", "pwritev", "pwritev2"),
    "rename": ("rename", "renameat", "renameat2"),
    "sync": ("fsync", "fdatasync"),
    "unlink": ("unlink", "unlinkat"),
}
CALLS = {call: kind for kind, calls in CLASSES.items() for call in calls}
CALL = re.compile(r"^(?P<thread>\d+) +(?P<call>\w+)\((?P<rest>.*)")
PATH = re.compile(r'^(?:AT_FDCWD\S*, )?(?:"(?P<name>[^"]+)"|\d+<(?P<file>[^>]+)>)')
PATIENCE_S = 30


class Point(NamedTuple):
    """The ``occurrence``-th such call of a thread (on ``path``, if given)."""

    call: str
    occurrence: int
    path: str | None = None


class Victim:
    """``tests.integration.kills.victim``, and strace on the children that it forks."""

    def __init__(self, strace: str) -> None:
        self.strace = strace
        argv = [sys.executable, "-m", "tests.integration.kills.victim"]
        root = Path(__file__).parents[3]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True)

    def do(self, deed: str, folder: Path, *options: str) -> tuple[bool, int]:
        """Have the deed done under strace. Whether it was acknowledged, and how the child ended (as waitpid says)."""
        go = folder / "go"
        os.mkfifo(go)
        self._say(f"{deed} {folder}")
        pid = self._hear().removeprefix("pid ")
        log = str(folder.parent / f"{folder.name}.strace")
        argv = [self.strace, "-f", "-y", "-o", log, "-p", pid, *options]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr
            said = tracer.stderr.readline()
            if "attached" not in said:
                os.kill(int(pid), signal.SIGKILL)
                pytest.fail(f"strace cannot attach: {said}")
            go.write_text("go")
            heard = self._hear()
            acknowledged = heard == "done"
            status = self._hear() if acknowledged else heard
            tracer.stderr.read()
        go.unlink()
        return acknowledged, int(status.removeprefix("ended "))

    def points(self, deed: str, folder: Path) -> list[Point]:
        """Every call of ``CLASSES`` that the deed makes in its folder."""
        found = self._calls(deed, folder, tuple(CALLS), str(folder))
        if deed == "save":  # one thread does it all; its temporary files have random names
            return _in_one_thread(found)
        seen = Counter(found)
        return sorted({Point(call, n + 1, path) for (_, call, path), total in seen.items() for n in range(total)})

    def sends(self, deed: str, folder: Path) -> list[Point]:
        """Everything that the deed says to a server, and its own acknowledgement."""
        return _in_one_thread(self._calls(deed, folder, ("sendto", "write"), "socket:", "pipe:"))

    def _calls(self, deed: str, folder: Path, calls: tuple[str, ...], *places: str) -> list[tuple[str, str, str]]:
        """(thread, call, path) where the path begins like one of ``places``."""
        acknowledged, status = self.do(deed, folder, "-e", f"trace={','.join(calls)}")
        assert (acknowledged, status) == (True, 0)
        log = (folder.parent / f"{folder.name}.strace").read_text()
        found: list[tuple[str, str, str]] = []
        for line in log.splitlines():
            call = CALL.match(line)
            path = call and PATH.match(call["rest"])
            if call and path and (path["name"] or path["file"]).startswith(places):
                found.append((call["thread"], call["call"], path["name"] or path["file"]))
        return found

    def kill_at(self, point: Point, deed: str, folder: Path) -> bool:
        """The deed, killed at the point. Whether it was acknowledged all the same."""
        where = [] if point.path is None else ["-P", point.path]
        inject = f"inject={point.call}:signal=SIGKILL:when={point.occurrence}"
        acknowledged, status = self.do(deed, folder, "-e", f"trace={point.call}", "-e", inject, *where)
        assert os.WIFSIGNALED(status), f"{point} was not reached"
        assert os.WTERMSIG(status) == signal.SIGKILL
        return acknowledged

    def _say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)


def _in_one_thread(found: list[tuple[str, str, str]]) -> list[Point]:
    assert len({thread for thread, *_ in found}) == 1
    totals = Counter(call for _, call, _ in found)
    return [Point(call, n + 1) for call, total in sorted(totals.items()) for n in range(total)]


class Scene:
    """A deed in a folder that is the same before each kill."""

    def __init__(self, the_victim: Victim, deed: str, template: Path) -> None:
        self.victim, self.deed, self.template = the_victim, deed, template
        self.folder = template.parent / "scene"
        self.kills: Counter[str] = Counter()

    @contextmanager
    def _fresh(self) -> Iterator[Path]:
        shutil.copytree(self.template, self.folder)
        yield self.folder
        shutil.rmtree(self.folder)

    def kill_everywhere(self, look: Callable[[Path, bool], None]) -> None:
        """``look``: at the folder after a kill, and whether the deed had been acknowledged."""
        with self._fresh() as folder:
            points = self.victim.points(self.deed, folder)
            look(folder, True)
        for point in points:
            with self._fresh() as folder:
                acknowledged = self.victim.kill_at(point, self.deed, folder)
                self.kills[CALLS[point.call]] += 1
                look(folder, acknowledged)
