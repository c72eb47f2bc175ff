"""What must be true, told from the rows by plain SQL and from the cluster's ground truth.

Shares no code with the collector, the ledger or its verification. What is cheap is looked at after every commit,
everything at the end. The rules of money are in ``books``, ``budgets`` and ``storage``, those of stopping in ``stops``,
those of telling in ``letters``.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sqlalchemy.exc import DBAPIError

from scheduler.simulator.books import Books
from scheduler.simulator.budgets import Budgets
from scheduler.simulator.clock import Process
from scheduler.simulator.faults import DatabaseFault, StoreFault
from scheduler.simulator.letters import Letters
from scheduler.simulator.stops import Stops
from scheduler.simulator.storage import Storage

if TYPE_CHECKING:
    from scheduler.lease import Lease
    from scheduler.simulator.cluster import Fact
    from scheduler.simulator.world import World

TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")
ACTIVE = ("INITIALIZING", "RUNNING")
LEGAL = {
    ("QUEUED", "INITIALIZING"), ("QUEUED", "PAUSED"), ("QUEUED", "FAILED"), ("QUEUED", "CANCELLED"),
    ("INITIALIZING", "RUNNING"), ("INITIALIZING", "QUEUED"), ("INITIALIZING", "PAUSED"),
    ("INITIALIZING", "FAILED"), ("INITIALIZING", "CANCELLED"), ("INITIALIZING", "COMPLETED"),
    ("RUNNING", "QUEUED"), ("RUNNING", "PAUSED"), ("RUNNING", "COMPLETED"), ("RUNNING", "FAILED"),
    ("RUNNING", "CANCELLED"), ("PAUSED", "QUEUED"), ("PAUSED", "FAILED"), ("PAUSED", "CANCELLED"),
}  # fmt: skip
CAUSED_BY_FAULTS = (DatabaseFault, StoreFault)
MIRRORED = {"COMPLETED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED"}


class Violated(Exception):
    """``rule: what was found``."""


class _Seen(NamedTuple):
    """A job as the last commit left it."""

    status: str = "QUEUED"
    seq: int = 0
    requested: str | None = None
    paused_by: str | None = None


class Oracle:
    def __init__(self, world: World) -> None:
        self.world = world
        self.books = Books(world, self)
        self.budgets = Budgets(world, self)
        self.storage = Storage(world, self)
        self.stops = Stops(world, self)
        self.letters = Letters(world, self)
        self.passages: Counter[str] = Counter()
        """How often jobs went from where to where."""
        self.leases: dict[str, Lease] = {}
        """By process name."""
        self.violation: str | None = None
        self.alarm: asyncio.Event = asyncio.Event()
        self._acknowledged: dict[str, str] = {}
        """Idempotency key → job."""
        self._cancelled: set[str] = set()
        self._seen: dict[str, _Seen] = {}
        self._outcomes: dict[str, str] = {}

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        return self.world.store.raw.execute(sql, parameters).fetchall()

    def fail(self, rule: str, found: str) -> None:
        """Note the first violation and let the world end; what found it may be inside of the platform's own code."""
        self.world.note("VIOLATION", rule=rule, found=found)
        self.violation = self.violation or f"{rule}: {found}"
        self.alarm.set()

    def open_attempts(self) -> list[str]:
        return [name for (name,) in self.rows("SELECT actor_name FROM attempts WHERE outcome IS NULL")]

    # Told by the world.

    def logged(self, error: BaseException) -> None:
        """An error that the platform logged."""
        if isinstance(error, BaseExceptionGroup):
            for one in error.exceptions:
                self.logged(one)
        elif not isinstance(error.orig if isinstance(error, DBAPIError) else error, CAUSED_BY_FAULTS):
            self.fail("no error without a fault", repr(error)[:500])

    def died(self, process: Process, error: BaseException) -> None:
        """A fault excuses no death: whatever one attempt or one transaction meets, the others need the process."""
        self.fail("no process dies of an error", f"{process.name}: {error!r}"[:500])

    def occupied(self, fact: Fact) -> None:
        """To be told before its ranks are counted as holding."""
        for other in self.world.cluster.facts.values():
            if other.work_id == fact.work_id and other.holds:
                self.fail("none runs twice at once", f"{fact.name} begins while {other.name} holds its slots")
        taken = sum(other.ranks for other in self.world.cluster.facts.values() if other.holds and other.metered)
        if fact.metered and taken + fact.ranks > self.world.slots:
            self.fail("a slot is given once", f"{fact.name} wants {fact.ranks}, {taken} of {self.world.slots} taken")

    def acknowledged(self, key: str, job_id: str) -> None:
        if self._acknowledged.setdefault(key, job_id) != job_id:
            self.fail("the same key, the same job", f"{key}: {self._acknowledged[key]} and {job_id}")

    def stop_accepted(self, job_id: str, reason: str, asked_s: float) -> None:
        self.stops.accepted(job_id, reason, asked_s)
        if reason == "CANCEL":
            self._cancelled.add(job_id)

    def committed(self, process: Process) -> None:
        """Everything that is cheap to look at."""
        lease = self.leases.get(process.name)
        if lease is not None:
            (epoch,) = self.rows("SELECT epoch FROM scheduler_lease")[0]
            if epoch != lease.epoch:
                self.fail("who lost the lease writes no more", f"{process.name} of epoch {lease.epoch}, it is {epoch}")
        self._check_jobs(process)
        self._check_attempts()
        self.books.committed(process)
        self.budgets.committed(process)
        self.stops.committed()
        self.letters.committed(process)

    # After every commit.

    def _check_jobs(self, process: Process) -> None:
        jobs = self.rows(
            "SELECT id, status, event_seq, stop_requested, paused_by, attempt, artifact_id FROM training_jobs"
        )
        lost = set(self._acknowledged.values()) - {row[0] for row in jobs}
        if lost:
            self.fail("no acknowledged job is lost", str(sorted(lost)))
        for job_id, status, event_seq, requested, paused_by, attempt, artifact_id in jobs:
            before, seen = self._seen.get(job_id, _Seen()), _Seen(status, event_seq, requested, paused_by)
            if before == seen:
                continue
            self._check_path(process, job_id, before, seen)
            self._seen[job_id] = seen
            (open_attempts,) = self.rows(
                "SELECT count(*) FROM attempts WHERE work_id = ? AND outcome IS NULL AND number = ?", job_id, attempt
            )[0]
            if open_attempts != (status in ACTIVE):
                self.fail("an attempt is open while a job is active", f"{job_id} {status}: {open_attempts}")
            artifacts = self.rows("SELECT id FROM model_artifacts WHERE job_id = ?", job_id)
            if artifacts != ([(artifact_id,)] if status == "COMPLETED" else []):
                self.fail("one artifact of what is completed", f"{job_id} {status}: {artifacts}")

    def _check_path(self, process: Process, job_id: str, before: _Seen, seen: _Seen) -> None:
        """Each status that the job went through may follow the one before; its events have no gap."""
        events = self.rows(
            "SELECT seq, type, payload FROM job_events WHERE job_id = ? AND seq > ? ORDER BY seq", job_id, before.seq
        )
        if [seq for seq, _, _ in events] != list(range(before.seq + 1, seen.seq + 1)):
            self.fail("events without a gap", f"{job_id}: {[seq for seq, _, _ in events]} after {before.seq}")
        at = before.status
        for _, kind, payload in events:
            following = json.loads(payload)["status"] if kind == "stage" else at
            if following != at and (at, following) not in LEGAL:
                self.fail("transitions are legal", f"{job_id}: {at} to {following}")
            if following != at:
                self._passed(process, job_id, before._replace(status=at), following)
            at = following
        if at != seen.status:
            self.fail("every transition is told", f"{job_id} is {seen.status}, its events say {at}")

    def _passed(self, process: Process, job_id: str, before: _Seen, following: str) -> None:
        """A job went from where ``before`` says to ``following``."""
        self.passages[f"{before.status} > {following}"] += 1
        if before.status in ACTIVE and following not in ACTIVE:
            self.stops.left(job_id, before.requested, following)
            if following == "QUEUED":
                self.books.queued_again(job_id)
            if before.requested:
                self.passages[f"{before.status}, asked to {before.requested} > {following}"] += 1
        if before.status == "PAUSED":
            who = "a user" if process.host == "api" else "itself"
            self.passages[f"PAUSED by {before.paused_by} > {following} by {who}"] += 1
        if following in TERMINAL:
            self.letters.ended(job_id, following)

    def _check_attempts(self) -> None:
        for work_id, count, last, still_open, current in self.rows(
            "SELECT work_id, count(*), max(number), sum(outcome IS NULL),"
            " coalesce((SELECT attempt FROM training_jobs j WHERE j.id = work_id),"
            " (SELECT attempt FROM verdicts v WHERE v.id = work_id)) FROM attempts GROUP BY work_id"
        ):
            if not count == last == current or still_open > 1:
                self.fail("attempts without a gap", f"{work_id}: {count}, last {last} of {current}, {still_open} open")
        for attempt_id, outcome in self.rows("SELECT id, outcome FROM attempts WHERE outcome IS NOT NULL"):
            if self._outcomes.setdefault(attempt_id, outcome) != outcome:
                self.fail("an outcome stands", f"{attempt_id}: {self._outcomes[attempt_id]}, now {outcome}")
        backwards = self.rows(
            "SELECT b.actor_name FROM attempts a JOIN attempts b ON a.work_id = b.work_id AND a.number < b.number"
            " AND a.lease_epoch > b.lease_epoch"
        )
        if backwards:
            self.fail("lease epochs only grow", str(backwards))

    # At the end.

    def at_rest(self) -> bool:
        return not self._under_way()

    def restless(self) -> NoReturn:
        raise Violated(f"everything comes to rest: {'; '.join(self._under_way())[:800]}")

    def _under_way(self) -> list[str]:
        """What is still to be done; empty when every job has ended, or waits with a good reason."""
        found = []
        for job_id, status, reason, count, paused_by in self.rows(
            "SELECT id, status, queue_reason, gpu_count, paused_by FROM training_jobs"
        ):
            impossible = status == "QUEUED" and count > self.world.slots and reason and "needed" in reason
            waits = status == "PAUSED" and (paused_by == "PAUSE" or self.budgets.cannot_go_on(job_id))
            if status not in TERMINAL and not impossible and not waits:
                found.append(f"{job_id} is {status} ({reason or paused_by})")
        found += [f"verdict {v} is {status}" for v, status in self.rows("SELECT id, status FROM verdicts") if
                  status not in TERMINAL]  # fmt: skip
        found += [
            f"{name} is not released" for (name,) in self.rows("SELECT actor_name FROM attempts WHERE NOT released")
        ]
        found += [f"{name} holds its slots" for name, fact in self.world.cluster.facts.items() if fact.holds]
        found += [f"actor {name} lives" for name, a in self.world.cluster.attempts.items() if a.alive]
        for job_id, status in self.rows("SELECT id, status FROM training_jobs WHERE mlflow_run_id IS NOT NULL"):
            run = self.world.tracking.of_job(job_id).status
            if run != MIRRORED.get(status, "SCHEDULED"):
                found.append(f"MLflow's run of {job_id} is {run}, the job {status}")
        return found + self.letters.under_way() + self.storage.under_way()

    def final(self) -> None:
        """Every rule."""
        for name, count in self.rows("SELECT name, count(*) FROM training_jobs WHERE retry_of IS NULL GROUP BY name"):
            if count > 1:
                self.fail("the same key, the same job", f"{count} jobs of {name}")
        for job_id in sorted(self._cancelled):
            ((status,),) = self.rows("SELECT status FROM training_jobs WHERE id = ?", job_id)
            if status not in TERMINAL:
                self.fail("an accepted cancel ends the job", f"{job_id} is {status}")
        self._check_checkpoints()
        self.books.final()
        self.storage.final()
        self.letters.final()
        self.check()

    def check(self) -> None:
        if self.violation:
            raise Violated(self.violation)

    def _check_checkpoints(self) -> None:
        """What is offered for the next attempt is there."""
        for (key,) in self.rows("SELECT storage_key FROM checkpoints WHERE deleted_at IS NULL"):
            if key not in self.world.objects.keys:
                self.fail("what is kept has its files", key)

    def census(self) -> Counter[str]:
        return Counter(dict(self.rows("SELECT status, count(*) FROM training_jobs GROUP BY status")))
