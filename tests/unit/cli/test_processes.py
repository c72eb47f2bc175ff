"""Parts are kept alive and ended with everything they have started, using small stand-ins for the real parts."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from control_plane.cli import processes
from control_plane.cli.parts import Command
from control_plane.cli.processes import Keeper, Part, PartFailed

STUBBORN = """
    import pathlib, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path("grandchild").write_text(str(grandchild.pid))
    time.sleep(600)
"""
OBEDIENT = "import pathlib, time; pathlib.Path('up').write_text('yes'); time.sleep(600)"
SERVER = """
    import os, pathlib, socket
    listener = socket.socket(fileno=FD)
    pathlib.Path("up").write_text("yes")
    while True:
        caller, _ = listener.accept()
        caller.sendall(str(os.getpid()).encode())
        caller.close()
"""
BROKEN = "import sys; sys.exit('no such thing as a working part')"


def lives(pid: int) -> bool:
    """A killed orphan may stay a zombie until whoever adopted it looks."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class House:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = processes.folder_mark(folder)
        self.notes: list[str] = []
        self.came_back = asyncio.Event()

    def note(self, line: str) -> None:
        self.notes.append(line)
        if "ready again" in line:
            self.came_back.set()

    def keeper(self, program: str, ready_when: str, grace_s: float = 5, **more: Any) -> Keeper:
        file = self.folder / ready_when
        prelude = f"import os; os.chdir({str(self.folder)!r})\n"
        command = Command([sys.executable, "-c", prelude + textwrap.dedent(program)], {})

        def probe() -> Callable[[], Awaitable[bool]]:
            file.unlink(missing_ok=True)

            async def ready() -> bool:
                return file.exists() and bool(file.read_text())

            return ready

        part = Part("part", command, probe, grace_s=grace_s, **more)
        return Keeper(part, self.mark, self.folder / "part.log", self.note)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    processes.kill(house.mark)


async def until_ready(keeper: Keeper) -> asyncio.Task[None]:
    task = asyncio.create_task(keeper.keep())
    await asyncio.wait_for(keeper.ready.wait(), 20)
    return task


async def test_a_part_that_is_killed_comes_back_and_its_orphans_are_ended(house: House) -> None:
    keeper = house.keeper(STUBBORN, "grandchild")
    keeping = await until_ready(keeper)
    first, orphan = keeper.pid, int((house.folder / "grandchild").read_text())

    psutil.Process(first).send_signal(signal.SIGKILL)
    await asyncio.wait_for(house.came_back.wait(), 20)

    assert keeper.pid != first
    assert lives(keeper.pid)
    assert not lives(orphan)
    assert any("SIGKILL" in note for note in house.notes)
    keeping.cancel()
    await keeper.end(asyncio.Event())


async def test_ending_leaves_nothing_even_of_a_part_that_ignores_sigterm(house: House) -> None:
    keeper = house.keeper(STUBBORN, "grandchild", grace_s=0.3)
    keeping = await until_ready(keeper)
    grandchild = int((house.folder / "grandchild").read_text())

    keeping.cancel()
    await keeper.end(asyncio.Event())

    assert not lives(keeper.pid)
    assert not lives(grandchild)
    assert not processes.family(house.mark)
    assert "2 processes by force" in house.notes[-1]


async def test_the_second_signal_does_not_wait_for_the_grace_period(house: House) -> None:
    keeper = house.keeper(STUBBORN, "grandchild", grace_s=600)
    keeping = await until_ready(keeper)
    keeping.cancel()
    hurry = asyncio.Event()
    hurry.set()

    async with asyncio.timeout(10):
        await keeper.end(hurry)

    assert not processes.family(house.mark)


async def test_a_part_that_gives_no_sign_of_life_is_started_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LIVENESS_POLL_S", 0.02)
    asked: list[int] = []

    def alive() -> Callable[[], Awaitable[bool]]:
        async def answer() -> bool:
            asked.append(keeper.pid)
            return len(set(asked)) > 1 or len(asked) < 3  # the first process falls silent after two answers

        return answer

    keeper = house.keeper(OBEDIENT, "up", alive=alive, hung_s=0.3)
    keeping = await until_ready(keeper)
    first = keeper.pid
    await asyncio.wait_for(house.came_back.wait(), 20)
    while asked[-1] == first:
        await asyncio.sleep(0.01)

    assert not lives(first)
    assert asked.count(first) > 3, "it was given time"
    assert any("gave no sign of life" in note and "in 0.0 s" in note for note in house.notes), house.notes
    assert lives(keeper.pid)
    keeping.cancel()
    await keeper.end(asyncio.Event())


async def test_callers_wait_while_a_part_is_started_again(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        keeper = house.keeper(SERVER.replace("FD", str(listener.fileno())), "up", listener=listener)
        keeping = await until_ready(keeper)
        first = keeper.pid
        assert await call(listener) == first

        await killed(psutil.Process(first))
        answers = await asyncio.gather(*(call(listener) for _ in range(5)))

        assert set(answers) == {keeper.pid}
        assert keeper.pid != first
        keeping.cancel()
        await keeper.end(asyncio.Event())


async def killed(process: psutil.Process) -> None:
    """Kills it and waits until it holds no socket any more: a call that it takes while it dies is lost."""
    process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.001)


async def call(listener: socket.socket) -> int:
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return int(answer)


async def test_a_part_that_keeps_dying_is_started_after_growing_pauses(house: House) -> None:
    keeper = house.keeper(OBEDIENT, "up")
    keeping = await until_ready(keeper)
    for _ in range(2):
        house.came_back.clear()
        psutil.Process(keeper.pid).send_signal(signal.SIGKILL)
        await asyncio.wait_for(house.came_back.wait(), 20)

    pauses = [note.split("again in ")[1] for note in house.notes if "again in " in note]
    assert pauses == ["0.0 s", "0.5 s"]
    keeping.cancel()
    await keeper.end(asyncio.Event())


async def test_an_obedient_part_is_not_forced(house: House) -> None:
    keeper = house.keeper(OBEDIENT, "up")
    keeping = await until_ready(keeper)

    keeping.cancel()
    await keeper.end(asyncio.Event())

    assert house.notes[-1].split() == ["part", "ended"]


async def test_a_part_that_never_comes_up_is_given_up_with_its_last_words(house: House) -> None:
    keeper = house.keeper(BROKEN, "up")

    with pytest.raises(PartFailed, match=r"ended \(exit code 1\), 3 times(.|\n)*no such thing as a working part"):
        await asyncio.wait_for(keeper.keep(), 30)


async def test_what_a_killed_run_left_behind_is_found_by_the_mark_of_its_folder(house: House, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    keeper = house.keeper(STUBBORN, "grandchild")
    keeping = await until_ready(keeper)
    keeping.cancel()

    assert processes.kill(processes.folder_mark(other)) == 0
    assert lives(keeper.pid)
    assert processes.kill(processes.folder_mark(house.folder)) == 2
    await keeper.end(asyncio.Event())
