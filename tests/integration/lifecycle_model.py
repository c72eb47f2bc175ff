"""What a job's life looks like from outside, in plain Python: no table, no service, no state machine of ours."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

ACTIVE = ("INITIALIZING", "RUNNING")
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")
WEAKEST_FIRST = (None, "PREEMPT", "BUDGET", "PAUSE", "CANCEL")
MOST_FAULTS_IN_A_ROW = 3
HOUR_MS = 3_600_000


class Refused(Exception):
    """The action is illegal now."""


class Recipe(NamedTuple):
    """What a job was accepted for."""

    microusd_per_hour: int
    steps: int
    checkpoint_steps: int
    """From one checkpoint to the next."""


@dataclass
class ModelJob:
    id: str
    recipe: Recipe
    status: str = "QUEUED"
    paused_by: str | None = None
    stop: str | None = None
    attempt: int = 0
    faults: int = 0
    in_a_row: int = 0
    furthest: int = 0
    """Step of the newest checkpoint of the attempts before."""
    reached: int = 0
    """… of this attempt."""
    step: int = 0
    began: int | None = None
    """The step from which the first of its attempts went on."""
    used_ms: dict[tuple[int, int, str], int] = field(default_factory=dict)
    """GPU time by attempt, rank and kind, as heard."""

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def active(self) -> bool:
        return self.status in ACTIVE

    # What users do.

    def cancel(self) -> None:
        if self.ended:
            raise Refused
        if self.active:
            self.stop = "CANCEL"
        else:
            self._go("CANCELLED")

    def pause(self) -> None:
        if self.active:
            self.stop = stronger(self.stop, "PAUSE")
        elif self.status == "QUEUED":
            self._go("PAUSED", "PAUSE")
        elif self.status == "PAUSED" and self.paused_by == "BUDGET":
            self.paused_by = "PAUSE"
        else:
            raise Refused

    def resume(self) -> None:
        if self.status != "PAUSED":
            raise Refused
        self._go("QUEUED")

    @property
    def may_be_retried(self) -> bool:
        return self.status in ("FAILED", "CANCELLED")

    # What happens to it.

    def dispatched(self) -> None:
        if self.status == "QUEUED":
            self.attempt += 1
            self.reached = 0
            self._go("INITIALIZING")

    def started(self, step: int) -> None:
        self.began = step if self.began is None else min(step, self.began)
        if self.status == "INITIALIZING":
            self.status = "RUNNING"

    def used(self, rank: int, kind: str, gpu_ms: int) -> None:
        place = self.attempt, rank, kind
        self.used_ms[place] = max(gpu_ms, self.used_ms.get(place, 0))

    def saved(self, step: int) -> None:
        self.reached = max(self.reached, step)

    def attempt_ended(self, outcome: str, asked: str | None, *, adapter: bool, paid: bool) -> None:
        """``asked``: the stop that the attempt had heard of. ``paid``: the budget lets it go on."""
        reason = stronger(self.stop, asked)
        if outcome == "COMPLETED" and not adapter:
            outcome = "FAULT"
        self._count(outcome)
        if outcome == "COMPLETED":
            self._go("COMPLETED")
        elif outcome == "FAILED":
            self._go("FAILED")
        elif reason == "CANCEL":
            self._go("CANCELLED")
        elif reason == "PAUSE":
            self._go("PAUSED", reason)
        elif outcome == "FAULT" and self.in_a_row > MOST_FAULTS_IN_A_ROW:
            self._go("FAILED")
        elif reason == "BUDGET" and not paid:
            self._go("PAUSED", reason)
        else:
            self._go("QUEUED")

    @property
    def needs(self) -> int:
        """Micro-dollars for loading it again and training it up to its next checkpoint, at its pace so far."""
        loading = Counter[int]()
        work_ms = 0
        for (attempt, _, kind), gpu_ms in self.used_ms.items():
            if kind == "loading":
                loading[attempt] += gpu_ms
            else:
                work_ms += gpu_ms
        steps = max(1, min(self.recipe.checkpoint_steps, self.recipe.steps - self.step))
        gpu_ms = max(loading.values(), default=0) + math.ceil(
            Fraction(work_ms * steps, max(1, self.step - (self.began or 0)))
        )
        return round(Fraction(gpu_ms * self.recipe.microusd_per_hour, HOUR_MS))

    def _count(self, outcome: str) -> None:
        """A fault of an attempt that got further than all before it begins a new row."""
        if outcome != "FAULT":
            self.in_a_row = 0
        else:
            self.faults += 1
            self.in_a_row = 1 if self.reached > self.furthest else self.in_a_row + 1
        self.furthest = max(self.furthest, self.reached)

    def _go(self, status: str, paused_by: str | None = None) -> None:
        self.status, self.paused_by, self.stop = status, paused_by, None


def stronger(one: str | None, other: str | None) -> str | None:
    return max(one, other, key=WEAKEST_FIRST.index)


@dataclass
class ModelTeam:
    """``spent`` and ``held``: micro-dollars by job id, posted and reserved for it (held: until it has ended)."""

    budget_microusd: int | None = None

    def fits(self, amount: int, spent: dict[str, int], held: dict[str, int]) -> bool:
        return self.budget_microusd is None or amount <= self.budget_microusd - taken(spent, held)

    def pays(self, job: ModelJob, spent: dict[str, int], held: dict[str, int]) -> bool:
        """Whether it lets the job go on: for what it needs, and never for nothing."""
        if self.budget_microusd is None:
            return True
        others = taken(without(job.id, spent), without(job.id, held))
        return self.budget_microusd - others - spent.get(job.id, 0) >= max(1, job.needs)


def taken(spent: dict[str, int], held: dict[str, int]) -> int:
    return sum(max(spent.get(job, 0), held.get(job, 0)) for job in spent.keys() | held.keys())


def without(job: str, amounts: dict[str, int]) -> dict[str, int]:
    return {other: amount for other, amount in amounts.items() if other != job}
