"""The two scenes: many jobs on the fake cluster, some on a real one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil

from benchmarks.adoption.room import Adoption, Room, statuses, step
from benchmarks.adoption.wire import served
from control_plane.states import Status
from scheduler.simulator.executor import FakeExecutor
from tests.ray_cluster import ray_cluster


async def on_the_fake(folder: Path, jobs: int, database_url: str = "") -> Adoption:
    """Raises AssertionError unless every job goes on as it was."""
    fake = FakeExecutor({"slot_cpu": float(jobs)}, clock=time.time)
    room = Room(folder, database_url=database_url)
    await room.create()
    await room.run_on(fake, jobs)
    socket = folder / "cluster.sock"
    stepping = asyncio.create_task(step(fake))
    try:
        async with served(fake, socket):
            adoption = await room.adoption(f"socket:{socket}", jobs)
        assert all(attempt.alive and attempt.state == "running" for attempt in fake.attempts.values())
        assert len(fake.attempts) == jobs
        assert await statuses(room.database) == {Status.RUNNING}
    finally:
        stepping.cancel()
        await room.close()
    return adoption


async def on_ray(folder: Path, jobs: int) -> Adoption:
    """Raises AssertionError unless every job goes on in the very processes that it had."""
    with ray_cluster(cpu_slots=jobs) as cluster:
        room = Room(folder, cpu_slots=jobs)
        await room.create()
        await room.queue(jobs)
        target = f"ray:{cluster.address}:{cluster.token_file}"
        async with room.scheduler(target, jobs) as first:
            await first.until("adopted")
            before = children(room)
        assert len(before) == jobs
        adoption = await room.adoption(target, jobs)
        assert children(room) == before
        await room.close()
    return adoption


def children(room: Room) -> dict[int, str]:
    """The trainer children: pid → the folder that its command line names."""
    stem = str(room.settings.work_dir)
    found = {}
    for process in psutil.process_iter(["pid", "cmdline"]):
        named = [part for part in process.info["cmdline"] or [] if part.startswith(stem)]
        if named:
            found[process.info["pid"]] = named[0]
    return found
