"""Each invariant, by one row that breaks it; and the command that checks them, on both databases."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text

from control_plane.db import Database
from control_plane.services import budget
from control_plane.services.alerts import cost_alerts
from control_plane.states import Outcome, Status, StopReason
from control_plane.tables import CostRecord, Notification, PriceVersion, Team, TrainingJob, base, now
from scheduler.accrual import Accrual
from scheduler.lease import Lease
from scheduler.verify import verify
from tests.ledgers import checkpoint, finish_job, next_attempt, records, report, running, settle, tear, violations
from tests.rows import make_dataset, make_price, make_running_job, make_team

GIB = 1024**3
LONG_AGO = "'2020-02-29 12:00:00.000000'"


async def fill(database: Database) -> dict[str, str]:
    """A ledger with everything in it; ids by what they are of."""
    async with database.write() as session:
        team = await make_team(session, budget_microusd=10_000)
        await make_dataset(session, team, file_size=GIB, uploaded_at=now() - timedelta(days=4))
        version = await make_price(session)
        version.storage_microusd_per_gib_month, version.effective_from = 9_000, now() - timedelta(days=9)
        open_job, _ = await make_running_job(session, team=team, held_microusd=1_000)
    first = await running(database, team=team, held_microusd=4_000)
    await checkpoint(database, first, 5, {"0": {"training": 10_000}})
    await report(database, first, {"0": {"loading": 5_000, "training": 20_000}})
    await settle(database, first, Outcome.FAULT, held_ms=25_200)
    second = await next_attempt(database, first, recovery=True)
    await report(database, second, {"0": {"loading": 5_000, "training": 20_000}})
    await settle(database, second, Outcome.COMPLETED, held_ms=25_000)
    await finish_job(database, first[0], Status.COMPLETED)
    async with database.write() as session:
        await budget.change(session, team.id, 7_000)
        await cost_alerts(session, team.id)
        await budget.change(session, team.id, 3_700)
        await cost_alerts(session, team.id)
    lease = Lease(database, 60)
    await lease.try_acquire()
    await Accrual(database, lease).catch_up()
    async with database.read() as session:
        kinds = await session.execute(select(CostRecord.details, CostRecord.id).order_by(CostRecord.recorded_at))
        found = {f"the {row.details['kind']}": row.id for row in kinds if "day" not in row.details}
        days = select(CostRecord.id).where(CostRecord.cost_type == "STORAGE").order_by(CostRecord.dedupe_key)
        storage = (await session.scalars(days)).all()[-2]
        alert = (await session.scalars(select(Notification.id).order_by(Notification.id))).first()
    assert alert is not None
    ids = {"job": first[0], "first": first[1], "second": second[1], "open": open_job.id, "team": team.id}
    return {**ids, **found, "storage": storage, "alert": alert}


JOB = "WHERE id = '{job}'"
DAMAGES = [
    ("price pinned at acceptance", "job", f"UPDATE training_jobs SET price_microusd_per_hour = 1 {JOB}"),
    ("price version in every record", "job", "INSERT a version"),
    ("record of a known job and attempt", "the reversal", "UPDATE cost_records SET job_id = NULL WHERE {record}"),
    ("record of a known job and attempt", "the reversal", "UPDATE cost_records SET attempt_id = NULL WHERE {record}"),
    ("record of a known job and attempt", "the charge", "UPDATE cost_records SET job_id = '{open}' WHERE {record}"),
    ("append-only", "storage", f"UPDATE cost_records SET updated_at = {LONG_AGO} WHERE {{record}}"),
    ("append-only", "the charge", f"UPDATE cost_records SET billing_period = {LONG_AGO} WHERE {{record}}"),
    ("kinds of records", "the absorbed", "UPDATE cost_records SET amount_microusd = 1 WHERE {record}"),
    ("kinds of records", "the absorbed", {"gpuMs": -5_000}),
    ("kinds of records", "the reversal", {"kind": "charge"}),
    (
        "reversed only what was charged",
        "first",
        "UPDATE cost_records SET recorded_at = {0} WHERE id = '{the reversal}'",
    ),
    ("rounded once", "job", "UPDATE cost_records SET amount_microusd = amount_microusd + 1 WHERE id = '{the charge}'"),
    ("posted what was used", "first", "DELETE FROM cost_records WHERE id = '{the reversal}'"),
    ("posted what was used", "second", "UPDATE attempt_usage SET gpu_ms = 20001 WHERE {usage} AND kind = 'training'"),
    ("posted what was used", "second", "DELETE FROM cost_records WHERE id = '{the charge}'"),
    ("absorbed is recorded", "second", "DELETE FROM cost_records WHERE id = '{the absorbed}'"),
    ("absorbed is part of used", "second", "UPDATE attempt_usage SET absorbed_ms = -1 WHERE {usage}"),
    ("absorbed is part of used", "second", "UPDATE attempt_usage SET absorbed_ms = gpu_ms + 1 WHERE {usage}"),
    ("held time is known", "second", "UPDATE attempts SET held_ms = NULL WHERE id = '{second}'"),
    ("what was lost is absorbed", "first", "UPDATE checkpoints SET usage = '{{}}' WHERE attempt_id = '{first}'"),
    ("what was lost is absorbed", "second", "UPDATE attempts SET exit_reason = 'PREEMPT', outcome = 'STOPPED'"),
    ("what was lost is absorbed", "first", "UPDATE attempt_usage SET absorbed_ms = 0 WHERE kind = 'tail'"),
    ("only what was lost is absorbed", "first", "UPDATE attempts SET outcome = 'STOPPED' WHERE id = '{first}'"),
    ("only what was lost is absorbed", "second", "UPDATE attempts SET recovery = false WHERE id = '{second}'"),
    ("only what was lost is absorbed", "second", "UPDATE attempt_usage SET absorbed_ms = gpu_ms WHERE {usage}"),
    ("reloading after a fault is absorbed", "second", "UPDATE attempts SET recovery = false WHERE id = '{second}'"),
    ("billed + absorbed = held", "second", "UPDATE attempts SET held_ms = held_ms + 251 WHERE id = '{second}'"),
    ("held until the end", "job", "UPDATE budget_holds SET state = 'OPEN' WHERE job_id = '{job}'"),
    ("held until the end", "open", "UPDATE budget_holds SET state = 'CLOSED' WHERE job_id = '{open}'"),
    ("held until the end", "job", "DELETE FROM budget_holds WHERE job_id = '{job}'"),
    ("final cost is the sum", "job", f"UPDATE training_jobs SET final_cost_microusd = 0 {JOB}"),
    ("current cost is the sum", "job", f"UPDATE training_jobs SET current_cost_microusd = 0 {JOB}"),
    ("told as posted", "job", "DELETE FROM job_events WHERE job_id = '{job}'"),
    ("told as posted", "job", "UPDATE cost_records SET amount_microusd = 0 WHERE job_id = '{job}'"),
    ("ended with its attempts", "second", "UPDATE attempts SET outcome = NULL WHERE id = '{second}'"),
    ("charged what was reserved", "job", "UPDATE budget_holds SET amount_microusd = -1 WHERE job_id = '{job}'"),
    ("within the budget", "team", "UPDATE budget_holds SET amount_microusd = 9999 WHERE job_id = '{open}'"),
    ("within the budget", "team", "lower the budget behind the audit trail's back"),
    ("storage once a day", "storage", "UPDATE cost_records SET dedupe_key = NULL WHERE {record}"),
    ("storage once a day", "storage", {"day": "2999-01-01"}),
    ("storage at its price", "storage", {"bytes": 1}),
    ("storage as stored", "storage", {"bytes": GIB - 1}),
    ("storage as stored", "storage", {"bytes": GIB + 1000}),
    ("storage every day", "team", "DELETE FROM cost_records WHERE id = '{storage}'"),
    ("alerted once a month", "alert", "UPDATE notifications SET dedupe_key = 'another' WHERE id = '{alert}'"),
]


async def damage(session: Any, how: str | dict[str, Any], ids: dict[str, str], victim: str) -> None:
    if isinstance(how, dict):
        record = await session.get_one(CostRecord, ids[victim])
        record.details = {**record.details, **how}
        await session.flush()
    elif how == "INSERT a version":
        job = await session.get_one(TrainingJob, ids["job"])
        prices = {"cpu": job.price_microusd_per_hour}
        session.add(
            PriceVersion(
                id="other",
                number=2,
                effective_from=now(),
                gpu_microusd_per_hour=prices,
                storage_microusd_per_gib_month=0,
            )
        )
        await session.flush()
        job.price_version_id = "other"
        await session.flush()
    elif how.startswith("lower"):
        await session.execute(text("DELETE FROM audit_events"))
        (await session.get_one(Team, ids["team"])).monthly_budget_microusd = 1_000
        await session.flush()
    else:
        places = {"record": f"id = '{ids[victim]}'", "usage": f"attempt_id = '{ids['second']}'"}
        await session.execute(text(how.format(LONG_AGO, **ids, **places).replace(":00:", r"\:00\:")))


async def test_each_broken_invariant_is_named(database: Database) -> None:
    ids = await fill(database)
    assert await violations(database) == []
    for rule, victim, how in DAMAGES:
        async with database.read() as session:
            await damage(session, how, ids, victim)
            session.expire_all()
            found = {(violation.rule, violation.object_id) for violation in await verify(session)}
            assert (rule, ids[victim]) in found, (rule, victim, how, found)


async def test_a_paid_job_that_is_made_out_to_be_the_platforms_is_found_out(database: Database) -> None:
    """Usage, records and costs agree with each other, and still it is not true."""
    ids = await running(database)
    await report(database, ids, {"0": {"loading": 2_000, "training": 60_000}})
    await settle(database, ids, Outcome.COMPLETED)
    await finish_job(database, ids[0], Status.COMPLETED)
    assert await violations(database) == []
    async with database.write() as session:
        await session.execute(text("UPDATE attempt_usage SET absorbed_ms = gpu_ms"))
        await session.execute(text("UPDATE training_jobs SET final_cost_microusd = 0, current_cost_microusd = 0"))
        record = (await session.scalars(select(CostRecord))).one()
        record.details, record.amount_microusd = {**record.details, "kind": "absorbed"}, 0
    found = {violation.rule for violation in await violations(database)}
    assert found == {"only what was lost is absorbed", "told as posted"}


async def test_a_budget_that_is_lowered_below_what_is_held_is_no_violation(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session)
    ids = await running(database, team=team, held_microusd=5_000)
    async with database.write() as session:
        await budget.change(session, team.id, 6_000)
    await report(database, ids, {"0": {"training": 20_000}})
    async with database.write() as session:
        await budget.change(session, team.id, 100)
    await report(database, ids, {"0": {"training": 50_000}})
    assert await violations(database) == []
    await report(database, ids, {"0": {"training": 79_999}})
    assert await violations(database) == []
    await report(database, ids, {"0": {"training": 90_000}})
    assert await violations(database) == []  # accepted without a limit: nobody reserved what it was granted
    async with database.write() as session:
        job = await session.get_one(TrainingJob, ids[0])
        job.created_at = now()
    (violation,) = await violations(database)
    assert (violation.rule, violation.object_id) == ("charged what was reserved", ids[0])


async def test_an_overrun_that_a_later_month_reverses_was_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = now()
    monkeypatch.setattr(base, "clock", lambda: today - timedelta(days=40))
    async with database.write() as session:
        team = await make_team(session, budget_microusd=1_000)
    ids = await running(database, team=team, held_microusd=1_000)
    await checkpoint(database, ids, 5, {"0": {"training": 5_000}})
    await checkpoint(database, ids, 9, {"0": {"training": 20_000}})
    await report(database, ids, {"0": {"training": 20_000}})
    await settle(database, ids, Outcome.STOPPED, stop_reason=StopReason.BUDGET, held_ms=20_000)
    await finish_job(database, ids[0])
    assert await violations(database) == []
    monkeypatch.setattr(base, "clock", lambda: today)
    retry = await running(database, team=team, retry_of=ids[0], held_microusd=1_000)
    assert await tear(database, ids[0], None, retry[1])
    assert [amount for _, _, amount in await records(database, ids[0])] == [2_000, -2_000, 0]
    assert await violations(database) == []


async def test_ten_thousand_jobs_take_a_query_a_table(database: Database) -> None:
    """As many statements for many jobs as for one."""
    counts = []
    for jobs in (1, 20):
        async with database.write() as session:
            for _ in range(jobs):
                await make_running_job(session)
        statements = 0

        def count(*_: Any) -> None:
            nonlocal statements
            statements += 1

        event.listen(database.engine.sync_engine, "before_cursor_execute", count)
        await violations(database)
        event.remove(database.engine.sync_engine, "before_cursor_execute", count)
        counts.append(statements)
    assert counts[0] == counts[1] <= 15
