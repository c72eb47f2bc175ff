"""The supervisor of one attempt: a detached, named actor without GPU that owns the gang and answers the scheduler.

It outlives schedulers. Its placement group and its ranks do not outlive it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from control_plane.states import Outcome, StopReason
from scheduler.cluster import gcs
from scheduler.cluster.eventlog import EventLog
from scheduler.cluster.rank import Rank, Report
from scheduler.cluster.watch import GRACE_S, Watch
from scheduler.executor import AttemptSpec, Batch, Ending, RankTimes, StaleEpoch
from trainer.config import World

log = logging.getLogger(__name__)
POLL_S = 0.2
RANK_ANSWER_S = 5.0
RANK_SILENCE_S = 120.0
"""A rank that answers nothing for so long is ended, which makes its death certain."""
PENDING_REASONS = frozenset({"NO_RESOURCES", "INFEASIBLE"})
DEATH_S = 10.0
"""A gang that is not gone after so long is ended once more."""
FORCE_S = 3.0
"""How long a rank may take to end an overdue child; then the gang is ended from here."""


class Member:
    """A rank of the gang as the supervisor knows it."""

    def __init__(self, handle: ActorHandle) -> None:
        self.handle = handle
        self.cursor = 0
        self.report: Report | None = None
        self.beats = 0
        self.silent_since: float | None = None

    @property
    def state(self) -> str:
        return self.report.state if self.report else "preparing"


class Supervisor:
    """The actor. Every method may be called twice."""

    def __init__(self, spec: AttemptSpec, child_command: list[str], grace_s: float = GRACE_S) -> None:
        self._spec, self._child_command = spec, child_command
        self._epoch = spec.epoch
        self._allowance_ms = spec.allowance_ms
        self._folder = Path(spec.work_root) / f"{spec.work_id}-{spec.number}-s"
        self._log = EventLog(self._folder / "events.jsonl")
        always = spec.config.get("kind") == "verdict"
        self._watch = Watch(hang_floor_s=spec.hang_floor_s, grace_s=grace_s, always=always)
        self._state = "pending"
        self._stop: StopReason | None = None
        self._group: PlacementGroup | None = None
        self._gang: list[Member] = []
        self._usage: dict[str, dict[str, int]] = {}
        self._ending: Ending | None = None
        self._task = asyncio.create_task(self._run())

    # What the scheduler calls.

    @ray.method(enable_task_events=False)
    async def poll(self, cursor: int, epoch: int, allowance_ms: int | None) -> Batch:
        """See ``Executor.poll``. Raises StaleEpoch."""
        self._fence(epoch)
        self._allowance_ms = allowance_ms
        self._log.acknowledge(cursor)
        events = self._log.after(cursor)
        complete = (events[-1].number if events else cursor) >= self._log.last
        return Batch(events, self._usage, self._ending if complete else None, self._state)

    async def stop(self, reason: str, epoch: int) -> None:
        """See ``Executor.stop``. Raises StaleEpoch."""
        self._fence(epoch)
        self._request_stop(StopReason(reason))

    async def shutdown(self, epoch: int) -> bool:
        """End the gang at once; the caller then ends this actor. Whether it left nothing. Raises StaleEpoch."""
        self._fence(epoch)
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._disband()
        try:
            self._log.discard_spill()
            if self._folder.is_dir():
                self._folder.rmdir()
        except OSError:
            return False
        return all(member.state == "ended" for member in self._gang)

    def _fence(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise StaleEpoch(f"epoch {epoch} is over: {self._epoch} has called")
        self._epoch = epoch

    def _request_stop(self, reason: StopReason) -> None:
        if self._ending is None and self._stop is None:
            self._stop = reason
            self._watch.stopping()
            if self._state == "running":
                self._state = "stopping"

    # What it does by itself.

    async def _run(self) -> None:
        try:
            ending = await self._attempt()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            ending = Ending(Outcome.FAULT, "SUPERVISOR_ERROR", message, traceback.format_exc())
        if ending.outcome in (Outcome.FAULT, Outcome.STOPPED) and ending.stop_reason is None:
            ending.stop_reason = self._stop
        ending.times = await self._disband()
        self._ending, self._state = ending, "ended"

    async def _attempt(self) -> Ending:
        if not await self._place():
            return Ending(Outcome.STOPPED)
        self._state = "starting"
        self._gang = [Member(self._create_rank(rank)) for rank in range(self._spec.demand.ranks)]
        self._watch.begin()
        launched = False
        while True:
            try:
                await asyncio.gather(*(self._ask(member) for member in self._gang))
            except RayActorError as death:
                return Ending(Outcome.FAULT, "RANK_DIED", str(death))
            ending = self._collect() or self._by_force()
            if ending:
                return ending
            if self._stop and not launched:
                return Ending(Outcome.STOPPED)
            if launched or all(member.state == "ready" for member in self._gang):
                launched = launched or self._announce()
                self._govern()
            await asyncio.sleep(POLL_S)

    async def _place(self) -> bool:
        """Wait for the gang's place; False when asked to stop before there was one."""
        demand = self._spec.demand
        bundle = {**demand.resources, **({"GPU": demand.num_gpus} if demand.num_gpus else {})}
        labels = [demand.labels] * demand.ranks if demand.labels else None
        self._group = placement_group([bundle] * demand.ranks, name=self._spec.name, bundle_label_selector=labels)
        said, pause_s = None, 0.02
        while not self._stop:
            state, reason = await asyncio.to_thread(gcs.placement, self._group)
            if state == "CREATED":
                return True
            if reason in PENDING_REASONS and reason != said:
                self._note({"type": "pending", "reason": reason})
                said = reason
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.5)
        return False

    def _create_rank(self, rank: int) -> ActorHandle:
        demand = self._spec.demand
        options = {
            "name": f"{self._spec.name}/r{rank}",
            "num_cpus": 0,
            "num_gpus": demand.num_gpus,
            "resources": demand.resources,
            "max_restarts": 0,
            "enable_task_events": False,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank),
        }
        return ray.remote(Rank).options(**options).remote(self._spec, rank, self._child_command)

    async def _ask(self, member: Member) -> None:
        """Refresh a member's report. Raises RayActorError when it is certainly dead; unavailable is not dead."""
        now = asyncio.get_running_loop().time()
        try:
            member.report = await self._answer(member.handle.poll.remote(member.cursor))
            member.silent_since = None
        except (TimeoutError, ActorUnavailableError):
            member.silent_since = member.silent_since or now
            if now - member.silent_since > RANK_SILENCE_S:
                ray.kill(member.handle, no_restart=True)

    async def _answer(self, call: Any) -> Any:
        async with asyncio.timeout(RANK_ANSWER_S):
            return await call

    def _collect(self) -> Ending | None:
        """Take over what the reports say; the attempt's ending once a rank has failed or all have ended."""
        endings = []
        for rank, member in enumerate(self._gang):
            report = member.report
            if report is None:
                continue
            if self._spec.demand.metered:
                self._usage[str(rank)] = report.usage
            if report.beats != member.beats:
                member.beats = report.beats
                self._watch.beat()
            for number, at, event in report.events:
                if number > member.cursor:
                    member.cursor = number
                    self._note(event, at)
            if report.ending and member.cursor >= report.last:
                endings.append(report.ending)
        failed = (ending for ending in endings if ending.outcome in (Outcome.FAILED, Outcome.FAULT))
        everyone = endings[0] if len(endings) == len(self._gang) else None
        self._check_allowance()
        return next(failed, everyone)

    def _check_allowance(self) -> None:
        if self._beyond_allowance_ms() >= 0:
            self._request_stop(StopReason.BUDGET)

    def _beyond_allowance_ms(self) -> float:
        used_ms = sum(sum(kinds.values()) for kinds in self._usage.values())
        return -math.inf if self._allowance_ms is None else used_ms - self._allowance_ms

    def _by_force(self) -> Ending | None:
        """The attempt's ending when asking has not helped; the gang is then ended from here."""
        over_ms, overdue = self._beyond_allowance_ms(), self._watch.overdue()
        if over_ms >= self._spec.overrun_ms:
            return Ending(Outcome.FAULT, "OVER_ALLOWANCE", f"not stopped {over_ms:.0f} GPU-ms beyond what was granted")
        if overdue and overdue.by_s > FORCE_S:
            return Ending(Outcome.FAULT, overdue.code, overdue.message)
        return None

    def _announce(self) -> bool:
        """All ranks are up."""
        first = self._gang[0].report
        assert first
        resumed = first.resumed
        self._note(
            {
                "type": "started",
                "node": first.node,
                "ranks": len(self._gang),
                "checkpoint_id": resumed.checkpoint_id if resumed else None,
                "step": resumed.step if resumed else 0,
            }
        )
        self._state = "running"
        return True

    def _govern(self) -> None:
        """Send each rank what it has not yet acted upon; repeated until its report shows it."""
        first = self._gang[0].report
        assert first
        size = len(self._gang)
        overdue = self._watch.overdue()
        for rank, member in enumerate(self._gang):
            if member.silent_since is not None:
                continue
            if member.state == "ready":
                member.handle.launch.remote(World(rank, size, first.rendezvous if size > 1 else None))
            elif overdue:
                member.handle.give_up.remote(overdue.code, overdue.message)
            elif self._stop and member.report and not member.report.stopping:
                member.handle.stop.remote(self._stop)

    def _note(self, event: dict[str, Any], at: float | None = None) -> None:
        if event["type"] == "stored":
            event = {**event, "usage": self._gang_usage(event["usage"])}
        self._watch.heard(event)
        self._log.append(event, at)

    def _gang_usage(self, stamp: dict[str, int]) -> dict[str, dict[str, int]]:
        """Usage of all ranks when the first took a stamp: the others go in step with it, and never beyond."""
        others = {
            rank: {kind: min(spent, stamp.get(kind, 0)) for kind, spent in kinds.items()}
            for rank, kinds in self._usage.items()
        }
        return {**others, "0": stamp} if self._spec.demand.metered else {}

    async def _disband(self) -> list[RankTimes]:
        """End the ranks and free their place, however long that takes: until then they may hold their GPUs. Their exact
        times, as Ray has recorded them."""
        clock = asyncio.get_running_loop().time
        patient = True
        while True:
            again_at = clock() + DEATH_S
            try:
                self._kill_gang()
                while clock() < again_at:
                    times = await asyncio.to_thread(self._ends, patient)
                    if times is not None:
                        return times
                    await asyncio.sleep(0.02)
            except Exception as error:
                log.warning("the end of %s's ranks could not be seen: %s", self._spec.name, error)
                await asyncio.sleep(POLL_S)
            patient = False

    def _kill_gang(self) -> None:
        for member in self._gang:
            ray.kill(member.handle, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)

    def _ends(self, patient: bool) -> list[RankTimes] | None:
        """The ranks' times, if all are dead and their place is free. One that Ray does not know may be on its way to be
        created, as long as one is ``patient``; after that it never will be."""
        rows = [gcs.actor(member.handle._actor_id.hex()) for member in self._gang]
        dead = all(row.dead if row else not patient for row in rows)
        free = self._group is None or gcs.placement(self._group)[0] == "REMOVED"
        return [row.rank for row in rows if row and row.rank] if dead and free else None
