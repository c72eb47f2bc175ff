"""The rules of budgets: what may be held, what may be spent, and when a job has good reason to wait for money."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from scheduler.simulator.clock import Process
from scheduler.simulator.stops import AFTERMATH_S, HEED_S

if TYPE_CHECKING:
    from scheduler.simulator.oracle import Oracle
    from scheduler.simulator.world import World

OVERSHOOT_S = 30
MS_PER_HOUR = 3_600_000
SQL_TIME = "%Y-%m-%d %H:%M:%S.%f"


@dataclass
class Ceiling:
    """What a team may spend in a month."""

    budget: float
    """Micro-dollars."""
    heard_s: float
    """When all that runs knows this budget, if no fault delays it."""
    binding: float = math.inf
    """The budget, or what was spent by the time that all knew it."""
    prices: dict[str, int] = field(default_factory=dict)
    """Of the jobs that ran since: job → micro-dollars an hour."""

    @property
    def slack(self) -> float:
        return sum(self.prices.values()) * OVERSHOOT_S / 3600


class Budgets:
    def __init__(self, world: World, oracle: Oracle) -> None:
        self.world = world
        self.oracle = oracle
        self._holds: dict[str, int] = {}
        self._ceilings: dict[tuple[str, int], Ceiling] = {}
        """By team and month."""

    def committed(self, process: Process) -> None:
        self._check_holds(process)
        at = process.now()
        if at.month == datetime.fromtimestamp(self.world.clock.date_s(), at.tzinfo).month:
            self._check_ceilings(at)

    def _check_holds(self, process: Process) -> None:
        """Open while the job is not finished; given and raised only out of what the budget has left."""
        for job_id, team_id, status, state, amount in self.oracle.rows(
            "SELECT j.id, j.team_id, j.status, h.state, h.amount_microusd"
            " FROM training_jobs j LEFT JOIN budget_holds h ON h.job_id = j.id"
        ):
            if state != ("CLOSED" if status in ("COMPLETED", "FAILED", "CANCELLED") else "OPEN"):
                self.oracle.fail("a hold is open while its job is not finished", f"{job_id} {status}: {state}")
            if amount > self._holds.get(job_id, 0) and state == "OPEN":
                self._check_free(process, team_id, job_id)
            self._holds[job_id] = amount

    def _check_free(self, process: Process, team_id: str, job_id: str) -> None:
        ((budget,),) = self.oracle.rows("SELECT monthly_budget_microusd FROM teams WHERE id = ?", team_id)
        posted, held = self._posted(team_id, process.now()), self._held(team_id)
        if budget is not None and posted + held > budget:
            self.oracle.fail("posted + held ≤ budget", f"{job_id}: {posted} + {held} of {budget}")

    def _check_ceilings(self, at: datetime) -> None:
        """Spending stays within the budget, and 30 GPU-seconds of each job that ran. A budget that is lowered binds
        once what runs has heard of it: what was spent by then is spent."""
        for team_id, budget in self.oracle.rows("SELECT id, monthly_budget_microusd FROM teams"):
            limit = math.inf if budget is None else float(budget)
            ceiling = self._ceilings.get((team_id, at.month))
            if ceiling is None or limit != ceiling.budget:
                raised = ceiling is not None and limit > ceiling.budget and ceiling.binding <= ceiling.budget
                ceiling = Ceiling(limit, self.world.clock.now + HEED_S, limit if raised else math.inf)
                self._ceilings[team_id, at.month] = ceiling
            self._check_ceiling(team_id, at, ceiling)

    def _check_ceiling(self, team_id: str, at: datetime, ceiling: Ceiling) -> None:
        running = self.oracle.rows(
            "SELECT a.id, a.actor_name, j.id, j.price_microusd_per_hour FROM attempts a"
            " JOIN training_jobs j ON j.id = a.work_id WHERE j.team_id = ? AND a.outcome IS NULL",
            team_id,
        )
        ceiling.prices |= {job_id: price for _, _, job_id, price in running}
        posted = self._posted(team_id, at, "AND cost_type = 'COMPUTE'")
        if posted > ceiling.binding + ceiling.slack:
            found = f"{team_id}: {posted} of {ceiling.budget}, or {ceiling.binding:.0f} that were spent before"
            self.oracle.fail("posted ≤ budget + 30 GPU-seconds a job", found)
        due_s = max(ceiling.heard_s, self.world.hazards.troubled_s + AFTERMATH_S)
        if math.isinf(ceiling.binding) and self.world.clock.now > due_s:
            unposted = sum(self._unposted(attempt_id, name, price) for attempt_id, name, _, price in running)
            ceiling.binding = max(ceiling.budget, posted + unposted)

    def _unposted(self, attempt_id: str, name: str, price: int) -> float:
        """What an attempt's time costs that is not posted yet."""
        fact = self.world.cluster.facts.get(name)
        held_ms = fact.held_ms(round(self.world.clock.date_s() * 1000)) if fact else 0
        ((posted,),) = self.oracle.rows(
            "SELECT coalesce(sum(amount_microusd), 0) FROM cost_records WHERE attempt_id = ?", attempt_id
        )
        return float(max(0, held_ms * price / MS_PER_HOUR - posted))

    def _posted(self, team_id: str, at: datetime, only: str = "") -> int:
        month = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
        ((total,),) = self.oracle.rows(
            "SELECT coalesce(sum(amount_microusd), 0) FROM cost_records WHERE team_id = ? AND billing_period >= ?"
            + only,
            team_id,
            month.strftime(SQL_TIME),
        )
        return int(total)

    def _held(self, team_id: str) -> int:
        """What open holds reserve beyond what their jobs were charged."""
        rows = self.oracle.rows(
            "SELECT h.amount_microusd - coalesce((SELECT sum(c.amount_microusd) FROM cost_records c"
            " WHERE c.job_id = h.job_id), 0) FROM budget_holds h WHERE h.team_id = ? AND h.state = 'OPEN'",
            team_id,
        )
        return sum(max(0, rest) for (rest,) in rows)

    def cannot_go_on(self, job_id: str) -> bool:
        """Whether a job that the budget paused has good reason to wait: what is left would not bring it any further."""
        ((team_id, budget, price, hold, charged),) = self.oracle.rows(
            "SELECT t.id, t.monthly_budget_microusd, j.price_microusd_per_hour, h.amount_microusd,"
            " (SELECT coalesce(sum(amount_microusd), 0) FROM cost_records c WHERE c.job_id = j.id)"
            " FROM training_jobs j JOIN teams t ON t.id = j.team_id JOIN budget_holds h ON h.job_id = j.id"
            " WHERE j.id = ?",
            job_id,
        )
        if budget is None:
            return False
        at = min(process.now() for host in self.world.schedulers if (process := host.process))
        left = max(0, hold - charged) + budget - self._posted(team_id, at) - self._held(team_id)
        return bool(left <= 0 or left < 1 + self._needed_ms(job_id) * price / MS_PER_HOUR)

    def _needed_ms(self, job_id: str) -> float:
        """GPU time to load again and to reach the next checkpoint, at the pace of what was really held so far."""
        ((done, total, epochs, recipe),) = self.oracle.rows(
            "SELECT coalesce(current_step, 0), coalesce(total_steps, 1), total_epochs, hyperparameters"
            " FROM training_jobs WHERE id = ?",
            job_id,
        )
        told: dict[str, Any] = json.loads(recipe)
        interval = told.get("checkpointSteps") or math.ceil(total / max(1, epochs))
        facts = [fact for fact in self.world.cluster.facts.values() if fact.work_id == job_id]
        held = [(fact.held_ms(0), fact.loaded_ms) for fact in facts]
        loading = max((ms if loaded is None else loaded for ms, loaded in held), default=0)
        work = sum(ms - loaded for ms, loaded in held if loaded is not None)
        trained = done - min((fact.first_step for fact in facts if fact.loaded_ms is not None), default=0)
        return loading + work / max(1, trained) * max(1, min(interval, total - done))
