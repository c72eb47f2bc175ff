"""The whole platform in a simulated world, over many seeds (``python -m scheduler.simulator`` runs more)."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from control_plane.services import lifecycle, paused
from scheduler import accrual, collect, finish, ledger
from scheduler.lease import Lease
from scheduler.simulator import faults, inhabitants
from scheduler.simulator.__main__ import main
from scheduler.simulator.cluster import Training
from scheduler.simulator.faults import KINDS, DatabaseFault
from scheduler.simulator.network import ClusterClient, Messenger
from scheduler.simulator.sweep import run

SEEDS = 2000
REPLAYED = (3, 21, 58)
PASSAGES = (
    "PAUSED by BUDGET > QUEUED by itself",
    "PAUSED by PAUSE > QUEUED by a user",
    "RUNNING, asked to BUDGET > PAUSED",
    "RUNNING, asked to CANCEL > CANCELLED",
    "RUNNING, asked to PAUSE > PAUSED",
)


def test_no_seed_violates_a_rule_and_the_seeds_reach_everything() -> None:
    summary = run(range(1, SEEDS + 1), os.cpu_count() or 1)

    assert {result.seed: result.violation for result in summary.violations} == {}
    assert summary.seeds == SEEDS
    assert [kind for kind in KINDS if summary.faults[kind] < SEEDS // 100] == []
    assert {status: summary.jobs[status] for status in ("COMPLETED", "FAILED", "CANCELLED", "PAUSED")}.keys() == {
        status for status in summary.jobs if status != "QUEUED"
    }
    assert [passage for passage in PASSAGES if summary.passages[passage] < SEEDS // 500] == []
    assert summary.transactions > 50 * SEEDS


def test_a_seed_is_the_same_world_in_every_process() -> None:
    def replay(hash_seed: str) -> list[str]:
        return [
            subprocess.run(
                [sys.executable, "-m", "scheduler.simulator", "--seed", str(seed)],
                env=os.environ | {"PYTHONHASHSEED": hash_seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in REPLAYED
        ]

    first = replay("1")
    assert all(len(trace.splitlines()) > 5 for trace in first)
    assert replay("2") == first


def _no_check(self: Lease, *_: Any) -> Any:
    return self._database.write()


async def _absorb_nothing(*_: Any, **__: Any) -> None: ...


async def _save_nothing(*_: Any) -> dict[str, Any]:
    return {}


async def _never(*_: Any) -> bool:
    return False


async def _post_thrice(self: Messenger, letter: Any, post: Any = Messenger.post) -> None:
    for _ in range(3):
        await post(self, letter)


async def _charge_nothing(*_: Any) -> int:
    return 0


async def _refuse(*_: Any) -> None:
    raise IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE constraint failed"))


async def _lose_the_database(*_: Any) -> None:
    raise OperationalError("UPDATE", {}, DatabaseFault("unable to open database file"))


@pytest.mark.parametrize(
    ("where", "what", "instead", "rule"),
    [
        (Lease, "write", _no_check, "who lost the lease writes no more"),
        (ledger, "_absorb_beyond", lambda *_: None, "what was lost is not billed"),
        (ledger, "_absorb_tails", lambda *_: None, "billed + absorbed = held"),
        (ledger, "_last_stamp", _save_nothing, "what was used is billed"),
        (paused, "go_on", _never, "everything comes to rest"),
        (accrual.Accrual, "catch_up", _charge_nothing, "everything comes to rest: storage"),
        (finish, "notify", _absorb_nothing, "one notification of each end"),
        (Messenger, "post", _post_thrice, "a letter goes once"),
        (ClusterClient, "stop", _absorb_nothing, "a stop reaches what runs"),
        (lifecycle, "ask_to_stop", _absorb_nothing, "an accepted stop is noted"),
        (collect, "_store", _refuse, "no error without a fault"),
        (Lease, "keep_beating", _lose_the_database, "no process dies of an error"),
    ],
)
def test_a_broken_platform_is_found_out(
    where: Any, what: str, instead: Any, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, what, instead)
    found = []
    for first in range(1, 400, 20):
        found += run(range(first, first + 20), 1).violations
        if found:
            break
    assert any((result.violation or "").startswith(rule) for result in found), [r.violation for r in found]


async def _covered_by_the_hold(session: Any, job: Any) -> int | None:
    """Whatever the budget has become since the hold was given."""
    if await ledger.budget.available(session, job.team_id) is None or job.price_microusd_per_hour == 0:
        return None
    return ledger._ms_for(await ledger._hold_microusd(session, job.id), job)


def test_a_lowered_budget_that_running_jobs_do_not_hear_of_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In long jobs of rich teams, with no fault: elsewhere few jobs have much left to spend when a budget falls."""
    monkeypatch.setattr(faults, "draw", lambda *_: [])
    monkeypatch.setattr(inhabitants, "BUDGETS_MICROUSD", (1_000_000,))
    monkeypatch.setattr(
        Training, "draw", lambda _: Training(60, step_s=2.5, load_s=3.0, save_s=0.7, checkpoint_every=5)
    )
    seeds = range(1, 6)
    assert run(seeds, 1).violations == []

    monkeypatch.setattr(ledger, "covered_ms", _covered_by_the_hold)
    found = [result.violation or "" for result in run(seeds, 1).violations]
    assert any(violation.startswith("posted ≤ budget + 30 GPU-seconds a job") for violation in found)


def test_a_violation_names_its_seed_and_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finish, "notify", _absorb_nothing)

    assert main(["--seeds", "20", "--jobs", "1"]) == 1

    said = capsys.readouterr().out
    assert "one notification of each end" in said
    (seed, *_) = [line.split()[1] for line in said.splitlines() if line.startswith("seed ")]
    assert f"-m scheduler.simulator --seed {seed}" in said
    assert main(["--seed", seed]) == 1
