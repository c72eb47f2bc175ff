"""The simulated cluster: what its trainers do, and the ground truth of who held which slot from when to when.

The truth is written down where ranks come and go; neither meters nor the ledger have a part in it.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from control_plane.states import Outcome, StopReason
from scheduler.executor import Batch, Liveness, Look, RankTimes, ResumePoint, Unreachable
from scheduler.simulator.executor import FakeAttempt, FakeExecutor, needs
from scheduler.simulator.inhabitants import REPORT

if TYPE_CHECKING:
    from scheduler.simulator.world import World

SIGHT_S = 1.0
"""How often a supervisor looks at what it supervises."""
HARD_LIMIT_MS = 25_000
GRACE_S = 12.0
HANG_S = 15.0
DETECTION_S = 12.0
"""From the loss of a node until the cluster says so."""


@dataclass
class Stay:
    """A rank on its slot; milliseconds since the epoch."""

    rank: int
    begin_ms: int
    end_ms: int | None = None


@dataclass
class Stamp:
    """A checkpoint as it came into the object store."""

    key: str
    step: int
    used_ms: int
    """What all ranks had held by then."""


@dataclass
class Fact:
    """What really happened to one attempt."""

    name: str
    work_id: str
    number: int
    ranks: int
    metered: bool
    cluster_id: str
    stays: list[Stay] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    resumed_from: str | None = None
    """Key of the checkpoint that it went on from."""
    loaded_ms: int | None = None
    """What all ranks had held when training began."""
    first_step: int = 0
    """… and the step from which it went on."""
    heard_ms: int = 0
    """Held by the last event that a scheduler has stored: it asked for those after it."""
    unheard_ms: int = 0
    """Held in a cluster that was lost before a scheduler heard of it."""
    ends_hidden: bool = False
    """The cluster never told, or told too late, when its ranks ended."""

    @property
    def known_ms(self) -> int:
        """Of what it held in all, what somebody could know."""
        return (self.heard_ms if self.ends_hidden else self.held_ms(0)) - self.unheard_ms

    def held_ms(self, until_ms: int) -> int:
        return sum((stay.end_ms or until_ms) - stay.begin_ms for stay in self.stays)

    def held_by(self, at_ms: int) -> int:
        return sum(max(0, min(stay.end_ms or at_ms, at_ms) - stay.begin_ms) for stay in self.stays)

    @property
    def holds(self) -> bool:
        return any(stay.end_ms is None for stay in self.stays)


@dataclass(frozen=True)
class Training:
    """What a job's training takes."""

    steps: int
    step_s: float
    load_s: float
    save_s: float
    checkpoint_every: int

    @classmethod
    def draw(cls, rng: random.Random) -> Training:
        return cls(
            steps=rng.choice((4, 5, 6, 7, 8, 9, 10, 11, 20)),
            step_s=rng.choice((1.0, 1.7, 2.5, 3.3)),
            load_s=rng.choice((1.0, 3.0, 6.0)),
            save_s=rng.choice((0.2, 0.7, 1.3)),
            checkpoint_every=rng.randint(2, 5),
        )

    @property
    def whole_s(self) -> float:
        """All of it, undisturbed."""
        return self.load_s + self.steps * (self.step_s + self.save_s)


