"""What to do next, pure: from what is known (`Snapshot`) to a list of actions. No clock, no database, no cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property

from control_plane.states import RETRY_PAUSES_S, StopReason, WorkKind
from scheduler.executor import Demand, Liveness, Look

LONGEST_PAUSE = timedelta(seconds=max(RETRY_PAUSES_S))
"""Who would have to wait longer has nothing to wait for: the clock was set back since."""
SLACK = 1e-9
"""Slack when fractional resources are compared."""
RECONNECTING_S = 15.0
"""A supervisor that does not answer for so long is shown as reconnecting,"""
SILENCE_S = 600.0
"""and ended after so long, though the cluster calls it alive: it may well train on, with only the way to it blocked;"""
SILENCE_SPENT_S = 120.0
"""after so long when its allowance must be used up, so that it ought to have stopped by itself;"""
SILENCE_STOPPING_S = 10.0
"""or after so long when it has been asked to stop: its GPUs are to be free within 30 s."""


@dataclass(frozen=True)
class Waiting:
    """Work that is QUEUED."""

    kind: WorkKind
    work_id: str
    demand: Demand | None
    """None: what it asks for is no longer offered; ``blocked`` says so."""
    priority: int
    queued_at: datetime
    not_before: datetime | None = None
    needs_tracking: bool = False
    """It has no MLflow run yet."""
    reason: str | None = None
    """The queue reason that it shows now."""
    blocked: str | None = None
    """Why it cannot start, whatever is free."""


@dataclass(frozen=True)
class Held:
    """An attempt that has not ended, or whose actors are not known to be gone: it may hold resources."""

    kind: WorkKind
    work_id: str
    attempt_id: str
    name: str
    demand: Demand | None
    cluster_id: str | None
    """The cluster in which it was started; None: nobody noted that it was."""
    ended: bool = False
    stop_requested: StopReason | None = None
    reconnecting: bool = False


@dataclass(frozen=True)
class Snapshot:
    waiting: tuple[Waiting, ...]
    held: tuple[Held, ...]
    look: Look
    tracking_problem: str | None = None
    """Why MLflow gave no new run when it was last asked."""
    setbacks: Mapping[str, str] = field(default_factory=dict)
    """Why work that failed to be dispatched stands aside, by its id."""
    asked: frozenset[tuple[str, StopReason]] = frozenset()
    """Stops that have been passed on: (attempt name, reason)."""
    silent_s: Mapping[str, float] = field(default_factory=dict)
    """How long supervisors have answered nothing while the cluster could be reached, by attempt name."""
    spent: frozenset[str] = frozenset()
    """Silent attempts that must have used up their allowance by now, by name."""
    known_s: float = math.inf
    """For how long this cluster has been known under its id."""
    node_timeout_s: float = 0.0
    """For so long nodes may outlive the cluster that they belonged to."""

    @cached_property
    def unreleased(self) -> frozenset[str]:
        """Work of which an attempt has ended, but may hold something yet."""
        return frozenset(held.work_id for held in self.held if held.ended)


@dataclass(frozen=True)
class Dispatch:
    kind: WorkKind
    work_id: str


@dataclass(frozen=True)
class SetQueueReason:
    kind: WorkKind
    work_id: str
    reason: str


@dataclass(frozen=True)
class Start:
    """The attempt is committed, but the cluster does not know it: ask (again)."""

    work_id: str
    attempt_id: str


@dataclass(frozen=True)
class Withdraw:
    """The attempt is committed, the cluster does not know it, and it is not to be started any more."""

    work_id: str
    attempt_id: str


@dataclass(frozen=True)
class Follow:
    """Collect its events."""

    attempt_id: str
    name: str
    adopt: bool
    """Nobody noted that it was started."""


@dataclass(frozen=True)
class SetReconnecting:
    kind: WorkKind
    work_id: str
    name: str
    """Of the attempt."""
    value: bool


@dataclass(frozen=True)
class AskStop:
    name: str
    reason: StopReason


@dataclass(frozen=True)
class DeclareFault:
    """Its supervisor is confirmed dead."""

    attempt_id: str
    name: str
    code: str
    message: str


@dataclass(frozen=True)
class Release:
    """End the supervisor. ``attempt_id`` None: a name that the database may not know; ask it before."""

    name: str
    attempt_id: str | None = None


@dataclass(frozen=True)
class EndByForce:
    """Its supervisor answers nothing: end it and its gang, so that their death is certain."""

    name: str


Action = (
    EndByForce | Dispatch | SetQueueReason | Start | Withdraw | Follow | SetReconnecting | AskStop | DeclareFault
    | Release
)  # fmt: skip


def decide(snapshot: Snapshot, now: datetime) -> list[Action]:
    actions: list[Action] = []
    for held in snapshot.held:
        actions += _released(held, snapshot.look) if held.ended else _tended(held, snapshot)
    return actions + _strays(snapshot) + _queue(snapshot, now)


def _released(held: Held, look: Look) -> list[Action]:
    return [Release(held.name, held.attempt_id)] if look.reachable else []


def _tended(held: Held, snapshot: Snapshot) -> list[Action]:
    """An attempt that has not ended, by what the cluster says of its supervisor."""
    look = snapshot.look
    liveness = look.actors.get(held.name)
    if not look.reachable or liveness is Liveness.UNKNOWN:
        return _reconnecting(held, held.cluster_id is not None)
    if liveness is Liveness.DEAD:
        return [DeclareFault(held.attempt_id, held.name, "SUPERVISOR_DIED", "The attempt's supervisor died")]
    if liveness is None:
        return _unknown(held, snapshot)
    silent_s = snapshot.silent_s.get(held.name, 0.0)
    if silent_s > _patience_s(held, snapshot):
        return [EndByForce(held.name)]
    actions: list[Action] = [
        Follow(held.attempt_id, held.name, adopt=held.cluster_id is None),
        *_reconnecting(held, silent_s > RECONNECTING_S),
    ]
    if held.stop_requested and (held.name, held.stop_requested) not in snapshot.asked:
        actions.append(AskStop(held.name, held.stop_requested))
    return actions


def _patience_s(held: Held, snapshot: Snapshot) -> float:
    """How long a supervisor may answer nothing while the cluster calls it alive."""
    if held.stop_requested:
        return SILENCE_STOPPING_S
    return SILENCE_SPENT_S if held.name in snapshot.spent else SILENCE_S


def _unknown(held: Held, snapshot: Snapshot) -> list[Action]:
    """The cluster has never seen it. If it ran in another one, its processes may live as long as that one's nodes."""
    look = snapshot.look
    if held.cluster_id == look.cluster_id:
        told = "The cluster does not know the attempt"
        return [DeclareFault(held.attempt_id, held.name, "SUPERVISOR_LOST", told)]
    if snapshot.known_s < snapshot.node_timeout_s:
        return _reconnecting(held, held.cluster_id is not None)
    if held.cluster_id is None:
        wanted = held.stop_requested is None and held.demand is not None
        return [(Start if wanted else Withdraw)(held.work_id, held.attempt_id)]
    told = "The attempt ended with the cluster that it ran in"
    return [DeclareFault(held.attempt_id, held.name, "CLUSTER_LOST", told)]


