"""What must be true, told from the rows by plain SQL and from the cluster's ground truth.

Shares no code with the collector, the ledger or its verification. Cheap rules are looked at after every commit, all of
them at the end.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from scheduler.executor import AttemptGone, StaleEpoch, Unreachable
from scheduler.simulator.clock import Process
from scheduler.tracking import TrackingDown

if TYPE_CHECKING:
    from scheduler.lease import Lease
    from scheduler.simulator.cluster import Fact
    from scheduler.simulator.world import World

TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")


class Violated(Exception):
    """``rule: what was found``."""


class Oracle:
    def __init__(self, world: World) -> None:
        self.world = world
        self.leases: dict[str, Lease] = {}
        """By process name."""
        self._jobs: dict[str, str] = {}
        self._violation: str | None = None

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        return self.world.store.raw.execute(sql, parameters).fetchall()

    def broken(self, error: BaseException | None) -> None: 
        self.world.note("broken", error=repr(error))
        self._violation = self._violation or repr(error)

    def logged(self, error: BaseException) -> None:
        expected = (DBAPIError, sqlite3.Error, Unreachable, AttemptGone, StaleEpoch, TrackingDown, OSError, TimeoutError)
        if not isinstance(error, expected):
            self._violation = self._violation or f"unexpected error: {error!r}"

    def check_alive(self) -> None:
        if self._violation:
            raise Violated(self._violation)

    def committed(self, process: Process) -> None: ...
    def occupied(self, fact: Fact) -> None: ...
    def acknowledged(self, key: str, job_id: str) -> None:
        self._jobs[key] = job_id
    def cancelled(self, job_id: str) -> None: ...
    def budget_asked(self, team_id: str, amount: int | None) -> None: ...
    def at_rest(self) -> bool:
        return not self.rows("SELECT 1 FROM training_jobs WHERE status IN ('QUEUED','INITIALIZING','RUNNING')")
    def restless(self) -> None:
        raise Violated("liveness: " + repr(self.rows("SELECT id, status, queue_reason FROM training_jobs")))
    def final(self) -> None:
        self.check_alive()
    def census(self) -> Counter[str]:
        return Counter({status: n for status, n in self.rows("SELECT status, count(*) FROM training_jobs GROUP BY 1")})
