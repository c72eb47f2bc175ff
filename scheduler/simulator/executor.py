"""An executor in memory. It passes the same contract tests as the one on Ray (``tests/contract``).

Attempts are placed, metered and fenced by themselves; what their children do is up to the test::

    fake.emit(name, {"type": "phase", "name": "training"}); fake.clock.advance(2)
    fake.store(name, step=10); fake.end(name, Outcome.COMPLETED)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from control_plane.states import Outcome, StopReason
from scheduler.cluster.meter import Meter
from scheduler.executor import (
    AttemptGone,
    AttemptSpec,
    Batch,
    Ending,
    Liveness,
    Look,
    RankTimes,
    ResumePoint,
    StaleEpoch,
    Unreachable,
    UpEvent,
)


class Clock:
    """Seconds that pass only when told so; starts at now, so that its readings are also dates."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeAttempt:
    spec: AttemptSpec
    clock: Callable[[], float]
    epoch: int
    allowance_ms: int | None
    state: str = "pending"
    alive: bool = True
    """Its supervisor."""
    frozen: bool = False
    """Its ranks report no more."""
    events: list[UpEvent] = field(default_factory=list)
    meters: list[Meter] = field(default_factory=list)
    """Of the ranks, while they hold something."""
    usage: dict[str, dict[str, int]] = field(default_factory=dict)
    times: list[RankTimes] = field(default_factory=list)
    stop_reason: StopReason | None = None
    ending: Ending | None = None
    on_stop: Callable[[StopReason], None] | None = None
    """What the child does when asked to stop; None: it ends at once, as asked."""

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(UpEvent(len(self.events) + 1, self.clock(), event))
        if event["type"] == "phase":
            for meter in self.meters:
                meter.switch(event["name"])

    def measure(self) -> dict[str, dict[str, int]]:
        if self.spec.demand.metered and self.meters and not self.frozen:
            self.usage = {str(rank): meter.read() for rank, meter in enumerate(self.meters)}
        return self.usage

    def let_go(self) -> None:
        """The ranks are gone: the last reading stands, the times get their end."""
        self.measure()
        self.meters = []
        end_ms = round(self.clock() * 1000)
        self.times = [RankTimes(t.rank, t.start_ms, t.end_ms or end_ms, t.node) for t in self.times]


