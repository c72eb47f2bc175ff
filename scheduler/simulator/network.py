"""How a process reaches what is outside of it: the cluster, MLflow and the object store, over a network that is slow,
loses answers, and delivers some calls again when nobody waits for them any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

from scheduler.carrier import Mail, Post, Undelivered
from scheduler.executor import AttemptGone, AttemptSpec, Batch, Look, RankTimes, StaleEpoch, Unreachable
from scheduler.simulator.clock import Process
from scheduler.simulator.faults import StoreFault
from scheduler.simulator.tracking import FakeTracking
from scheduler.tracking import Metric, Run, TrackingDown

T = TypeVar("T")
Call = Callable[[], Awaitable[T]]
CALL_S = 5.0
"""After so long the real executor answers by itself that there was no answer."""


class ClusterClient:
    """The executor as one process has it: a driver, which is of no use any more once its cluster is gone."""

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world
        self._cluster_id: str | None = None

    async def look(self) -> Look:
        try:
            return await self._ask("look", self._world.cluster.look)
        except Unreachable:
            return Look(reachable=False, bound=self._cluster_id is not None)

    async def start(self, spec: AttemptSpec) -> None:
        await self._ask("start", lambda: self._world.cluster.start(spec))

    async def poll(self, name: str, cursor: int, *, epoch: int, allowance_ms: int | None) -> Batch:
        cluster = self._world.cluster
        return await self._ask("poll", lambda: cluster.poll(name, cursor, epoch=epoch, allowance_ms=allowance_ms))

    async def stop(self, name: str, reason: str, *, epoch: int) -> None:
        await self._ask("stop", lambda: self._world.cluster.stop(name, reason, epoch=epoch))

    async def times(self, name: str) -> list[RankTimes]:
        return await self._ask("times", lambda: self._world.cluster.times(name))

    async def release(self, name: str, *, epoch: int) -> None:
        await self._ask("release", lambda: self._world.cluster.release(name, epoch=epoch))

    async def close(self) -> None: ...

    async def _ask(self, method: str, call: Call[T]) -> T:
        """One call there and back. Raises Unreachable, and what ``call`` raises."""
        world, process = self._world, self._process
        await world.hazards.call(process)
        fate = world.hazards.fate(method)
        await asyncio.sleep(world.hazards.latency_s())
        process.check()
        self._connected()
        answer = await call()
        self._connected()
        if fate == "call_repeated":
            world.background(self._again(call))
        elif fate == "answer_lost":
            await asyncio.sleep(CALL_S)
            raise Unreachable("no answer")
        elif fate == "answer_late":
            await asyncio.sleep(CALL_S - 0.1)
        process.check()
        return answer

    def _connected(self) -> None:
        cluster = self._world.cluster
        reachable = self._world.hazards.reaches_cluster(self._process)
        if reachable and self._cluster_id is None:
            self._cluster_id = cluster.cluster_id
        if not reachable or cluster.cluster_id != self._cluster_id:
            raise Unreachable("the cluster does not answer")

    async def _again(self, call: Call[Any]) -> None:
        """A copy of the call that was under way for long."""
        await asyncio.sleep(self._world.hazards.rng.uniform(0.5, 30.0))
        with suppress(Unreachable, AttemptGone, StaleEpoch):
            self._connected()
            await call()


class TrackingClient:
    """MLflow's client as one process has it."""

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world

    async def ensure_run(self, *, team_id: str, job_id: str, name: str) -> Run:
        return await self._ask(lambda mlflow: mlflow.ensure_run(team_id=team_id, job_id=job_id, name=name))

    async def log(self, run_id: str, metrics: list[Metric], params: dict[str, str], tags: dict[str, str]) -> None:
        await self._ask(lambda mlflow: mlflow.log(run_id, metrics, params, tags))

    async def set_status(self, run_id: str, status: str, ended: datetime | None) -> None:
        await self._ask(lambda mlflow: mlflow.set_status(run_id, status, ended))

    async def settle(self, run_id: str, *, team_id: str, job_id: str) -> None:
        await self._ask(lambda mlflow: mlflow.settle(run_id, team_id=team_id, job_id=job_id))

    async def close(self) -> None: ...

    async def _ask(self, call: Callable[[FakeTracking], Awaitable[T]]) -> T:
        world = self._world
        await world.hazards.call(self._process)
        await asyncio.sleep(world.hazards.latency_s())
        self._process.check()
        answer = await call(world.tracking)
        if world.hazards.fate("tracking") == "answer_lost":
            raise TrackingDown("no answer")
        return answer


class Messenger:
    """The way out of the house as one process has it: letters to the one webhook that there is."""

    mails = False

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world

    async def post(self, letter: Post) -> None:
        world = self._world
        await world.hazards.call(self._process)
        await asyncio.sleep(world.hazards.latency_s())
        self._process.check()
        if world.receiver_failing:
            raise Undelivered("It answered HTTP 500")
        world.oracle.letters.received(letter.id)
        if world.hazards.fate("post") == "answer_lost":
            raise Undelivered("No answer")

    async def mail(self, letter: Mail) -> None:
        raise Undelivered("No mail", final=True)


class Objects:
    """The object store. ``keys``: the checkpoints that are there."""

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}
        self.failing = False


class ObjectClient:
    """The object store as one process has it."""

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world

    async def list(self, prefix: str) -> list[tuple[str, int]]:
        await self._reach()
        return [(f"{key}/manifest.json", 1) for key in self._world.objects.keys if f"{key}/" == prefix]

    async def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            await self._reach()
            self._world.objects.keys.pop(key.rpartition("/")[0], None)

    async def _reach(self) -> None:
        await self._world.hazards.call(self._process)
        await asyncio.sleep(self._world.hazards.latency_s())
        self._process.check()
        if self._world.objects.failing:
            raise StoreFault("the object store does not answer")