class Cluster(FakeExecutor):
    """Levers as of ``FakeExecutor``, and ``strike``."""

    def __init__(self, world: World, total: dict[str, float]) -> None:
        super().__init__(total, clock=world.clock.date_s)
        self.world = world
        self.facts: dict[str, Fact] = {}
        self.children: dict[str, Child] = {}
        self.unknown: dict[str, float] = {}
        """Supervisors of which the cluster cannot say whether they live, until when."""
        self.silent: set[str] = set()
        """Supervisors that are dead or cut off, of which the cluster does not know yet."""
        self.end_known_s: dict[str, float] = {}
        """When the cluster records the ends of an attempt's ranks, where that takes long."""
        self._trainings: dict[str, Training] = {}
        self._torn: dict[str, bool] = {}
        self._rng = world.rng("cluster")

    @property
    def cluster_id(self) -> str:
        return f"cluster-{self.cluster}"

    async def look(self) -> Look:
        look = await super().look()
        now = self.world.clock.now
        for name in look.actors:
            if self.unknown.get(name, 0.0) > now:
                look.actors[name] = Liveness.UNKNOWN
        return look

    async def poll(self, name: str, cursor: int, *, epoch: int, allowance_ms: int | None) -> Batch:
        batch = await super().poll(name, cursor, epoch=epoch, allowance_ms=allowance_ms)
        fact = self.facts.get(name)
        if cursor and fact is not None:
            stored = self.attempts[name].events[cursor - 1]
            fact.heard_ms = max(fact.heard_ms, fact.held_by(round(stored.at * 1000)))
        return batch

    async def times(self, name: str) -> list[RankTimes]:
        times = await super().times(name)
        if self.world.clock.now < self.end_known_s.get(name, 0.0):
            return [RankTimes(rank.rank, rank.start_ms, 0, rank.node) for rank in times]
        return times

    def _reach(self, name: str, epoch: int) -> FakeAttempt:
        if name in self.silent:
            raise Unreachable("no answer")
        return super()._reach(name, epoch)

    # What becomes of attempts.

    def training_of(self, work_id: str) -> Training:
        if work_id not in self._trainings:
            self._trainings[work_id] = Training.draw(self._rng)
        return self._trainings[work_id]

    def new_cluster(self) -> None:
        """The head is started anew. In an embedded installation its old family was ended before; elsewhere nodes, and
        what runs there, go on for a while, known to nobody, and their slots come to the new cluster after that."""
        old = [attempt for attempt in self.attempts.values() if attempt.meters]
        super().new_cluster()
        for name in self.world.oracle.open_attempts():
            if name in self.facts:
                self.facts[name].ends_hidden = True
        for attempt in old:
            if self.world.embedded:
                self._vacate(attempt)
            else:
                self.world.background(self._linger(attempt))

    async def _linger(self, attempt: FakeAttempt) -> None:
        self.children[attempt.spec.name].freeze()
        needed = needs(attempt.spec)
        for resource, count in needed.items():
            self.total[resource] -= count
        await asyncio.sleep(self._rng.uniform(0.4, 0.98) * self.world.settings.node_timeout_s)
        self._vacate(attempt)
        for resource, count in needed.items():
            self.total[resource] += count
        self.place()

    def new_fact(self, attempt: FakeAttempt) -> Fact:
        spec = attempt.spec
        fact = Fact(spec.name, spec.work_id, spec.number, spec.demand.ranks, spec.demand.metered, self.cluster_id)
        self.facts[spec.name] = fact
        return fact

    def _run(self, attempt: FakeAttempt) -> None:
        super()._run(attempt)
        name = attempt.spec.name
        started = attempt.events[-1].event
        keys = {point.checkpoint_id: point.key for point in attempt.spec.resume_points}
        self.facts[name].resumed_from = keys.get(started["checkpoint_id"])
        self.world.note("runs", name=name, step=started["step"])
        self.children[name] = Child(self, attempt, started["step"])

    def _occupy(self, attempt: FakeAttempt) -> None:
        super()._occupy(attempt)
        fact = self.facts.get(attempt.spec.name) or self.new_fact(attempt)
        begin_ms = round(self.clock() * 1000)
        fact.unheard_ms = max(0, fact.held_by(begin_ms) - fact.heard_ms)
        self.world.oracle.occupied(fact)
        fact.stays += [Stay(rank, begin_ms) for rank in range(fact.ranks)]

    def _vacate(self, attempt: FakeAttempt) -> None:
        super()._vacate(attempt)
        name = attempt.spec.name
        fact = self.facts.get(name)
        end_ms = round(self.clock() * 1000)
        for stay in fact.stays if fact else ():
            stay.end_ms = stay.end_ms or end_ms
        if name in self.children:
            self.children.pop(name).end()
            self.world.note("gone", name=name)

    def _is_whole(self, point: ResumePoint) -> bool:
        """A key once found torn stays so; what retention has deleted is not there."""
        if point.key not in self._torn:
            self._torn[point.key] = self.world.hazards.tears(point.key)
        return not self._torn[point.key] and point.key in self.world.objects.keys

    # The hand that breaks things.

    def running(self) -> list[str]:
        return [name for name, attempt in self.attempts.items() if attempt.meters and attempt.alive]

    async def strike(self, kind: str, rng: random.Random) -> bool:
        """Let something happen to one of the running attempts. False when there is none."""
        running = [name for name in self.running() if name in self.children and name not in self.silent]
        if not running:
            return False
        name = rng.choice(running)
        self.world.note(kind, name=name)
        child = self.children[name]
        match kind:
            case "child_crashed":
                self.end(name, Outcome.FAULT, code="CHILD_EXITED", message="the trainer exited with code 1")
            case "out_of_memory":
                self.emit(name, {"type": "failed", "code": "OUT_OF_MEMORY", "message": "too large"})
                self.end(name, Outcome.FAILED, code="OUT_OF_MEMORY", message="too large")
            case "child_hung":
                child.hung = True
            case "child_deaf":
                child.deaf = True
            case "rank_died":
                await self._lose_rank(name, rng.uniform(0.0, 0.9))
            case "supervisor_died":
                await self._lose_supervisor(name, rng.uniform(0.1, 2.0), ends_after_s=rng.choice((0.0, 0.0, 3.0, 8.0)))
            case "node_lost":
                await self._lose_supervisor(name, DETECTION_S, ends_after_s=0.0)
        return True

    async def _lose_rank(self, name: str, detection_s: float) -> None:
        """Its last report is some time older than the end that the cluster records."""
        attempt = self.attempts[name]
        attempt.measure()
        attempt.frozen = True
        self.children[name].freeze()
        await asyncio.sleep(detection_s)
        if not attempt.ending and self.attempts.get(name) is attempt and attempt.alive:
            self.end(name, Outcome.FAULT, code="RANK_DIED", message="the actor died")

    async def _lose_supervisor(self, name: str, detection_s: float, *, ends_after_s: float) -> None:
        attempt = self.attempts[name]
        self.silent.add(name)
        self.children[name].freeze()
        await asyncio.sleep(detection_s)
        self.silent.discard(name)
        if self.attempts.get(name) is not attempt or not attempt.alive:
            return
        if ends_after_s:
            self.end_known_s[name] = self.world.clock.now + ends_after_s
            self.facts[name].ends_hidden = ends_after_s > 4
        self.lose(name)