class FakeExecutor:
    """``total``: resources of the cluster. Levers: ``emit``, ``store``, ``end``, ``lose``, ``new_cluster``,
    ``reachable``, ``torn`` (ids of checkpoints that are not whole), ``lost_answers`` (names of methods whose next call
    takes effect, but whose caller hears ``Unreachable``).
    """

    def __init__(self, total: dict[str, float] | None = None, *, clock: Callable[[], float] | None = None) -> None:
        self.total = total or {"slot_cpu": 1.0, "slot_io": 2.0}
        self.clock: Any = clock or Clock()
        self.attempts: dict[str, FakeAttempt] = {}
        self.reachable = True
        self.torn: set[str] = set()
        self.lost_answers: list[str] = []
        self.cluster = 1

    # The protocol.

    async def look(self) -> Look:
        if not self.reachable:
            return Look(reachable=False)
        actors = {name: Liveness.ALIVE if a.alive else Liveness.DEAD for name, a in self.attempts.items()}
        return Look(True, f"cluster-{self.cluster}", actors, self.free(), dict(self.total))

    async def start(self, spec: AttemptSpec) -> None:
        self._arrive()
        if spec.name not in self.attempts:
            self.attempts[spec.name] = FakeAttempt(spec, self.clock, spec.epoch, spec.allowance_ms)
            self.place()
        self._leave("start")

    async def poll(self, name: str, cursor: int, *, epoch: int, allowance_ms: int | None) -> Batch:
        attempt = self._reach(name, epoch)
        attempt.allowance_ms = allowance_ms
        usage = attempt.measure()
        used_ms = sum(sum(kinds.values()) for kinds in usage.values())
        if allowance_ms is not None and used_ms >= allowance_ms:
            self.request_stop(attempt, StopReason.BUDGET)
            if used_ms >= allowance_ms + attempt.spec.overrun_ms and not attempt.ending:
                self.end(name, Outcome.FAULT, code="OVER_ALLOWANCE", message="not stopped in time")
        self._leave("poll")
        events = [event for event in attempt.events if event.number > cursor][:500]
        complete = (events[-1].number if events else cursor) >= len(attempt.events)
        return Batch(events, usage, attempt.ending if complete else None, attempt.state)

    async def stop(self, name: str, reason: str, *, epoch: int) -> None:
        self.request_stop(self._reach(name, epoch), StopReason(reason))
        self._leave("stop")

    async def times(self, name: str) -> list[RankTimes]:
        self._arrive()
        self._leave("times")
        return list(self.attempts[name].times) if name in self.attempts else []

    async def release(self, name: str, *, epoch: int) -> None:
        self._arrive()
        attempt = self.attempts.get(name)
        if attempt is not None:
            if attempt.alive:
                _fence(attempt, epoch)
            self.lose(name)
        self._leave("release")

    async def close(self) -> None: ...

    # The levers.

    def emit(self, name: str, *events: dict[str, Any]) -> None:
        for event in events:
            self.attempts[name].emit(event)

    def store(self, name: str, step: int, *, epoch: int = 0, loss: float = 1.0, best: bool = False) -> str:
        """A checkpoint of the child is in the object store; answers its key."""
        attempt = self.attempts[name]
        key = f"{attempt.spec.artifact_prefix}/checkpoints/a{attempt.spec.number}-s{step}"
        event = {"step": step, "epoch": epoch, "loss": loss, "key": key, "size": 1000, "sha256": "0" * 64, "best": best}
        attempt.emit({"type": "stored", **event, "usage": attempt.measure()})
        return key

    def end(self, name: str, outcome: Outcome, *, code: str = "", message: str = "", stack: str = "") -> None:
        """The attempt is over; its ranks are gone, its supervisor answers on."""
        attempt = self.attempts[name]
        self._vacate(attempt)
        asked = attempt.stop_reason if outcome in (Outcome.STOPPED, Outcome.FAULT) else None
        attempt.ending = Ending(outcome, code, message, stack, asked, attempt.times)
        attempt.state = "ended"
        self.place()

    def lose(self, name: str) -> None:
        """The supervisor dies, and its gang with it."""
        attempt = self.attempts[name]
        self._vacate(attempt)
        attempt.alive = False
        self.place()

    def new_cluster(self) -> None:
        """Ray has been started anew: nothing of before is known."""
        self.attempts = {}
        self.cluster += 1

    def free(self) -> dict[str, float]:
        free = dict(self.total)
        for attempt in self.attempts.values():
            for resource, count in needs(attempt.spec).items() if attempt.meters else ():
                free[resource] -= count
        return free

    # Within.

    def _arrive(self) -> None:
        if not self.reachable:
            raise Unreachable("the cluster does not answer")

    def _leave(self, method: str) -> None:
        if method in self.lost_answers:
            self.lost_answers.remove(method)
            raise Unreachable("the answer was lost")

    def _reach(self, name: str, epoch: int) -> FakeAttempt:
        self._arrive()
        attempt = self.attempts.get(name)
        if attempt is None or not attempt.alive:
            raise AttemptGone(name)
        _fence(attempt, epoch)
        return attempt

    def request_stop(self, attempt: FakeAttempt, reason: StopReason) -> None:
        if attempt.ending or attempt.stop_reason:
            return
        attempt.stop_reason = reason
        if attempt.on_stop and attempt.meters:
            attempt.state = "stopping"
            attempt.on_stop(reason)
        else:
            self.end(attempt.spec.name, Outcome.STOPPED)

    def place(self) -> None:
        """Give what is free to those who wait, in order; tell the others why they wait."""
        waiting = [a for a in self.attempts.values() if a.alive and a.state == "pending"]
        for attempt in waiting:
            free, wanted = self.free(), needs(attempt.spec)
            if all(free.get(resource, 0) >= count for resource, count in wanted.items()):
                self._run(attempt)
                continue
            possible = all(self.total.get(resource, 0) >= count for resource, count in wanted.items())
            event = {"type": "pending", "reason": "NO_RESOURCES" if possible else "INFEASIBLE"}
            if not attempt.events:
                attempt.emit(event)

    def _run(self, attempt: FakeAttempt) -> None:
        spec = attempt.spec
        attempt.state = "running"
        self._occupy(attempt)
        resumed = None
        for point in spec.resume_points:
            if self._is_whole(point):
                resumed = point
                break
            message = f"the checkpoint of step {point.step} is not whole and was passed over"
            attempt.emit({"type": "log", "level": "WARNING", "message": message})
        attempt.emit(
            {
                "type": "started",
                "node": "fake",
                "ranks": spec.demand.ranks,
                "checkpoint_id": resumed.checkpoint_id if resumed else None,
                "step": resumed.step if resumed else 0,
            }
        )

    def _is_whole(self, point: ResumePoint) -> bool:
        return point.checkpoint_id not in self.torn

    def _occupy(self, attempt: FakeAttempt) -> None:
        """The ranks are there and hold what they need."""
        ranks = range(attempt.spec.demand.ranks)
        attempt.meters = [Meter(self.clock) for _ in ranks]
        attempt.times = [RankTimes(rank, round(self.clock() * 1000), 0, "fake") for rank in ranks]

    def _vacate(self, attempt: FakeAttempt) -> None:
        """The ranks are gone."""
        attempt.let_go()


def _fence(attempt: FakeAttempt, epoch: int) -> None:
    if epoch < attempt.epoch:
        raise StaleEpoch(f"epoch {epoch} is over")
    attempt.epoch = epoch


def needs(spec: AttemptSpec) -> dict[str, float]:
    """What all its ranks take, by resource."""
    one = {**spec.demand.resources, **({"GPU": spec.demand.num_gpus} if spec.demand.num_gpus else {})}
    return {resource: count * spec.demand.ranks for resource, count in one.items()}
