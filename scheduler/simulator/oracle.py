"""What must be true, told from the rows by plain SQL and from the cluster's ground truth.

Shares no code with the collector, the ledger or its verification. What is cheap is looked at after every commit,
everything at the end. The rules of money are in ``books``.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sqlalchemy.exc import DBAPIError

from scheduler.simulator.books import Books
from scheduler.simulator.clock import Process
from scheduler.simulator.faults import DatabaseFault, StoreFault

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

    status: str
    seq: int


class Oracle:
    def __init__(self, world: World) -> None:
        self.world = world
        self.books = Books(world, self)
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

    def cancelled(self, job_id: str) -> None:
        self._cancelled.add(job_id)

    def committed(self, process: Process) -> None:
        """Everything that is cheap to look at."""
        lease = self.leases.get(process.name)
        if lease is not None:
            (epoch,) = self.rows("SELECT epoch FROM scheduler_lease")[0]
            if epoch != lease.epoch:
                self.fail("who lost the lease writes no more", f"{process.name} of epoch {lease.epoch}, it is {epoch}")
        self._check_jobs()
        self._check_attempts()
        self.books.committed(process)

    # After every commit.

    def _check_jobs(self) -> None:
        for job_id, status, event_seq, attempt, artifact_id in self.rows(
            "SELECT id, status, event_seq, attempt, artifact_id FROM training_jobs"
        ):
            before = self._seen.get(job_id, _Seen("QUEUED", 0))
            if before == (status, event_seq):
                continue
            self._check_path(job_id, before, status, event_seq)
            self._seen[job_id] = _Seen(status, event_seq)
            (open_attempts,) = self.rows(
                "SELECT count(*) FROM attempts WHERE work_id = ? AND outcome IS NULL AND number = ?", job_id, attempt
            )[0]
            if open_attempts != (status in ACTIVE):
                self.fail("an attempt is open while a job is active", f"{job_id} {status}: {open_attempts}")
            artifacts = self.rows("SELECT id FROM model_artifacts WHERE job_id = ?", job_id)
            if artifacts != ([(artifact_id,)] if status == "COMPLETED" else []):
                self.fail("one artifact of what is completed", f"{job_id} {status}: {artifacts}")

    def _check_path(self, job_id: str, before: _Seen, status: str, event_seq: int) -> None:
        """Each status that the job went through may follow the one before; its events have no gap."""
        events = self.rows(
            "SELECT seq, type, payload FROM job_events WHERE job_id = ? AND seq > ? ORDER BY seq", job_id, before.seq
        )
        if [seq for seq, _, _ in events] != list(range(before.seq + 1, event_seq + 1)):
            self.fail("events without a gap", f"{job_id}: {[seq for seq, _, _ in events]} after {before.seq}")
        at = before.status
        for _, kind, payload in events:
            following = json.loads(payload)["status"] if kind == "stage" else at
            if following != at and (at, following) not in LEGAL:
                self.fail("transitions are legal", f"{job_id}: {at} to {following}")
            at = following
        if at != status:
            self.fail("every transition is told", f"{job_id} is {status}, its events say {at}")

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
            waits = status == "PAUSED" and (paused_by == "PAUSE" or self.books.cannot_go_on(job_id))
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
        for letter, tries in self.rows("SELECT id, tries FROM outbox WHERE delivered_at IS NULL AND failed_at IS NULL"):
            if tries == 0 or not self.world.set_back:
                found.append(f"letter {letter} is not delivered")
        return found

    def final(self) -> None:
        """Every rule."""
        for key, job_id in self._acknowledged.items():
            if not self.rows("SELECT 1 FROM training_jobs WHERE id = ?", job_id):
                self.fail("no acknowledged job is lost", f"{job_id} ({key})")
        for name, count in self.rows("SELECT name, count(*) FROM training_jobs WHERE retry_of IS NULL GROUP BY name"):
            if count > 1:
                self.fail("the same key, the same job", f"{count} jobs of {name}")
        for job_id in sorted(self._cancelled):
            ((status,),) = self.rows("SELECT status FROM training_jobs WHERE id = ?", job_id)
            if status not in TERMINAL:
                self.fail("an accepted cancel ends the job", f"{job_id} is {status}")
        self._check_notices()
        self._check_letters()
        self._check_checkpoints()
        self.books.final()
        self.check()

    def check(self) -> None:
        if self.violation:
            raise Violated(self.violation)

    def _check_notices(self) -> None:
        for job_id, status in self.rows("SELECT id, status FROM training_jobs"):
            told = [
                kind
                for (kind,) in self.rows(
                    "SELECT type FROM notifications WHERE type LIKE 'JOB%' AND dedupe_key LIKE ?", f"%{job_id}%"
                )
            ]
            due = {"COMPLETED": ["JOB_COMPLETE"], "FAILED": ["JOB_FAILED"]}.get(status, [])
            if told != due:
                self.fail("one notification of each end", f"{job_id} {status}: {told}")

        for status, told in self.rows(
            "SELECT v.status, (SELECT count(*) FROM notifications n WHERE n.dedupe_key LIKE '%' || v.id || '%')"
            " FROM verdicts v WHERE v.attempt > 0"
        ):
            if told != (status in TERMINAL):
                self.fail("one notification of each end", f"a verdict {status}: {told}")

    def _check_letters(self) -> None:
        """Each end of a job is enqueued once; what is noted as delivered was, and nothing else went out."""
        for job_id, status, count in self.rows(
            "SELECT j.id, lower(j.status), count(o.id) FROM training_jobs j LEFT JOIN outbox o"
            " ON json_extract(o.payload, '$.data.jobId') = j.id AND json_extract(o.payload, '$.type') ="
            " 'job.' || lower(j.status) WHERE j.team_id = 'team-1' AND j.status IN ('COMPLETED', 'FAILED', 'CANCELLED')"
            " GROUP BY 1, 2"
        ):
            if count != 1:
                self.fail("one letter of each end", f"{job_id} {status}: {count}")
        rows = dict(self.rows("SELECT id, delivered_at FROM outbox"))
        for row_id, delivered_at in rows.items():
            if delivered_at is not None and not self.world.received[row_id]:
                self.fail("delivered is delivered", row_id)
        invented = [row_id for row_id in self.world.received if row_id not in rows]
        if invented or self.rows("SELECT 1 FROM outbox WHERE failed_at IS NOT NULL"):
            self.fail("letters are of what was committed, and are not given up", str(invented))

    def _check_checkpoints(self) -> None:
        """What is offered for the next attempt is there."""
        for (key,) in self.rows("SELECT storage_key FROM checkpoints WHERE deleted_at IS NULL"):
            if key not in self.world.objects.keys:
                self.fail("what is kept has its files", key)

    def census(self) -> Counter[str]:
        return Counter(dict(self.rows("SELECT status, count(*) FROM training_jobs GROUP BY status")))
