"""The state machine, every pair of it."""

from __future__ import annotations

from itertools import product

import pytest

from control_plane.states import (
    ACTIVE,
    LEGAL,
    MAX_FAULT_RETRIES,
    TERMINAL,
    Outcome,
    Status,
    StopReason,
    after_attempt,
    may,
    sources,
)

TABLE = """
QUEUED       -> INITIALIZING PAUSED FAILED CANCELLED
INITIALIZING -> RUNNING QUEUED PAUSED COMPLETED FAILED CANCELLED
RUNNING      -> QUEUED PAUSED COMPLETED FAILED CANCELLED
PAUSED       -> QUEUED FAILED CANCELLED
COMPLETED    ->
FAILED       ->
CANCELLED    ->
"""
EXPECTED = {
    (Status(source.strip()), Status(target))
    for source, _, targets in (line.partition("->") for line in TABLE.strip().splitlines())
    for target in targets.split()
}


@pytest.mark.parametrize(("source", "target"), list(product(Status, Status)))
def test_every_pair_is_legal_or_not_as_the_table_says(source: Status, target: Status) -> None:
    assert may(source, target) is ((source, target) in EXPECTED)
    assert (source in sources(target)) is may(source, target)


def test_terminal_states_have_no_way_out() -> None:
    assert {Status.COMPLETED, Status.FAILED, Status.CANCELLED} == TERMINAL
    assert all(not LEGAL[status] for status in TERMINAL)


@pytest.mark.parametrize(
    ("outcome", "reason", "faults", "status"),
    [
        (Outcome.COMPLETED, StopReason.CANCEL, 0, Status.COMPLETED),
        (Outcome.FAILED, StopReason.PAUSE, 0, Status.FAILED),
        (Outcome.STOPPED, StopReason.CANCEL, 0, Status.CANCELLED),
        (Outcome.STOPPED, StopReason.PAUSE, 0, Status.PAUSED),
        (Outcome.STOPPED, StopReason.BUDGET, 0, Status.PAUSED),
        (Outcome.STOPPED, StopReason.PREEMPT, 0, Status.QUEUED),
        (Outcome.STOPPED, None, 0, Status.QUEUED),
        (Outcome.FAULT, None, MAX_FAULT_RETRIES, Status.QUEUED),
        (Outcome.FAULT, None, MAX_FAULT_RETRIES + 1, Status.FAILED),
        (Outcome.FAULT, StopReason.CANCEL, MAX_FAULT_RETRIES + 1, Status.CANCELLED),
        (Outcome.FAULT, StopReason.PAUSE, 1, Status.PAUSED),
        (Outcome.FAULT, StopReason.PREEMPT, 1, Status.QUEUED),
        (Outcome.FAULT, StopReason.BUDGET, MAX_FAULT_RETRIES, Status.PAUSED),
        (Outcome.FAULT, StopReason.BUDGET, MAX_FAULT_RETRIES + 1, Status.FAILED),
    ],
)
def test_where_an_ended_attempt_leads(outcome: Outcome, reason: StopReason | None, faults: int, status: Status) -> None:
    assert after_attempt(outcome, reason, faults) is status


@pytest.mark.parametrize(("outcome", "reason", "faults"), list(product(Outcome, [None, *StopReason], range(6))))
def test_an_ended_attempt_always_leads_somewhere_legal(
    outcome: Outcome, reason: StopReason | None, faults: int
) -> None:
    target = after_attempt(outcome, reason, faults)
    assert all(may(source, target) for source in ACTIVE)
