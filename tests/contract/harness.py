"""The same attempts on Ray and on the fake: a script in place of the dataset says what the child does.

A script is a list of ``{"do": verb, …}``; the verbs are the ``do_`` methods of ``scripted_child.Player``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from control_plane.states import Outcome, StopReason
from control_plane.storage import Storage
from scheduler.cluster.executor import RayExecutor
from scheduler.executor import AttemptSpec, Batch, Demand, Ending, Executor, ResumePoint, Stage, Unreachable, UpEvent
from tests.fakes import FakeExecutor
from tests.ray_cluster import RayCluster
from trainer.protocol import USER_FAULTS

Script = list[dict[str, Any]]
FOREVER: Script = [{"do": "train", "steps": 100_000}]
TOLERANCE_MS = 250
GRACE_S = 1.0
NEWEST = 1000
"""Epoch of a scheduler that nothing refuses."""
CHILD = (sys.executable, str(Path(__file__).with_name("scripted_child.py")))
_numbers = itertools.count(1)


class Harness(Protocol):
    """An executor, and a hand that can break what it runs."""

    executor: Executor

    async def spec(self, script: Script, **changes: Any) -> AttemptSpec: ...
    async def new_scheduler(self) -> None:
        """The scheduler's process is replaced; what runs goes on."""
        ...

    async def tear(self, point: ResumePoint) -> None: ...
    def kill_child(self, name: str) -> None: ...
    def kill_rank(self, name: str) -> None: ...
    def kill_supervisor(self, name: str) -> None: ...
    def remains(self, name: str) -> list[str]:
        """Processes and folders of an attempt."""
        ...


class Follower:
    """Polls one attempt as a scheduler does, from a cursor."""

    def __init__(self, executor: Executor, name: str, *, epoch: int = 1, allowance_ms: int | None = None) -> None:
        self.executor, self.name, self.epoch, self.allowance_ms = executor, name, epoch, allowance_ms
        self.events: list[UpEvent] = []
        self.batch: Batch | None = None

    @property
    def cursor(self) -> int:
        return self.events[-1].number if self.events else 0

    async def poll(self) -> Batch:
        while True:
            try:
                batch = await self.executor.poll(
                    self.name, self.cursor, epoch=self.epoch, allowance_ms=self.allowance_ms
                )
            except Unreachable:
                await asyncio.sleep(0.05)
                continue
            self.events += batch.events
            self.batch = batch
            return batch

    async def until(self, kind: str, count: int = 1, timeout_s: float = 20) -> dict[str, Any]:
        """The ``count``-th event of a kind, once it is there."""
        async with asyncio.timeout(timeout_s):
            while len(found := self.of(kind)) < count:
                batch = await self.poll()
                assert batch.ending is None or len(self.of(kind)) >= count, batch.ending
                await asyncio.sleep(0.03)
        return found[count - 1]

    async def to_the_end(self, timeout_s: float = 20) -> Ending:
        async with asyncio.timeout(timeout_s):
            while not (batch := await self.poll()).ending:
                await asyncio.sleep(0.03)
        assert batch.ending
        return batch.ending

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event.event for event in self.events if event.event["type"] == kind]

    def used_ms(self) -> int:
        assert self.batch
        return sum(sum(kinds.values()) for kinds in self.batch.usage.values())


async def until_all_is_free(executor: Executor) -> None:
    """A cluster's view of what is free lags a little behind."""
    async with asyncio.timeout(5):
        while (look := await executor.look()).free != look.total:
            await asyncio.sleep(0.03)


