"""The state machine, pure: statuses, legal transitions, stop reasons and what each leads to.

One machine serves every kind of work (training jobs, verdicts, later exports).
"""

from __future__ import annotations

from enum import StrEnum


class WorkKind(StrEnum):
    JOB = "JOB"
    VERDICT = "VERDICT"


class Status(StrEnum):
    QUEUED = "QUEUED"
    INITIALIZING = "INITIALIZING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Stage(StrEnum):
    QUEUED = "QUEUED"
    INITIALIZING = "INITIALIZING"
    TRAINING = "TRAINING"
    VALIDATING = "VALIDATING"
    SAVING = "SAVING"
    COMPLETED = "COMPLETED"


class StopReason(StrEnum):
    CANCEL = "CANCEL"
    PAUSE = "PAUSE"
    BUDGET = "BUDGET"
    PREEMPT = "PREEMPT"


class Outcome(StrEnum):
    """How an attempt ended. FAULT is the platform's doing and is retried; FAILED is final."""

    COMPLETED = "COMPLETED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    FAULT = "FAULT"


S = Status
LEGAL: dict[Status, frozenset[Status]] = {
    S.QUEUED: frozenset({S.INITIALIZING, S.PAUSED, S.FAILED, S.CANCELLED}),
    S.INITIALIZING: frozenset({S.RUNNING, S.QUEUED, S.PAUSED, S.FAILED, S.CANCELLED, S.COMPLETED}),
    S.RUNNING: frozenset({S.QUEUED, S.PAUSED, S.COMPLETED, S.FAILED, S.CANCELLED}),
    S.PAUSED: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.COMPLETED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}
TERMINAL = frozenset(s for s, following in LEGAL.items() if not following)
ACTIVE = frozenset({S.INITIALIZING, S.RUNNING})
"""An attempt exists and may hold GPUs; only the scheduler moves these."""
UNFINISHED = frozenset(S) - TERMINAL

AFTER_STOP: dict[StopReason, Status] = {
    StopReason.CANCEL: S.CANCELLED,
    StopReason.PAUSE: S.PAUSED,
    StopReason.BUDGET: S.PAUSED,
    StopReason.PREEMPT: S.QUEUED,
}
MAX_FAULT_RETRIES = 3
"""In a row. A fault after a new checkpoint begins a new row: a run of days may meet many and still get on, but one that
gets no further has a cause that another try does not remove."""
RETRY_PAUSES_S = (2.0, 10.0, 60.0)


LAPSED = "ALLOWANCE_LAPSED"
"""Exit reason of an attempt that stopped at its allowance although the budget pays for more: mostly nobody was there
to grant it."""


def may(source: Status, target: Status) -> bool:
    return target in LEGAL[source]


def sources(target: Status) -> frozenset[Status]:
    """The statuses from which ``target`` may be entered."""
    return frozenset(s for s, following in LEGAL.items() if target in following)


def after_attempt(outcome: Outcome, stop_reason: StopReason | None, faults: int) -> Status:
    """Where the work goes when its attempt has ended. ``faults``: the platform's in a row, this one included."""
    match outcome:
        case Outcome.COMPLETED:
            return S.COMPLETED
        case Outcome.FAILED:
            return S.FAILED
        case Outcome.STOPPED:
            return AFTER_STOP[stop_reason] if stop_reason else S.QUEUED
        case Outcome.FAULT:
            if stop_reason in (StopReason.CANCEL, StopReason.PAUSE):
                return AFTER_STOP[stop_reason]
            if faults > MAX_FAULT_RETRIES:
                return S.FAILED
            return AFTER_STOP[stop_reason] if stop_reason else S.QUEUED


def recovery_after(outcome: Outcome | None, exit_reason: str | None, *, started: bool, recovery: bool) -> bool:
    """Whether the attempt after this one loads at the platform's expense: the platform ended this one, or it should
    have loaded at its expense (``recovery``), but was never started."""
    if outcome is Outcome.FAULT or exit_reason in (StopReason.PREEMPT, LAPSED):
        return True
    return recovery and outcome is Outcome.STOPPED and not started
