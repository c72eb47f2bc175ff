"""The ledger against a naive oracle, on both databases."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from control_plane.db import Database
from control_plane.services import paused
from control_plane.states import Outcome, Status, StopReason
from control_plane.tables import AttemptUsage, CostRecord, TrainingJob
from scheduler import ledger
from tests.ledgers import (
    HOUR_MS,
    checkpoint,
    finish_job,
    next_attempt,
    price_of,
    records,
    report,
    running,
    settle,
    tear,
    violations,
)
from tests.rows import PRICE, make_running_job, make_team

reports = st.lists(
    st.dictionaries(
        st.sampled_from(["0", "1", "2"]),
        st.dictionaries(
            st.sampled_from(["loading", "training", "evaluating", "saving"]), st.integers(0, 40_000), min_size=1
        ),
        min_size=1,
    ),
    min_size=1,
    max_size=8,
)


@given(reports=reports, price=st.integers(1, 20_000_000), least_ms=st.sampled_from([0, 3_000, 10_000]))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_late_repeated_and_permuted_reports_cost_what_the_highest_say(
    database: Database, reports: list[ledger.Usage], price: int, least_ms: int
) -> None:
    highest: dict[tuple[str, str], int] = {}
    for usage in reports:
        for rank, kinds in usage.items():
            for kind, ms in kinds.items():
                highest[rank, kind] = max(highest.get((rank, kind), 0), ms)
    ids = await running(database, gpu_count=3, price_microusd_per_hour=price)
    for usage in [*reports, *reversed(reports)]:
        await report(database, ids, usage, least_ms=least_ms)
    await settle(database, ids, Outcome.COMPLETED)
    job = await finish_job(database, ids[0])
    rows = await records(database, ids[0])
    assert job.final_cost_microusd == sum(amount for *_, amount in rows) == price_of(sum(highest.values()), price)
    assert sum(ms for _, ms, _ in rows) == sum(highest.values())
    assert all(kind == "charge" for kind, *_ in rows)


@given(steps=st.lists(st.integers(1, 9_999), min_size=1, max_size=25), price=st.sampled_from([1, 1799, 359_999, PRICE]))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_rounding_never_accumulates(database: Database, steps: list[int], price: int) -> None:
    ids = await running(database, price_microusd_per_hour=price)
    total = 0
    for step in steps:
        total += step
        await report(database, ids, {"0": {"training": total}}, least_ms=0)
        assert sum(amount for *_, amount in await records(database, ids[0])) == price_of(total, price)


async def test_half_a_micro_dollar_goes_to_the_even_neighbour(database: Database) -> None:
    for gpu_ms, amount in ((1, 0), (3, 2), (5, 2), (7, 4)):
        ids = await running(database, price_microusd_per_hour=HOUR_MS // 2)
        await report(database, ids, {"0": {"training": gpu_ms}}, least_ms=0)
        assert await records(database, ids[0]) == [("charge", gpu_ms, amount)]


async def test_the_database_counts_each_kind_of_a_rank_once(database: Database) -> None:
    async with database.write() as session:
        _, attempt = await make_running_job(session)
        await ledger.record(session, attempt, {"0": {"training": 1_000}})
    with pytest.raises(IntegrityError):
        async with database.write() as session:
            session.add(AttemptUsage(attempt_id=attempt.id, rank=0, kind="training", gpu_ms=1_000, absorbed_ms=0))


async def test_a_little_stays_unposted_until_the_end(database: Database) -> None:
    ids = await running(database)
    assert not await report(database, ids, {"0": {"training": 9_999}})
    assert await report(database, ids, {"0": {"training": 10_000}})
    assert not await report(database, ids, {"0": {"training": 10_001}})
    await settle(database, ids, Outcome.FAILED)
    assert await records(database, ids[0]) == [("charge", 10_000, 1_000), ("charge", 1, 0)]


async def test_a_fault_reverses_what_was_charged_past_the_last_checkpoint(database: Database) -> None:
    ids = await running(database)
    await checkpoint(database, ids, 5, {"0": {"loading": 3_000, "training": 10_000}})
    await report(database, ids, {"0": {"loading": 3_000, "training": 40_000}})
    await settle(database, ids, Outcome.FAULT, held_ms=43_700)
    assert await records(database, ids[0]) == [
        ("charge", 43_000, 4_300),
        ("reversal", -30_000, -3_000),
        ("absorbed", 30_700, 0),
    ]
    job = await finish_job(database, ids[0])
    assert job.final_cost_microusd == 1_300
    assert await violations(database) == []


async def test_without_a_checkpoint_a_fault_costs_nothing(database: Database) -> None:
    ids = await running(database)
    await report(database, ids, {"0": {"loading": 3_000, "training": 40_000}})
    await settle(database, ids, Outcome.FAULT, held_ms=43_000)
    assert sum(amount for *_, amount in await records(database, ids[0])) == 0
    assert (await finish_job(database, ids[0])).final_cost_microusd == 0
    assert await violations(database) == []


async def test_loading_after_a_fault_is_absorbed(database: Database) -> None:
    first = await running(database)
    await checkpoint(database, first, 5, {"0": {"loading": 1_000, "training": 2_000}})
    await report(database, first, {"0": {"loading": 1_000, "training": 3_000}})
    await settle(database, first, Outcome.FAULT, held_ms=4_000)
    second = await next_attempt(database, first, recovery=True)
    await report(database, second, {"0": {"loading": 7_000, "training": 11_000, "saving": 500}})
    await settle(database, second, Outcome.COMPLETED, held_ms=18_600)
    job = await finish_job(database, first[0])
    assert job.final_cost_microusd == price_of(3_000 + 11_500)
    async with database.read() as session:
        absorbed = {
            (row.kind, row.gpu_ms, row.absorbed_ms)
            for row in await session.scalars(select(AttemptUsage).where(AttemptUsage.attempt_id == second[1]))
        }
    assert absorbed == {("loading", 7_000, 7_000), ("training", 11_000, 0), ("saving", 500, 0), ("tail", 100, 100)}
    assert await violations(database) == []


@pytest.mark.parametrize(
    ("outcome", "reason", "billed"),
    [
        (Outcome.COMPLETED, None, 20_000),
        (Outcome.FAILED, None, 20_000),
        (Outcome.STOPPED, StopReason.CANCEL, 20_000),
        (Outcome.STOPPED, StopReason.PAUSE, 20_000),
        (Outcome.STOPPED, StopReason.PREEMPT, 15_000),
        (Outcome.FAULT, None, 15_000),
        (Outcome.FAULT, StopReason.CANCEL, 15_000),
    ],
)
async def test_who_bears_what_follows_the_last_checkpoint(
    database: Database, outcome: Outcome, reason: StopReason | None, billed: int
) -> None:
    ids = await running(database)
    await checkpoint(database, ids, 1, {"0": {"training": 5_000}})
    await checkpoint(database, ids, 9, {"0": {"training": 15_000}})
    await report(database, ids, {"0": {"training": 20_000}})
    await settle(database, ids, outcome, stop_reason=reason, held_ms=20_200)
    rows = await records(database, ids[0])
    assert sum(ms for kind, ms, _ in rows if kind != "absorbed") == billed
    assert sum(ms for kind, ms, _ in rows if kind == "absorbed") == 20_200 - billed
    await finish_job(database, ids[0])
    assert await violations(database) == []


async def test_the_allowance_grows_with_use_and_stops_at_the_hold(database: Database) -> None:
    async with database.write() as session:
        rich = await make_running_job(session)
        poor_team = await make_team(session, budget_microusd=10_000)
        poor = await make_running_job(session, team=poor_team, held_microusd=4_000)
        for _, attempt in (rich, poor):
            await ledger.record(session, attempt, {"0": {"training": 20_000}})
        assert await ledger.allowance_ms(session, *rich, ahead_ms=1_800_000) == 1_820_000
        assert await ledger.allowance_ms(session, *poor, ahead_ms=10_000) == 30_000
        assert await ledger.allowance_ms(session, *poor, ahead_ms=1_800_000) == 40_000
        await ledger.reserve(session, poor[0], ahead_ms=1_800_000)
        assert await ledger.allowance_ms(session, *poor, ahead_ms=1_800_000) == 100_000
        assert (await paused.means(session, poor[0])).left == 10_000
        await ledger.record(session, poor[1], {"0": {"training": 100_000}})
        await ledger.post(session, *poor)
        assert (await paused.means(session, poor[0])).left == 0
        assert not (await paused.means(session, poor[0])).sufficient
        assert (await paused.means(session, rich[0])).left is None


async def test_time_absorbed_before_leaves_the_allowance(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session, budget_microusd=4_000)
        job, attempt = await make_running_job(session, team=team, held_microusd=4_000)
        attempt.recovery = True
        await ledger.record(session, attempt, {"0": {"loading": 5_000, "training": 10_000}})
        assert await ledger.allowance_ms(session, job, attempt, 1_800_000) == 40_000 + 5_000


async def torn(database: Database) -> tuple[list[tuple[str, str]], str]:
    """Three attempts, each with checkpoints after 10 and 20 s and then paused; the first checkpoint of the second."""
    attempts, second = [await running(database, gpu_count=2)], ""
    for number in range(3):
        if number:
            attempts.append(await next_attempt(database, attempts[0]))
        for step in (1, 2):
            ms = step * 10_000
            point = await checkpoint(
                database, attempts[-1], 2 * number + step, {"0": {"training": ms}, "1": {"training": ms - 1_000}}
            )
            second = point if (number, step) == (1, 1) else second
        await report(database, attempts[-1], {"0": {"training": 21_000}, "1": {"training": 21_000}})
        await settle(database, attempts[-1], Outcome.STOPPED, stop_reason=StopReason.PAUSE)
    return attempts, second


async def test_torn_checkpoints_take_what_was_billed_past_the_whole_one(database: Database) -> None:
    attempts, second = await torn(database)
    before = await records(database, attempts[0][0])
    current = await next_attempt(database, attempts[0])
    await report(database, current, {"0": {"training": 5_000}})
    assert await tear(database, attempts[0][0], second, current[1])
    assert (await records(database, attempts[0][0]))[len(before) :] == [
        ("reversal", -23_000, -2_300),
        ("absorbed", 23_000, 0),
        ("reversal", -42_000, -4_200),
        ("absorbed", 42_000, 0),
    ]
    async with database.read() as session:
        found = await session.scalars(select(CostRecord).order_by(CostRecord.recorded_at).offset(len(before)))
        assert [record.attempt_id for record in found] == [attempts[1][1]] * 2 + [attempts[2][1]] * 2
    assert not await tear(database, attempts[0][0], second, current[1])
    for late in attempts:
        await report(database, late, {"0": {"training": 99_000}}, least_ms=0)
        await settle(database, late, Outcome.STOPPED, stop_reason=StopReason.PAUSE)
    await settle(database, current, Outcome.COMPLETED)
    job = await finish_job(database, attempts[0][0], Status.COMPLETED)
    assert job.final_cost_microusd == price_of(42_000 + 19_000 + 5_000)
    assert await violations(database) == []


async def test_a_later_tear_takes_more_and_starting_over_takes_all(database: Database) -> None:
    attempts, second = await torn(database)
    _, third = await next_attempt(database, attempts[0])
    await tear(database, attempts[0][0], second, third)
    assert await tear(database, attempts[0][0], None, third)
    assert sum(amount for *_, amount in await records(database, attempts[0][0])) == 0
    assert await violations(database) == []


async def test_a_job_that_has_ended_is_given_back_what_its_retry_lost(database: Database) -> None:
    attempts, second = await torn(database)
    before = await finish_job(database, attempts[0][0])
    _, retry = await running(database, gpu_count=2, retry_of=before.id)
    assert await tear(database, before.id, second, retry)
    async with database.read() as session:
        after = await session.get_one(TrainingJob, attempts[0][0])
    assert after.final_cost_microusd == after.current_cost_microusd == (before.final_cost_microusd or 0) - 6_500
    assert await violations(database) == []


async def test_records_keep_their_order_when_clocks_do_not(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = await running(database)
    await report(database, ids, {"0": {"training": 20_000}})
    async with database.read() as session:
        first = (await session.scalars(select(CostRecord.recorded_at))).one()
    monkeypatch.setattr("control_plane.tables.base.clock", lambda: first.replace(year=2020))
    await report(database, ids, {"0": {"training": 40_000}})
    async with database.read() as session:
        found = list(await session.scalars(select(CostRecord).order_by(CostRecord.recorded_at)))
    assert [record.details["gpuMs"] for record in found] == [20_000, 20_000]
    assert found[1].recorded_at > first
    assert found[1].billing_period == first.replace(hour=0, minute=0, second=0, microsecond=0)
