"""Budgets, prices, the ledger."""

from __future__ import annotations

from benchmarks.mutations.mutation import Mutation

LIFECYCLE = "tests/unit/scheduler/test_lifecycle.py::"
COLLECT = "tests/unit/scheduler/test_collect.py::"
LEDGER = "tests/unit/scheduler/test_ledger.py::"
ACCRUAL = "tests/unit/scheduler/test_accrual.py::"
GOING_ON = "tests/integration/scheduler/test_going_on.py::"
TORN = "tests/integration/scheduler/test_torn.py::"
JOBS = "tests/integration/api/test_jobs.py::"
COSTS = "tests/integration/api/test_models_and_costs.py::"
ENDINGS = "tests/contract/test_endings.py::"

MONEY = (
    Mutation(
        "hold release",
        "an ended job keeps its hold",
        "control_plane/services/lifecycle.py",
        "    await budget.close_hold(session, job_id)\n",
        "",
        (LIFECYCLE + "test_the_end_of_a_job_tells_closes_and_sums[sqlite]",),
    ),
    Mutation(
        "hold closed once",
        "a hold is closed again",
        "control_plane/services/budget.py",
        ".where(BudgetHold.job_id == job_id, BudgetHold.state == HoldState.OPEN)\n",
        ".where(BudgetHold.job_id == job_id)\n",
        (COSTS + "test_holds_reserve_what_is_not_charged_yet_and_close_once[sqlite]",),
    ),
    Mutation(
        "budget at acceptance",
        "a job is accepted that the budget cannot pay",
        "control_plane/services/budget.py",
        "    if free is not None and amount_microusd > free:\n",
        "    if free is not None and free < 0:\n",
        (JOBS + "test_no_number_of_submissions_at_once_passes_the_budget[sqlite]",),
    ),
    Mutation(
        "team lock",
        "submissions at once each see the budget free",
        "control_plane/services/budget.py",
        "select(Team).where(Team.id == team_id).with_for_update(key_share=True)",
        "select(Team).where(Team.id == team_id)",
        (JOBS + "test_no_number_of_submissions_at_once_passes_the_budget[postgresql]",),
    ),
    Mutation(
        "pinned price",
        "a job is charged at another price than its version's",
        "control_plane/services/jobs.py",
        "        price_microusd_per_hour=ready.price.gpu_microusd_per_hour[ready.gpu.id],\n",
        "        price_microusd_per_hour=ready.gpu.microusd_per_hour,\n",
        (JOBS + "test_a_new_price_is_for_new_jobs",),
    ),
    Mutation(
        "usage only rises",
        "a late report lowers the count",
        "scheduler/ledger.py",
        "            row.gpu_ms = max(row.gpu_ms, gpu_ms)\n",
        "            row.gpu_ms = gpu_ms\n",
        (COLLECT + "test_lower_usage_takes_nothing_back[sqlite]",),
    ),
    Mutation(
        "rounding once",
        "each posting is rounded by itself",
        "scheduler/ledger.py",
        "    amount = charge(posted.gpu_ms + difference, job.price_microusd_per_hour) - posted.amount_microusd\n",
        "    amount = charge(difference, job.price_microusd_per_hour)\n",
        (LEDGER + "test_rounding_never_accumulates[sqlite]",),
    ),
    Mutation(
        "reversal",
        "what a fault lost stays billed",
        "scheduler/ledger.py",
        "    if outcome is Outcome.FAULT or stop_reason is StopReason.PREEMPT:\n",
        "    if stop_reason is StopReason.PREEMPT:\n",
        (LEDGER + "test_a_fault_reverses_what_was_charged_past_the_last_checkpoint[sqlite]",),
    ),
    Mutation(
        "absorbed tail",
        "time between the last report and the end is nobody's",
        "scheduler/ledger.py",
        "    _absorb_tails(session, attempt, rows, times)\n",
        "",
        (LEDGER + "test_a_fault_reverses_what_was_charged_past_the_last_checkpoint[sqlite]",),
    ),
    Mutation(
        "absorbed loading",
        "loading again after a fault is billed",
        "scheduler/ledger.py",
        '            if attempt.recovery and kind == "loading":\n',
        '            if attempt.recovery and kind == "":\n',
        (LEDGER + "test_loading_after_a_fault_is_absorbed[sqlite]",),
    ),
    Mutation(
        "absorbed torn checkpoint",
        "work that a torn checkpoint lost is billed twice",
        "scheduler/project.py",
        "            await ledger.absorb_past(self._session, job, used if used and used.job_id == job_id else None)\n",
        "            assert job\n",
        (TORN + "test_work_that_a_torn_checkpoint_lost_is_billed_once[sqlite]",),
    ),
    Mutation(
        "allowance",
        "an attempt may use more than its job's hold pays",
        "scheduler/ledger.py",
        "    return max(0, min(used + ahead_ms, limit - elsewhere + unbilled))\n",
        "    return used + ahead_ms\n",
        (LEDGER + "test_the_allowance_grows_with_use_and_stops_at_the_hold[sqlite]",),
    ),
    Mutation(
        "allowance in the supervisor",
        "an attempt goes on past its allowance",
        "scheduler/cluster/supervisor.py",
        "        if self._beyond_allowance_ms() >= 0:\n",
        "        if self._beyond_allowance_ms() >= 20_000:\n",
        (ENDINGS + "test_without_a_further_allowance_it_stops_by_itself[ray]",),
    ),
    Mutation(
        "force at the ceiling",
        "a child that is deaf spends beyond the ceiling",
        "scheduler/cluster/supervisor.py",
        "        if over_ms >= self._spec.overrun_ms:\n",
        "        if over_ms >= self._spec.overrun_ms * 1000:\n",
        (ENDINGS + "test_who_does_not_stop_at_the_allowance_is_ended_by_force[ray]",),
    ),
    Mutation(
        "budget resume guard",
        "a user's pause ends by itself",
        "control_plane/services/paused.py",
        "job.paused_by is not StopReason.BUDGET or not await secure",
        "not await secure",
        (GOING_ON + "test_a_user_who_pauses_it_in_the_meantime_is_heeded[sqlite]",),
    ),
    Mutation(
        "storage once a day",
        "a day's storage is charged again",
        "scheduler/accrual.py",
        '    return f"storage:{team_id}:{day}"\n',
        '    return f"storage:{team_id}:" + __import__("uuid").uuid4().hex\n',
        (ACCRUAL + "test_schedulers_at_once_charge_a_day_once[sqlite]",),
    ),
)
