"""The rules of absorbed time: the platform bears what it lost, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from control_plane.states import Outcome, StopReason, recovery_after
from scheduler.verify.books import Books, Execution, Saved, Usage
from scheduler.verify.rules import Violation

Stamp = dict[str, dict[str, int]]
"""rank → kind → GPU-milliseconds at a checkpoint."""
NOTHING: Stamp = {}
TAIL = "tail"


def absorbed_as_lost(books: Books) -> Iterator[Violation]:
    """Of each kind of time exactly that is absorbed which a fault or a preemption lost (past the last checkpoint), a
    recovery spent on loading, nobody reported (the tail), or, at most, which checkpoints held that were torn."""
    torn = _torn(books)
    for attempt in books.attempts.values():
        stamp = _last_stamp(books, attempt) if _lost_work(attempt) else None
        for row in books.usage.get(attempt.id, []):
            all_of_it = row.kind == TAIL or (row.kind == "loading" and attempt.recovery)
            least = row.gpu_ms if all_of_it else _beyond(row, stamp)
            most = max([least, *(_beyond(row, earlier) for earlier in torn[attempt.id])])
            what = f"rank {row.rank} {row.kind}: {row.absorbed_ms} of {row.gpu_ms} ms absorbed"
            if row.absorbed_ms < least:
                yield Violation("what was lost is absorbed", attempt.id, f"{what}, {least} ms were lost")
            if row.absorbed_ms > most:
                yield Violation("only what was lost is absorbed", attempt.id, f"{what}, at most {most} ms were lost")


def recovery_absorbed(books: Books) -> Iterator[Violation]:
    """An attempt that follows one which the platform ended, also in the job that its own retries, loads at the
    platform's expense; no other does."""
    by_place = {(attempt.work_id, attempt.number): attempt for attempt in books.attempts.values()}
    for attempt in books.attempts.values():
        previous = by_place.get((attempt.work_id, attempt.number - 1))
        job = books.jobs.get(attempt.work_id)
        retried = books.jobs.get(job.retry_of or "") if job and attempt.number == 1 else None
        if retried is not None:
            previous = by_place.get((retried.id, retried.attempt))
        due = previous is not None and _recovery_after(previous)
        if attempt.recovery != due:
            came_after = f"{previous.outcome} {previous.exit_reason}" if previous else "nothing"
            message = f"recovery {attempt.recovery} after {came_after}"
            yield Violation("reloading after a fault is absorbed", attempt.id, message)


def _recovery_after(previous: Execution) -> bool:
    started = previous.cluster_id is not None
    return recovery_after(previous.outcome, previous.exit_reason, started=started, recovery=previous.recovery)


def _lost_work(attempt: Execution) -> bool:
    stopped = attempt.outcome is Outcome.STOPPED
    return attempt.outcome is Outcome.FAULT or (stopped and attempt.exit_reason == StopReason.PREEMPT)


def _last_stamp(books: Books, attempt: Execution) -> Stamp:
    saved = max(books.checkpoints.get(attempt.id, []), key=lambda saved: saved.step, default=None)
    return saved.usage if saved else NOTHING


def _beyond(row: Usage, stamp: Stamp | None) -> int:
    """Milliseconds that came after the stamp; None: nothing did."""
    return 0 if stamp is None else max(0, row.gpu_ms - stamp.get(str(row.rank), {}).get(row.kind, 0))


def _torn(books: Books) -> dict[str, list[Stamp]]:
    """By attempt the stamps to which it may have been taken back: a later attempt, of its job or of one that retries
    it, went on from there although newer checkpoints, since deleted, had been stored."""
    saved = {point.id: point for points in books.checkpoints.values() for point in points}
    by_job: dict[str, list[Saved]] = defaultdict(list)
    for point in saved.values():
        by_job[point.job_id].append(point)
    attempts: dict[str, list[Execution]] = defaultdict(list)
    for attempt in books.attempts.values():
        attempts[attempt.work_id].append(attempt)
    found: dict[str, list[Stamp]] = defaultdict(list)
    for late in books.attempts.values():
        for job_id in _line(books, late.work_id) if late.started_at else ():
            used = saved.get(late.resumed_from or "")
            used = used if used and used.job_id == job_id else None
            if any(point.deleted_at and _is_newer(point, used) for point in by_job[job_id]):
                first = books.attempts[used.attempt_id].number if used else 0
                for early in attempts[job_id]:
                    if early.number >= first and (job_id != late.work_id or early.number < late.number):
                        found[early.id].append(used.usage if used and used.attempt_id == early.id else NOTHING)
            if used:
                break
    return found


def _line(books: Books, job_id: str) -> Iterator[str]:
    """The job and those that it retries, the nearest first."""
    job = books.jobs.get(job_id)
    while job is not None:
        yield job.id
        job = books.jobs.get(job.retry_of or "")


def _is_newer(point: Saved, used: Saved | None) -> bool:
    return used is None or (point.step, point.created_at) > (used.step, used.created_at)