def _reconnecting(held: Held, value: bool) -> list[Action]:
    return [SetReconnecting(held.kind, held.work_id, held.name, value)] if held.reconnecting is not value else []


def _strays(snapshot: Snapshot) -> list[Action]:
    """Living supervisors that belong to no attempt that is under way."""
    known = {held.name for held in snapshot.held}
    return [
        Release(name)
        for name, liveness in snapshot.look.actors.items()
        if name not in known and liveness is not Liveness.DEAD
    ]


def _queue(snapshot: Snapshot, now: datetime) -> list[Action]:
    """Dispatch in order of priority, then age; nobody is overtaken on a resource that he waits for."""
    free = _Capacity(snapshot)
    actions: list[Action] = []
    for work in sorted(snapshot.waiting, key=lambda w: (-w.priority, w.queued_at, w.work_id)):
        reason = _obstacle(work, snapshot, now) or (free.refusal(work.demand) if work.demand else None)
        if reason is None and work.demand is not None:
            free.take(work.demand)
            actions.append(Dispatch(work.kind, work.work_id))
        elif reason and reason != work.reason:
            actions.append(SetQueueReason(work.kind, work.work_id, reason))
    return actions


def _obstacle(work: Waiting, snapshot: Snapshot, now: datetime) -> str | None:
    if work.blocked or work.demand is None:
        return work.blocked or "What it asks for is no longer offered"
    if work.not_before is not None and now < work.not_before <= now + LONGEST_PAUSE:
        return f"Tries again at {work.not_before:%H:%M:%S} UTC after a fault of the platform"
    if not snapshot.look.reachable:
        return "The cluster cannot be reached"
    if work.needs_tracking and snapshot.tracking_problem:
        return snapshot.tracking_problem
    if work.work_id in snapshot.unreleased:
        return "Waits until nothing is left of its last attempt"
    return snapshot.setbacks.get(work.work_id)


class _Capacity:
    """What is free: all that the cluster has, less what our attempts hold and what this pass has given away."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._total = snapshot.look.total
        self._free = dict(self._total)
        self._wanted: set[str] = set()
        for held in snapshot.held:
            if held.demand is not None:
                self.take(held.demand)

    def take(self, demand: Demand) -> None:
        for name, amount in needs(demand).items():
            self._free[name] = self._free.get(name, 0.0) - amount

    def refusal(self, demand: Demand) -> str | None:
        """Why ``demand`` cannot be met now; what it waits for is kept from those behind it."""
        wanted = needs(demand)
        for label, value in demand.labels.items():
            if label == "ray.io/accelerator-type" and not self._total.get(f"accelerator_type:{value}"):
                return f"No node of the cluster has a {value}"
        for name, amount in wanted.items():
            if self._total.get(name, 0.0) + SLACK < amount:
                return f"The cluster has {_count(self._total.get(name, 0.0))} {name}, {_count(amount)} needed"
        for name, amount in wanted.items():
            if name in self._wanted or self._free.get(name, 0.0) + SLACK < amount:
                self._wanted.update(wanted)
                return f"Waits for {_count(amount)} {name}: all {_count(self._total[name])} in use or asked for before"
        return None


def needs(demand: Demand) -> dict[str, float]:
    """What the whole gang takes, by Ray's resource names."""
    each = dict(demand.resources)
    if demand.num_gpus:
        each["GPU"] = demand.num_gpus
    return {name: amount * demand.ranks for name, amount in each.items()}


def _count(amount: float) -> str:
    return f"{amount:g}"
