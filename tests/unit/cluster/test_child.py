from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from scheduler.cluster.child import Child, exit_reason, oom_kills, scrubbed_env
from trainer.protocol import ChildEvent, Finished, Log, Metrics

ENV = scrubbed_env(os.environ, home=Path.cwd(), cache_dir=Path.cwd(), threads=1)


async def run(program: str, tmp_path: Path) -> tuple[Child, list[ChildEvent], int]:
    child = await Child.start([sys.executable, "-c", program], env=ENV, cwd=tmp_path)
    events = [event async for event in child.events()]
    return child, events, await child.wait()


async def test_events_and_what_is_none(tmp_path: Path) -> None:
    program = """
print('{"type": "metrics", "step": 1, "epoch": 0, "training_loss": 0.5, "learning_rate": 0.1}')
print("Traceback or so")
print('{"type": "unheard-of"}')
print('{"type": "finished", "outcome": "completed"}')
"""
    _, events, code = await run(program, tmp_path)

    metrics, first, second, finished = events
    assert isinstance(metrics, Metrics)
    assert isinstance(finished, Finished)
    for warning in (first, second):
        assert isinstance(warning, Log)
        assert warning.level == "WARNING"
    assert "Traceback or so" in first.message
    assert code == 0


async def test_a_line_without_end_is_survived(tmp_path: Path) -> None:
    program = """
import sys
sys.stdout.write("x" * 20_000_000 + "\\n")
print('{"type": "finished", "outcome": "completed"}')
"""
    _, events, _ = await run(program, tmp_path)

    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, Log) for event in events[:-1])
    assert sum(len(event.message) for event in events[:-1] if isinstance(event, Log)) < 10_000


async def test_the_end_of_stderr_is_kept(tmp_path: Path) -> None:
    child, _, code = await run(
        "import sys\nfor i in range(500): print('line', i, file=sys.stderr)\nsys.exit(4)", tmp_path
    )

    assert code == 4
    assert child.stderr_tail().splitlines()[-1] == "line 499"
    assert len(child.stderr_tail()) < 20_000


async def test_a_stop_request_arrives(tmp_path: Path) -> None:
    child = await Child.start([sys.executable, "-c", "print(input())"], env=ENV, cwd=tmp_path)
    await child.stop("PAUSE")
    (event,) = [event async for event in child.events()]

    assert isinstance(event, Log)
    assert '"reason":"PAUSE"' in event.message
    await child.wait()
    await child.stop("PAUSE")


async def test_killing_takes_the_whole_process_group(tmp_path: Path) -> None:
    program = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid); time.sleep(60)"
    child = await Child.start([sys.executable, "-uc", program], env=ENV, cwd=tmp_path)
    events = child.events()
    first = await anext(events)
    assert isinstance(first, Log)
    grandchild = int(first.message.rsplit(" ", 1)[1])

    child.kill()
    child.kill()

    assert await child.wait() == -9
    assert not child.running
    for _ in range(100):
        if not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the grandchild lives on")


def test_exit_reasons() -> None:
    assert exit_reason(-9) == ("CHILD_KILLED", "the trainer was ended by SIGKILL")
    assert exit_reason(-9, out_of_memory=True)[0] == "OUT_OF_MEMORY"
    assert exit_reason(3) == ("CHILD_EXITED", "the trainer exited with code 3 and no last event")


@pytest.mark.parametrize(
    ("program", "by_us", "kills", "out_of_memory"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", False, 1, True),
        ("os.kill(os.getpid(), signal.SIGKILL)", False, 0, False),
        ("os.kill(os.getpid(), signal.SIGTERM)", False, 1, False),
        ("time.sleep(60)", True, 1, False),
        ("pass", False, 1, False),
    ],
)
async def test_whether_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, by_us: bool, kills: int, out_of_memory: bool
) -> None:
    counter = iter((7, 7 + kills))
    monkeypatch.setattr("scheduler.cluster.child.oom_kills", lambda: next(counter))
    child = await Child.start([sys.executable, "-c", f"import os, signal, time; {program}"], env=ENV, cwd=tmp_path)
    if by_us:
        child.kill()
    await child.wait()
    assert child.out_of_memory is out_of_memory


@pytest.mark.parametrize(("told", "out_of_memory"), [(0, True), (1, True), (2, False)])
async def test_what_the_kernel_ended_before_the_child_last_told_something_was_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int, out_of_memory: bool
) -> None:
    """One sample may already know of its death: its last words were still on their way."""
    counter = iter((7, 8, 8, 8))
    monkeypatch.setattr("scheduler.cluster.child.oom_kills", lambda: next(counter))
    monkeypatch.setattr("scheduler.cluster.child.OOM_SAMPLES_S", 0)
    program = f"import os\nfor _ in range({told}): print('step', flush=True)\nos.kill(os.getpid(), 9)"
    child, events, code = await run(program, tmp_path)
    assert (len(events), code, child.out_of_memory) == (told, -9, out_of_memory)


def test_the_kernels_counter_is_that_of_the_group_or_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/vmstat": "nr_free_pages 5\noom_kill 11\n"}

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert oom_kills() == 11
    files["/proc/self/cgroup"] = "9:name=systemd:/\n"
    assert oom_kills() == 11
    files["/proc/self/cgroup"] = "0::/workers/a\n"
    assert oom_kills() == 11
    files["/sys/fs/cgroup/workers/a/memory.events"] = "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"
    assert oom_kills() == 2
    files.clear()
    assert oom_kills() == 0


def test_nothing_secret_passes() -> None:
    parent = {
        "PATH": "/bin",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "RAY_AUTH_TOKEN_PATH": "x",
        "BRIGHTRUN_DATABASE_URL": "x",
        "HTTPS_PROXY": "http://user:password@proxy",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    assert scrubbed_env(parent, home=Path("/w"), cache_dir=Path("/c"), threads=3) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": "/w",
        "TMPDIR": "/w",
        "HF_HOME": "/c/huggingface",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "PYTHONUNBUFFERED": "1",
    }
