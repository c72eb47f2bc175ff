"""The rules of money: what was billed and absorbed, against what was really held and saved."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from scheduler.simulator.clock import Process

if TYPE_CHECKING:
    from scheduler.simulator.cluster import Fact
    from scheduler.simulator.oracle import Oracle
    from scheduler.simulator.world import World

TOLERANCE_MS = 250
"""Of each rank."""
OVERSHOOT_S = 30
GENEROUS_S = 10
MS_PER_HOUR = 3_600_000
SQL_TIME = "%Y-%m-%d %H:%M:%S.%f"


class Record(NamedTuple):
    job_id: str
    attempt_id: str | None
    amount: int
    kind: str
    gpu_ms: int


class Account(NamedTuple):
    """One attempt's usage and records."""

    used: int
    absorbed: int
    posted: int
    posted_absorbed: int

    @property
    def billed(self) -> int:
        return self.used - self.absorbed


class Books:
    def __init__(self, world: World, oracle: Oracle) -> None:
        self.world = world
        self.oracle = oracle
        self._records: dict[str, Record] = {}
        self._prices: dict[str, int] = {}
        """Job → price an hour, as of its acceptance."""
        self._holds: dict[str, int] = {}
        self._ceilings: dict[str, float] = {}
        """Team → the most that may be posted this month."""

    # After every commit.

    def committed(self, process: Process) -> None:
        self._check_holds(process)
        self._check_prices(process)
        self._take_records()
        self._check_ceilings(process)

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

    def _check_prices(self, process: Process) -> None:
        """A job's price is its GPU type's in the version that was current at its acceptance, and stays."""
        for job_id, price, gpu_type, prices, version in self.oracle.rows(
            "SELECT j.id, j.price_microusd_per_hour, j.gpu_type, v.gpu_microusd_per_hour, v.number"
            " FROM training_jobs j JOIN price_versions v ON v.id = j.price_version_id"
        ):
            if job_id not in self._prices:
                self._prices[job_id] = price
                ((current,),) = self.oracle.rows(
                    "SELECT number FROM price_versions WHERE effective_from <= ? ORDER BY effective_from DESC LIMIT 1",
                    process.now().strftime(SQL_TIME),
                )
                if version != current:
                    self.oracle.fail("the price of acceptance", f"{job_id}: version {version}, {current} is current")
            if self._prices[job_id] != price or json.loads(prices)[gpu_type] != price:
                self.oracle.fail("the price of acceptance stays", f"{job_id}: {price}, was {self._prices[job_id]}")

    def _take_records(self) -> None:
        """New records; those that are there may not change."""
        ((count,),) = self.oracle.rows("SELECT count(*) FROM cost_records WHERE cost_type = 'COMPUTE'")
        if count == len(self._records):
            return
        self._check_unchanged()
        for job_id in {record.job_id: None for record in self._records.values()}:
            self._check_amount(job_id)

    def _check_unchanged(self) -> None:
        now = dict(self._read_records())
        for record_id, record in self._records.items():
            if now.get(record_id) != record:
                self.oracle.fail("records are only ever added", f"{record_id}: {record}, now {now.get(record_id)}")
        self._records = now

    def _read_records(self) -> list[tuple[str, Record]]:
        rows = self.oracle.rows(
            "SELECT id, job_id, attempt_id, amount_microusd, details FROM cost_records WHERE cost_type = 'COMPUTE'"
        )
        found = []
        for record_id, job_id, attempt_id, amount, details in rows:
            told: dict[str, Any] = json.loads(details)
            found.append((record_id, Record(job_id, attempt_id, amount, told["kind"], int(told["gpuMs"]))))
        return found

    def _check_amount(self, job_id: str) -> None:
        """The price of all billed time, rounded once."""
        records = [record for record in self._records.values() if record.job_id == job_id]
        gpu_ms = sum(record.gpu_ms for record in records if record.kind in ("charge", "reversal"))
        exact = Decimal(gpu_ms * self._prices[job_id]) / MS_PER_HOUR
        due = int(exact.to_integral_value(ROUND_HALF_EVEN))
        amount = sum(record.amount for record in records)
        if amount != due:
            self.oracle.fail("amounts are rounded once", f"{job_id}: {amount} for {gpu_ms} ms, due {due}")

    def _check_ceilings(self, process: Process) -> None:
        """A budget that is lowered binds jobs that run already from when they hear of it: the highest that was in
        force while any ran counts."""
        for team_id, budget in self.oracle.rows("SELECT id, monthly_budget_microusd FROM teams"):
            limit = float("inf") if budget is None else float(budget)
            posted = self._posted(team_id, process.now(), "AND cost_type = 'COMPUTE'")
            running = self.oracle.rows(
                "SELECT 1 FROM attempts a JOIN training_jobs j ON j.id = a.work_id"
                " WHERE j.team_id = ? AND a.outcome IS NULL",
                team_id,
            )
            known = self._ceilings.get(team_id, 0.0)
            jobs = self.oracle.rows(
                "SELECT sum(price_microusd_per_hour) FROM training_jobs WHERE team_id = ? AND attempt > 0", team_id
            )
            slack = (jobs[0][0] or 0) * OVERSHOOT_S / 3600
            if posted > max(known, limit) + slack:
                self.oracle.fail("posted ≤ budget + 30 GPU-seconds a job", f"{team_id}: {posted} of {limit}")
            self._ceilings[team_id] = max(known, limit) if running else max(limit, float(posted))

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
        """Whether a job that the budget paused has good reason to wait: what is left would not pay for all of it twice
        over."""
        ((team_id, budget, price, ranks, hold, charged),) = self.oracle.rows(
            "SELECT t.id, t.monthly_budget_microusd, j.price_microusd_per_hour, j.gpu_count, h.amount_microusd,"
            " (SELECT coalesce(sum(amount_microusd), 0) FROM cost_records c WHERE c.job_id = j.id)"
            " FROM training_jobs j JOIN teams t ON t.id = j.team_id JOIN budget_holds h ON h.job_id = j.id"
            " WHERE j.id = ?",
            job_id,
        )
        if budget is None:
            return False
        at = min(process.now() for host in self.world.schedulers if (process := host.process))
        left = max(0, hold - charged) + budget - self._posted(team_id, at) - self._held(team_id)
        whole_s = self.world.cluster.training_of(job_id).whole_s
        return bool(left < price / 3600 * ranks * 2 * (whole_s + GENEROUS_S))

    # At the end.

    def final(self) -> None:
        self._check_unchanged()
        for (job_id,) in self.oracle.rows("SELECT id FROM training_jobs ORDER BY id"):
            self._check_job(job_id)
        for team_id, day, count in self.oracle.rows(
            "SELECT team_id, json_extract(details, '$.day'), count(*) FROM cost_records WHERE cost_type = 'STORAGE'"
            " GROUP BY 1, 2"
        ):
            if count > 1:
                self.oracle.fail("storage is charged once a day", f"{team_id} {day}: {count} records")

    def _check_job(self, job_id: str) -> None:
        attempts = self.oracle.rows(
            "SELECT id, actor_name, outcome, recovery FROM attempts WHERE work_id = ? ORDER BY number", job_id
        )
        facts = [self.world.cluster.facts.get(name) for _, name, _, _ in attempts]
        most = self._saved(job_id, facts)
        lost_before = False
        for (attempt_id, name, outcome, _), fact, limit in zip(attempts, facts, most, strict=True):
            account = self._account(attempt_id)
            self._check_account(name, outcome, fact, account)
            if fact is not None:
                self._check_billed(name, outcome, fact, account, limit, lost_before)
            lost_before = outcome == "FAULT"
        ((status, final_cost, current_cost),) = self.oracle.rows(
            "SELECT status, final_cost_microusd, current_cost_microusd FROM training_jobs WHERE id = ?", job_id
        )
        total = sum(record.amount for record in self._records.values() if record.job_id == job_id)
        ended = status in ("COMPLETED", "FAILED", "CANCELLED")
        if current_cost != total or final_cost != (total if ended else None):
            self.oracle.fail("costs are what was posted", f"{job_id}: {current_cost}, {final_cost}, posted {total}")

    def _account(self, attempt_id: str) -> Account:
        ((used, absorbed),) = self.oracle.rows(
            "SELECT coalesce(sum(gpu_ms), 0), coalesce(sum(absorbed_ms), 0) FROM attempt_usage WHERE attempt_id = ?",
            attempt_id,
        )
        records = [record for record in self._records.values() if record.attempt_id == attempt_id]
        posted = sum(record.gpu_ms for record in records if record.kind in ("charge", "reversal"))
        return Account(used, absorbed, posted, sum(r.gpu_ms for r in records if r.kind == "absorbed"))

    def _check_account(self, name: str, outcome: str | None, fact: Fact | None, account: Account) -> None:
        if outcome is None:
            return
        if (account.posted, account.posted_absorbed) != (account.billed, account.absorbed):
            self.oracle.fail("records say what usage says", f"{name}: {account}")
        held = fact.held_ms(0) if fact else 0
        tolerance = TOLERANCE_MS * (fact.ranks if fact else 0)
        if account.used > held + tolerance:
            self.oracle.fail("nothing is billed twice", f"{name}: {account} of {held} ms held")
        known = fact.heard_ms if fact and fact.ends_hidden else held
        if account.used < known - tolerance:
            self.oracle.fail("billed + absorbed = held", f"{name}: {account} of {known} ms known, {held} ms held")

    def _check_billed(
        self, name: str, outcome: str | None, fact: Fact, account: Account, limit: int | None, recovery: bool
    ) -> None:
        """What a fault cost is not the customer's; the rest is."""
        held, tolerance = fact.held_ms(0), TOLERANCE_MS * fact.ranks
        loading = (held if fact.loaded_ms is None else fact.loaded_ms) if recovery else 0
        if outcome == "FAULT":
            saved = fact.stamps[-1].used_ms if fact.stamps else 0
            limit = saved if limit is None else min(saved, limit)
        most = max(0, (held if limit is None else limit) - loading)
        if account.billed > most + tolerance:
            self.oracle.fail("what was lost is not billed", f"{name} {outcome}: {account}, at most {most} ms")
        if outcome != "FAULT" and limit is None and account.billed < held - loading - tolerance:
            self.oracle.fail("what was used is billed", f"{name} {outcome}: {account} of {held} ms held")

    def _saved(self, job_id: str, facts: list[Fact | None]) -> list[int | None]:
        """For each attempt how much of it counts, where a later one found newer checkpoints torn; None: all."""
        known = {key for (key,) in self.oracle.rows("SELECT storage_key FROM checkpoints WHERE job_id = ?", job_id)}
        limits: list[int | None] = [None] * len(facts)
        for place, fact in enumerate(facts):
            if fact is None:
                continue
            stamps = [
                (stamp.step, earlier, stamp)
                for earlier in range(place)
                for stamp in (facts[earlier].stamps if facts[earlier] else ())  # type: ignore[union-attr]
                if stamp.key in known
            ]
            if not stamps or max(stamps, key=lambda s: s[:2])[2].key == fact.resumed_from:
                continue
            used = next((s for s in stamps if s[2].key == fact.resumed_from), None)
            for earlier in range(used[1] if used else 0, place):
                ms = used[2].used_ms if used and earlier == used[1] else 0
                limits[earlier] = min(ms, limits[earlier] if limits[earlier] is not None else ms)  # type: ignore[type-var]
        return limits