class Child:
    """The trainer of one attempt, and the part of its supervisor that watches it."""

    def __init__(self, cluster: Cluster, attempt: FakeAttempt, step: int) -> None:
        self._cluster, self._attempt, self._clock = cluster, attempt, cluster.world.clock
        self._fact = cluster.facts[attempt.spec.name]
        self._name = attempt.spec.name
        self.hung = self.deaf = False
        self._stop_since: float | None = None
        self._last_sign = self._clock.now
        attempt.on_stop = self._on_stop
        verdict = not attempt.spec.demand.metered
        self._tasks = [
            cluster.world.background(self._examine() if verdict else self._train(step)),
            cluster.world.background(self._watch()),
        ]

    def end(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    freeze = end

    def _on_stop(self, reason: StopReason) -> None:
        self._stop_since = self._clock.now

    def _emit(self, kind: str, **event: Any) -> None:
        self._cluster.emit(self._name, {"type": kind, **event})

    def _used_ms(self) -> int:
        return self._fact.held_ms(round(self._clock.date_s() * 1000))

    async def _train(self, step: int) -> None:
        training = self._cluster.training_of(self._fact.work_id)
        await asyncio.sleep(training.load_s)
        self._fact.loaded_ms, self._fact.first_step = self._used_ms(), step
        conversations = {"train_conversations": 9, "validation_conversations": 1}
        self._emit("plan", total_steps=training.steps, total_epochs=1, start_step=step, **conversations)
        self._emit("phase", name="training")
        while step < training.steps and not self._stops():
            await asyncio.sleep(training.step_s)
            if self.hung:
                await asyncio.get_running_loop().create_future()
            step += 1
            self._last_sign = self._clock.now
            figures = {"training_loss": 4.0 / step, "learning_rate": 1e-4, "throughput": 100.0}
            self._emit("metrics", step=step, epoch=0, **figures)
            if step % training.checkpoint_every == 0 and step < training.steps and not self._stops():
                await self._save(step, training)
        if step < training.steps:
            await self._save(step, training)
            self._emit("finished", outcome="stopped", step=step, reason=self._attempt.stop_reason)
            return self._cluster.end(self._name, Outcome.STOPPED)
        await self._finish(step, training)

    async def _save(self, step: int, training: Training) -> None:
        self._emit("phase", name="saving")
        await asyncio.sleep(training.save_s)
        self._last_sign = self._clock.now
        key = self._cluster.store(self._name, step)
        self._cluster.world.objects.keys[key] = None
        self._fact.stamps.append(Stamp(key, step, self._used_ms()))
        self._emit("phase", name="training")

    async def _finish(self, step: int, training: Training) -> None:
        self._emit("phase", name="saving")
        await asyncio.sleep(training.save_s)
        file = {"key": f"{self._attempt.spec.artifact_prefix}/adapter/adapter_model.safetensors", "size": 10}
        self._emit("adapter", files={"adapter_model.safetensors": {**file, "sha256": "1" * 64}}, best_step=step)
        result = {"finalTrainingLoss": 0.2, "finalValidationLoss": 2.0, "perplexity": 7.4, "tokensPerS": 99.0}
        self._emit("finished", outcome="completed", step=step, result=result)
        self._cluster.end(self._name, Outcome.COMPLETED)

    async def _examine(self) -> None:
        """A verdict's child."""
        await asyncio.sleep(2.0)
        if self.hung:
            await asyncio.get_running_loop().create_future()
        self._emit("verdict", report=REPORT)
        self._emit("finished", outcome="completed", step=0)
        self._cluster.end(self._name, Outcome.COMPLETED)

    def _stops(self) -> bool:
        return self._stop_since is not None and not self.deaf

    async def _watch(self) -> None:
        """What a supervisor does by itself, with no scheduler in sight."""
        while True:
            await asyncio.sleep(SIGHT_S)
            attempt, now = self._attempt, self._clock.now
            limit = attempt.allowance_ms
            used_ms = sum(sum(kinds.values()) for kinds in attempt.measure().values())
            if limit is not None and used_ms >= limit:
                self._cluster.request_stop(attempt, StopReason.BUDGET)
            code = ""
            if limit is not None and used_ms >= limit + HARD_LIMIT_MS:
                code = "OVER_ALLOWANCE"
            elif self._stop_since is not None and now - self._stop_since > GRACE_S:
                code = "UNRESPONSIVE"
            elif (self._fact.loaded_ms is not None or not self._fact.metered) and now - self._last_sign > HANG_S:
                code = "HUNG"
            if code:
                return self._cluster.end(self._name, Outcome.FAULT, code=code, message="ended by force")
