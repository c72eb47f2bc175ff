"""SIGKILL at every write, rename, sync and unlink of a checkpoint and of a posting: the next start finds all whole."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sqlalchemy import select

from control_plane.db import Database
from control_plane.storage import Storage
from control_plane.tables import Attempt, AttemptUsage, CostRecord, TrainingJob
from scheduler import ledger
from scheduler.cluster.staging import Torn, fetch_checkpoint
from scheduler.executor import ResumePoint
from scheduler.verify import verify
from tests.integration import victim
from tests.rows import make_running_job
from trainer import checkpoint
from trainer.protocol import MANIFEST

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
    """``tests.integration.victim``, and strace on the children that it forks."""

    def __init__(self, strace: str) -> None:
        self.strace = strace
        argv = [sys.executable, "-m", "tests.integration.victim"]
        root = Path(__file__).parents[2]
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
        acknowledged, status = self.do(deed, folder, "-e", f"trace={','.join(CALLS)}")
        assert (acknowledged, status) == (True, 0)
        log = (folder.parent / f"{folder.name}.strace").read_text()
        found: list[tuple[str, str, str]] = []
        for line in log.splitlines():
            call = CALL.match(line)
            path = call and PATH.match(call["rest"])
            if call and path and (path["name"] or path["file"]).startswith(str(folder)):
                found.append((call["thread"], call["call"], path["name"] or path["file"]))
        if deed == "save":  # one thread does it all; its temporary files have random names
            return [Point(call, n + 1) for call, total in _counted(found) for n in range(total)]
        seen = Counter(found)
        return sorted({Point(call, n + 1, path) for (_, call, path), total in seen.items() for n in range(total)})

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


def _counted(found: list[tuple[str, str, str]]) -> list[tuple[str, int]]:
    assert len({thread for thread, *_ in found}) == 1
    return sorted(Counter(call for _, call, _ in found).items())


@pytest.fixture(scope="module")
def the_victim() -> Iterator[Victim]:
    strace = shutil.which("strace")
    if strace is None:
        pytest.fail("strace is not installed: apt-get install strace")
    made = Victim(strace)
    yield made
    made.end()


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


def test_a_checkpoint_is_written_whole_or_not_at_all(the_victim: Victim, tmp_path: Path) -> None:
    template = tmp_path / "template"
    victim.save(template, 1)

    def look(folder: Path, acknowledged: bool) -> None:
        output = folder / "output"
        checkpoint.load(output / "a1-s1")
        if acknowledged or (output / "a1-s2").exists():
            assert torch.equal(checkpoint.load(output / "a1-s2").adapter["a"], victim.content(2).adapter["a"])
        victim.save(folder)
        checkpoint.load(output / "a1-s2")
        assert sorted(path.name for path in output.iterdir()) == ["a1-s1", "a1-s2"]

    scene = Scene(the_victim, "save", template)
    scene.kill_everywhere(look)
    assert scene.kills["write"] >= 5
    assert scene.kills["rename"] >= 4
    assert scene.kills["sync"] >= 6


def test_a_stored_checkpoint_is_whole_or_the_one_before_is_used(the_victim: Victim, tmp_path: Path) -> None:
    template = tmp_path / "template"
    points = []
    for step in (1, 2):
        victim.save(template, step)
        manifest = (template / "output" / f"a1-s{step}" / MANIFEST).read_bytes()
        key = f"{victim.PREFIX}/a1-s{step}"
        points.insert(0, ResumePoint(str(step), key, sha256(manifest).hexdigest(), step))
    victim.upload(template, 1)

    def look(folder: Path, acknowledged: bool) -> None:
        used = asyncio.run(resume(folder))
        assert used in ((2,) if acknowledged else (1, 2))
        victim.upload(folder)
        assert asyncio.run(resume(folder)) == 2

    async def resume(folder: Path) -> int:
        """As a rank does: the step of the first that is whole."""
        storage = Storage((folder / "objects").as_uri())
        for point in points:
            inputs = folder / "inputs" / point.checkpoint_id
            shutil.rmtree(inputs, ignore_errors=True)
            inputs.mkdir(parents=True)
            try:
                await fetch_checkpoint(storage, point, inputs)
            except Torn:
                continue
            loaded = checkpoint.load(inputs)
            assert torch.equal(loaded.adapter["a"], victim.content(point.step).adapter["a"])
            return loaded.state.step
        raise AssertionError("no checkpoint is whole")

    scene = Scene(the_victim, "upload", template)
    scene.kill_everywhere(look)
    assert scene.kills["write"] >= 5
    assert scene.kills["rename"] >= 5
    assert scene.kills["sync"] >= 10


def test_a_posting_is_there_wholly_or_not_at_all(the_victim: Victim, tmp_path: Path, sqlite_template: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    shutil.copyfile(sqlite_template, template / "ledger.sqlite3")
    asyncio.run(_begin(template))
    scene = Scene(the_victim, "post", template)
    outcomes: Counter[bool] = Counter()

    def look(folder: Path, acknowledged: bool) -> None:
        outcomes[asyncio.run(_is_posted(folder, acknowledged))] += 1

    scene.kill_everywhere(look)
    assert scene.kills["write"] >= 5
    assert scene.kills["sync"] >= 3
    assert scene.kills["unlink"] >= 1
    assert outcomes[True] >= 1
    assert outcomes[False] >= 5


def _database(folder: Path) -> Database:
    return Database(f"sqlite+aiosqlite:///{folder}/ledger.sqlite3")


async def _begin(folder: Path) -> None:
    database = _database(folder)
    async with database.write() as session:
        _, attempt = await make_running_job(session, id=victim.JOB)
        attempt.id = victim.ATTEMPT
    await database.close()


async def _is_posted(folder: Path, acknowledged: bool) -> bool:
    """Whether the posting is there, the ledger verified before and after it is made (again)."""
    database = _database(folder)
    posted = []
    for _ in range(2):
        async with database.read() as session:
            assert await verify(session) == []
            amounts = list(await session.scalars(select(CostRecord.amount_microusd)))
            used = list(await session.scalars(select(AttemptUsage.gpu_ms)))
            job = await session.get_one(TrainingJob, victim.JOB)
        assert (amounts, used, job.current_cost_microusd) in (([], [], 0), ([2_000], [victim.USED_MS], 2_000))
        posted.append(bool(amounts))
        async with database.write() as session:
            attempt = await session.get_one(Attempt, victim.ATTEMPT)
            await ledger.record(session, attempt, {"0": {"training": victim.USED_MS}})
            await ledger.post(session, await session.get_one(TrainingJob, victim.JOB), attempt)
    await database.close()
    assert posted[1]
    assert posted[0] or not acknowledged
    return posted[0]