async def make_spec(storage: Storage, url: str, work_root: str, script: Script, **changes: Any) -> AttemptSpec:
    work_id = f"work{next(_numbers)}x{os.getpid()}"
    key = f"datasets/{work_id}"
    await storage.put(key, json.dumps(script).encode())
    kind = changes.pop("kind", "train")
    config: dict[str, Any] = {
        "kind": kind,
        "base_model": {"id": "b", "revision": "r", "source": {"kind": "folder", "location": "/nowhere"}},
        "cache_dir": str(Path(work_root).parent / "models"),
    }
    if kind == "train":
        lora = {"loraRank": 8, "loraAlpha": 16, "loraDropout": 0.0}
        hyperparameters = {"learningRate": 1e-4, "batchSize": 1, "numEpochs": 1, **lora}
        config |= {"job_id": work_id, "attempt": 1, "name": "test", "hyperparameters": hyperparameters}
    given: dict[str, Any] = {
        "name": f"{work_id}/1",
        "work_id": work_id,
        "number": 1,
        "config": config,
        "demand": Demand({"slot_cpu": 1}),
        "stage_in": (Stage(key, "dataset.jsonl"),),
        "artifact_prefix": f"mlflow/1/{work_id}/artifacts",
        "storage_url": url,
        "work_root": work_root,
        "epoch": 1,
    }
    return AttemptSpec(**{**given, **changes})


