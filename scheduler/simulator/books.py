"""The rules of money: what was billed and absorbed, against what was really held and saved."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from scheduler.simulator.clock import Process

if TYPE_CHECKING:
    from scheduler.simulator.cluster import Fact
    from scheduler.simulator.oracle import Oracle
    from scheduler.simulator.world import World

TOLERANCE_MS = 250
"""Of each rank."""
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
        self._queued_again: set[str] = set()
        """Names of attempts after which their job queued again at once, unasked."""
        self._prices: dict[str, int] = {}
        """Job → price an hour, as of its acceptance."""

    def queued_again(self, job_id: str) -> None:
        """An active job went back to the queue."""
        self._queued_again |= {
            name
            for (name,) in self.oracle.rows(
                "SELECT a.actor_name FROM attempts a JOIN training_jobs j ON j.id = a.work_id AND j.attempt = a.number"
                " WHERE j.id = ?",
                job_id,
            )
        }

    # After every commit.

    def committed(self, process: Process) -> None:
        self._check_prices(process)
        self._take_records()
        self._check_usage()

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

    def _check_usage(self) -> None:
        """No attempt is said to have used more than it has held by now."""
        now_ms = round(self.world.clock.date_s() * 1000)
        for name, used in self.oracle.rows(
            "SELECT a.actor_name, sum(u.gpu_ms) FROM attempt_usage u JOIN attempts a ON a.id = u.attempt_id GROUP BY 1"
        ):
            fact = self.world.cluster.facts.get(name)
            if used > (fact.held_ms(now_ms) + TOLERANCE_MS * fact.ranks if fact else 0):
                self.oracle.fail("nothing is billed twice", f"{name}: {used} ms used, {fact}")

    # At the end.

    def final(self) -> None:
        self._check_unchanged()
        for (job_id,) in self.oracle.rows("SELECT id FROM training_jobs ORDER BY id"):
            self._check_job(job_id)

    def _check_job(self, job_id: str) -> None:
        attempts = self.oracle.rows(
            "SELECT id, actor_name, outcome FROM attempts WHERE work_id = ? ORDER BY number", job_id
        )
        facts = [self.world.cluster.facts.get(name) for _, name, _ in attempts]
        limits = self._limits(job_id, facts)
        lost_before = self._retries_what_was_lost(job_id)
        for (attempt_id, name, outcome), fact, limit in zip(attempts, facts, limits, strict=True):
            account = self._account(attempt_id)
            self._check_account(name, outcome, fact, account)
            if fact is not None:
                self._check_billed(name, outcome, fact, account, limit, lost_before)
            lost_before = self._lost(name, outcome, lost_before)
        ((status, final_cost, current_cost),) = self.oracle.rows(
            "SELECT status, final_cost_microusd, current_cost_microusd FROM training_jobs WHERE id = ?", job_id
        )
        total = sum(record.amount for record in self._records.values() if record.job_id == job_id)
        ended = status in ("COMPLETED", "FAILED", "CANCELLED")
        if current_cost != total or final_cost != (total if ended else None):
            self.oracle.fail("costs are what was posted", f"{job_id}: {current_cost}, {final_cost}, posted {total}")

    def _retries_what_was_lost(self, job_id: str) -> bool:
        """Whether the job is a user's retry of one that the platform lost: that one's loading is not paid twice."""
        rows = self.oracle.rows(
            "SELECT a.actor_name, a.outcome FROM training_jobs j JOIN training_jobs old ON old.id = j.retry_of"
            " JOIN attempts a ON a.work_id = old.id WHERE j.id = ? ORDER BY a.number",
            job_id,
        )
        lost = False
        for name, outcome in rows:
            lost = self._lost(name, outcome, lost)
        return lost

    def _lost(self, name: str, outcome: str | None, before: bool) -> bool:
        """Whether the platform ended the attempt: its fault, or it queued the job again by itself. One that was never
        started leaves it as it was ``before``."""
        if outcome == "STOPPED" and name not in self.world.cluster.facts:
            return before
        return outcome == "FAULT" or name in self._queued_again

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
        known = fact.known_ms if fact else 0
        if account.used < known - tolerance:
            self.oracle.fail("billed + absorbed = held", f"{name}: {account} of {known} ms known, {held} ms held")

    def _check_billed(
        self, name: str, outcome: str | None, fact: Fact, account: Account, limit: int | None, recovery: bool
    ) -> None:
        """What a fault cost is not the customer's; the rest is."""
        held, tolerance = fact.held_ms(0), TOLERANCE_MS * fact.ranks
        loading = (held if fact.loaded_ms is None else fact.loaded_ms) if recovery else 0
        counts = held if limit is None else min(limit, held)
        if outcome == "FAULT":
            known = self._known(fact.work_id)
            counts = min(counts, max((stamp.used_ms for stamp in fact.stamps if stamp.key in known), default=0))
        due = max(0, counts - loading)
        if account.billed > due + tolerance:
            self.oracle.fail("what was lost is not billed", f"{name} {outcome}: {account}, at most {due} ms")
        least = max(0, min(counts, fact.known_ms) - loading)
        if account.billed < least - tolerance:
            self.oracle.fail("what was used is billed", f"{name} {outcome}: {account}, at least {least} ms")

    def _known(self, job_id: str) -> set[str]:
        """Keys of the checkpoints that the platform has heard of."""
        return {key for (key,) in self.oracle.rows("SELECT storage_key FROM checkpoints WHERE job_id = ?", job_id)}

    def _limits(self, job_id: str, facts: list[Fact | None]) -> list[int | None]:
        """For each attempt how much of it counts, where a later one found newer checkpoints torn; None: all."""
        known = self._known(job_id)
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