class RayHarness:
    def __init__(self, cluster: RayCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.url = (folder / "objects").as_uri()
        self.storage = Storage(self.url)
        self.work_root = folder / "work"
        self.executor = self._executor()

    def _executor(self, child_command: Sequence[str] = CHILD) -> RayExecutor:
        return RayExecutor(
            self.cluster.address,
            token_file=self.cluster.token_file,
            work_root=str(self.work_root),
            child_command=child_command,
            grace_s=GRACE_S,
        )

    async def spec(self, script: Script, **changes: Any) -> AttemptSpec:
        return await make_spec(self.storage, self.url, str(self.work_root), script, **changes)

    async def new_scheduler(self, child_command: Sequence[str] = CHILD) -> None:
        await self.executor.close()
        self.executor = self._executor(child_command)

    async def tear(self, point: ResumePoint) -> None:
        await self.storage.put(f"{point.key}/optimizer.bin", b"torn")

    def kill_child(self, name: str) -> None:
        self.child(name).kill()

    def freeze_supervisor(self, name: str) -> psutil.Process:
        supervisor = psutil.Process(self._pid(name))
        supervisor.suspend()
        return supervisor

    def kill_rank(self, name: str, rank: int = 0) -> None:
        psutil.Process(self._pid(f"{name}/r{rank}")).kill()

    def kill_supervisor(self, name: str) -> None:
        psutil.Process(self._pid(name)).kill()

    def child(self, name: str) -> psutil.Process:
        (child,) = self._processes(name)
        return child

    def remains(self, name: str) -> list[str]:
        folders = [str(path) for path in self.work_root.glob(f"{name.replace('/', '-')}-*")]
        return folders + [str(process) for process in self._processes(name)]

    def _processes(self, name: str) -> list[psutil.Process]:
        stem = str(self.work_root / name.replace("/", "-"))
        processes = psutil.process_iter(["cmdline"])
        return [p for p in processes if any(part.startswith(stem) for part in p.info["cmdline"] or [])]

    def _pid(self, actor: str) -> int:
        from scheduler.cluster import gcs

        (row,) = [row for row in gcs.live_actors() if row.name == actor]
        return row.pid


class FakeHarness:
    """Plays the scripts on the fake, in real time."""

    def __init__(self, folder: Path) -> None:
        self.url = (folder / "objects").as_uri()
        self.storage = Storage(self.url)
        self.work_root = folder / "work"
        self.executor = self.fake = FakeExecutor(clock=time.time)
        self.scripts: dict[str, Script] = {}
        self.players: dict[str, asyncio.Task[None]] = {}

    async def spec(self, script: Script, **changes: Any) -> AttemptSpec:
        spec = await make_spec(self.storage, self.url, str(self.work_root), script, **changes)
        self.players[spec.name] = asyncio.create_task(self._play(spec, script))
        return spec

    async def new_scheduler(self) -> None: ...

    async def tear(self, point: ResumePoint) -> None:
        self.fake.torn.add(point.checkpoint_id)

    def kill_child(self, name: str) -> None:
        self._fault(name, "CHILD_KILLED", "the trainer was ended by SIGKILL")

    def kill_rank(self, name: str) -> None:
        self._fault(name, "RANK_DIED", "the actor died")

    def kill_supervisor(self, name: str) -> None:
        self.players[name].cancel()
        self.fake.lose(name)

    def remains(self, name: str) -> list[str]:
        return [] if not self.fake.attempts[name].meters else [name]

    def _fault(self, name: str, code: str, message: str) -> None:
        self.players[name].cancel()
        self.fake.end(name, Outcome.FAULT, code=code, message=message)

    async def _play(self, spec: AttemptSpec, script: Script) -> None:
        name = spec.name
        while name not in self.fake.attempts or not (attempt := self.fake.attempts[name]).meters:
            await asyncio.sleep(0.01)
        attempt.on_stop = lambda reason: None
        for line in script:
            arguments = dict(line)
            await getattr(self, "_do_" + arguments.pop("do"))(name, **arguments)
            if attempt.ending:
                return

    async def _do_emit(self, name: str, event: dict[str, Any]) -> None:
        self.fake.emit(name, event)

    async def _do_sleep(self, name: str, s: float) -> None:
        await asyncio.sleep(s)

    async def _do_adapter(self, name: str, step: int) -> None:
        key = f"{self.fake.attempts[name].spec.artifact_prefix}/adapter/adapter_config.json"
        self.fake.emit(name, {"type": "adapter", "files": {"adapter_config.json": {"key": key}}, "best_step": step})

    async def _do_finish(self, name: str, step: int = 0) -> None:
        self.fake.emit(name, {"type": "finished", "outcome": "completed", "step": step})
        self.fake.end(name, Outcome.COMPLETED)

    async def _do_fail(self, name: str, code: str) -> None:
        self.fake.emit(name, {"type": "failed", "code": code, "message": "it went wrong"})
        outcome = Outcome.FAILED if code in USER_FAULTS else Outcome.FAULT
        self.fake.end(name, outcome, code=code, message="it went wrong do better", stack="stack")

    async def _do_exit(self, name: str, code: int, stderr: str) -> None:
        message = f"the trainer exited with code {code} and no last event"
        self.fake.end(name, Outcome.FAULT, code="CHILD_EXITED", message=message, stack=stderr)

    async def _do_train(self, name: str, steps: int, every_s: float = 0.02, checkpoint_every: int = 0) -> None:
        attempt = self.fake.attempts[name]
        self.fake.emit(name, {"type": "phase", "name": "training"})
        for step in range(1, steps + 1):
            await asyncio.sleep(every_s)
            self.fake.emit(name, {"type": "metrics", "step": step, "epoch": 0, "training_loss": 1 / step})
            if attempt.stop_reason:
                self.fake.emit(name, {"type": "phase", "name": "saving"})
                self.fake.store(name, step)
                reason: StopReason = attempt.stop_reason
                self.fake.emit(name, {"type": "finished", "outcome": "stopped", "step": step, "reason": reason})
                return self.fake.end(name, Outcome.STOPPED)
            if checkpoint_every and step % checkpoint_every == 0:
                self.fake.store(name, step)

    async def _do_hang(self, name: str) -> None:
        """As the supervisor's watch would end it."""
        attempt = self.fake.attempts[name]
        since = time.monotonic()
        while not attempt.stop_reason and time.monotonic() - since < attempt.spec.hang_floor_s:
            await asyncio.sleep(0.02)
        code = "HUNG"
        if attempt.stop_reason:
            await asyncio.sleep(GRACE_S)
            code = "UNRESPONSIVE"
        self.fake.end(name, Outcome.FAULT, code=code)
