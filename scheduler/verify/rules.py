"""The rules of records, holds and budgets, pure: each names what it finds wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from control_plane.money import charge, usd
from control_plane.states import TERMINAL, Outcome
from control_plane.tables.money import CostType, HoldState
from control_plane.tables.notices import NotificationType
from scheduler.verify.books import Books, Execution, Job

TOLERANCE_MS = 250
"""By which reported and held time of one rank may differ."""
UNPOSTED_MS = 10_000
"""Billed time that may stand unposted while an attempt runs."""
OVERRUN_MS = 30_000
"""GPU time by which a job may pass what is reserved for it before it has stopped."""
WRITE = timedelta(minutes=1)
"""A row may take so long to be written; one that is changed later is not append-only."""


class Violation(NamedTuple):
    rule: str
    object_id: str
    """Of the job, attempt, team, record or notification."""
    message: str


Rule = Callable[[Books], Iterator[Violation]]


def price_pinned(books: Books) -> Iterator[Violation]:
    """A job keeps the price of its version, and each of its records names that version."""
    for job in books.jobs.values():
        version = books.versions.get(job.price_version_id)
        price = version.gpu_microusd_per_hour.get(job.gpu_type) if version else None
        if price != job.price_microusd_per_hour:
            message = f"{job.price_microusd_per_hour} micro-USD an hour, its version says {price}"
            yield Violation("price pinned at acceptance", job.id, message)
        for record in books.compute.get(job.id, ()):
            if version is None or record.details.get("priceVersion") != version.number:
                named, pinned = record.details.get("priceVersion"), version and version.number
                message = f"record {record.id} names price version {named}, the job's is {pinned}"
                yield Violation("price version in every record", job.id, message)


def known_objects(books: Books) -> Iterator[Violation]:
    """No record is about something unknown, or about another's."""
    for record in books.records:
        job = books.jobs.get(record.job_id or "")
        attempt = books.attempts.get(record.attempt_id or "")
        wrong = None
        if record.team_id not in books.teams:
            wrong = f"unknown team {record.team_id}"
        elif record.cost_type is CostType.COMPUTE and job is None:
            wrong = f"unknown job {record.job_id}"
        elif record.cost_type is CostType.COMPUTE and (attempt is None or attempt.work_id != record.job_id):
            wrong = f"attempt {record.attempt_id} is not one of job {record.job_id}"
        elif job is not None and job.team_id != record.team_id:
            wrong = f"team {record.team_id}, but its job belongs to {job.team_id}"
        if wrong:
            yield Violation("record of a known job and attempt", record.id, wrong)


def append_only(books: Books) -> Iterator[Violation]:
    """Records stand as they were written, in the day in which they were."""
    for record in books.records:
        at = record.recorded_at
        if abs(record.updated_at - at) > WRITE:
            yield Violation("append-only", record.id, f"recorded at {at}, changed at {record.updated_at}")
        if record.billing_period != at.replace(hour=0, minute=0, second=0, microsecond=0):
            yield Violation("append-only", record.id, f"recorded at {at}, in the day {record.billing_period:%Y-%m-%d}")


def signs(books: Books) -> Iterator[Violation]:
    """Charges add, reversals take back, what is absorbed costs nothing; nothing is taken back that was not charged."""
    for records in books.compute.values():
        charged: dict[str | None, int] = defaultdict(int)
        for record in records:
            ms, amount = record.gpu_ms, record.amount_microusd
            sound = {"charge": ms > 0 <= amount, "reversal": ms < 0 >= amount, "absorbed": ms > 0 == amount}
            if not sound.get(record.kind):
                yield Violation("kinds of records", record.id, f"{record.kind} of {ms} ms and {amount} micro-USD")
            if record.kind != "absorbed":
                charged[record.attempt_id] += ms
            if charged[record.attempt_id] < 0:
                message = f"{charged[record.attempt_id]} ms after record {record.id}"
                yield Violation("reversed only what was charged", str(record.attempt_id), message)


def rounded_once(books: Books) -> Iterator[Violation]:
    """After every posting a job has been charged the price of its posted time, rounded half-even once."""
    for job in books.jobs.values():
        gpu_ms = amount = 0
        for record in books.compute.get(job.id, ()):
            gpu_ms += record.gpu_ms if record.kind != "absorbed" else 0
            amount += record.amount_microusd
            owed = charge(gpu_ms, job.price_microusd_per_hour)
            if amount != owed:
                message = f"{amount} micro-USD posted up to record {record.id}, {gpu_ms} ms cost {owed}"
                yield Violation("rounded once", job.id, message)
                break


def posted_as_used(books: Books) -> Iterator[Violation]:
    """What an attempt is billed for is posted: all of it once it has ended, else all but the last seconds."""
    posted, absorbed = _posted_by_attempt(books)
    for attempt in books.attempts.values():
        usage = books.usage.get(attempt.id, [])
        billed_ms = sum(row.gpu_ms - row.absorbed_ms for row in usage)
        unposted_ms = billed_ms - posted[attempt.id]
        if not (unposted_ms == 0 if attempt.outcome else 0 <= unposted_ms < UNPOSTED_MS):
            message = f"{posted[attempt.id]} ms posted, {billed_ms} ms to bill"
            yield Violation("posted what was used", attempt.id, message)
        absorbed_ms = sum(row.absorbed_ms for row in usage)
        if attempt.outcome and absorbed[attempt.id] != absorbed_ms:
            yield Violation("absorbed is recorded", attempt.id, f"{absorbed[attempt.id]} of {absorbed_ms} ms")


def _posted_by_attempt(books: Books) -> tuple[dict[str, int], dict[str, int]]:
    """Milliseconds charged less reversed, and absorbed, by attempt."""
    posted: dict[str, int] = defaultdict(int)
    absorbed: dict[str, int] = defaultdict(int)
    for records in books.compute.values():
        for record in records:
            (absorbed if record.kind == "absorbed" else posted)[str(record.attempt_id)] += record.gpu_ms
    return posted, absorbed


def held_as_used(books: Books) -> Iterator[Violation]:
    """Billed and absorbed time make up what the ranks held by Ray's actor table; what is absorbed was used.

    Only of what died with its cluster the table may know nothing.
    """
    for attempt in books.attempts.values():
        usage = books.usage.get(attempt.id, [])
        for row in usage:
            if not 0 <= row.absorbed_ms <= row.gpu_ms:
                message = f"rank {row.rank} {row.kind}: {row.absorbed_ms} of {row.gpu_ms} ms"
                yield Violation("absorbed is part of used", attempt.id, message)
        used_ms = sum(row.gpu_ms for row in usage)
        if attempt.outcome is None:
            continue
        if attempt.held_ms is None:
            if used_ms and attempt.outcome is not Outcome.FAULT:
                yield Violation("held time is known", attempt.id, f"{attempt.outcome} after {used_ms} ms")
        elif abs(used_ms - attempt.held_ms) > TOLERANCE_MS * _ranks(books, attempt):
            yield Violation("billed + absorbed = held", attempt.id, f"{used_ms} of {attempt.held_ms} ms")


def _ranks(books: Books, attempt: Execution) -> int:
    job = books.jobs.get(attempt.work_id)
    return job.gpu_count if job else 1


def books_closed(books: Books) -> Iterator[Violation]:
    """A job's hold is open until its end and then closed; its cost is the sum of its records."""
    for job in books.jobs.values():
        ended = job.status in TERMINAL
        hold = books.holds.get(job.id)
        if hold is None:
            yield Violation("held until the end", job.id, "no hold")
        elif (hold.state is HoldState.CLOSED) != ended or (hold.closed_at is not None) != ended:
            message = f"hold {hold.state}, closed at {hold.closed_at}, job {job.status}"
            yield Violation("held until the end", job.id, message)
        total = books.charged(job.id)
        if job.final_cost_microusd != (total if ended else None):
            message = f"{job.status}, {job.final_cost_microusd}, records say {total}"
            yield Violation("final cost is the sum", job.id, message)
        if job.current_cost_microusd != total:
            yield Violation("current cost is the sum", job.id, f"{job.current_cost_microusd}, records say {total}")
    for attempt in books.attempts.values():
        work = books.jobs.get(attempt.work_id)
        if work is not None and attempt.outcome is None and work.status in TERMINAL:
            yield Violation("ended with its attempts", attempt.id, f"open, but the job is {work.status}")


def told_as_posted(books: Books) -> Iterator[Violation]:
    """The last ``cost`` event of a job's stream says what its records sum up to.

    The stream of a job that has ended is closed: what a job that retries it then finds torn, it tells no more.
    """
    retried = {job.retry_of for job in books.jobs.values()}
    for job in books.jobs.values():
        told = books.told.get(job.id, {}).get("currentCost", usd(0))
        sums = _sums(books, job) if job.status in TERMINAL and job.id in retried else [books.charged(job.id)]
        if told not in map(usd, sums):
            message = f"its stream says {told} USD, its records {usd(books.charged(job.id))}"
            yield Violation("told as posted", job.id, message)


def _sums(books: Books, job: Job) -> list[int]:
    """Of the job's records, and before each of the reversals that come last."""
    sums = [books.charged(job.id)]
    for record in reversed(books.compute.get(job.id, ())):
        if record.kind == "charge":
            break
        sums.append(sums[-1] - record.amount_microusd)
    return sums


def within_the_hold(books: Books) -> Iterator[Violation]:
    """Under a budget no job is charged more than was reserved for it and 30 GPU-seconds.

    Only jobs that were accepted under a budget: one that began without a limit was granted time that nobody reserved.
    """
    for job in books.jobs.values():
        since = _budgeted_since(books, job.team_id)
        overrun = books.overrun(job.id)
        allowed = charge(OVERRUN_MS, job.price_microusd_per_hour)
        if since is not None and job.created_at >= since and overrun > allowed:
            message = f"{usd(books.charged(job.id))} USD charged, {usd(overrun)} more than reserved"
            yield Violation("charged what was reserved", job.id, message)


def _budgeted_since(books: Books, team_id: str) -> datetime | None:
    """Since when the team has had a budget without a break; None: it has none."""
    if books.teams.get(team_id) is None:
        return None
    unlimited = [change.at for change in books.changes.get(team_id, ()) if change.details.get("from") is None]
    return max(unlimited, default=datetime.min.replace(tzinfo=UTC))


def within_the_budget(books: Books) -> Iterator[Violation]:
    """What jobs were charged in a month is at most the budget that was in force at its end, but for the overruns that
    ``within_the_hold`` bounds. So is what is charged and held now.

    A budget that was lowered below what was already posted and held counts as that: it could not take it back. Storage
    is not part of it: no ceiling ends it.
    """
    months: dict[tuple[str, str], int] = defaultdict(int)
    jobs: dict[tuple[str, str], set[str]] = defaultdict(set)
    for job_id, records in books.compute.items():
        for record in records:
            months[record.team_id, record.month] += record.amount_microusd
            jobs[record.team_id, record.month].add(str(job_id))
    this_month = f"{books.at:%Y-%m}"
    for hold in books.holds.values():
        job = books.jobs.get(hold.job_id)
        if job is not None and hold.state is HoldState.OPEN:
            months[job.team_id, this_month] += max(0, hold.amount_microusd - books.charged(job.id))
            jobs[job.team_id, this_month].add(job.id)
    for (team_id, month), total in sorted(months.items()):
        ceiling = _ceiling(books, team_id, month)
        overruns = sum(_overrun_of(books, job_id, month) for job_id in jobs[team_id, month])
        if ceiling is not None and total - overruns > ceiling:
            message = f"{usd(total)} USD in {month}, {usd(overruns)} of it overruns, under a budget of {usd(ceiling)}"
            yield Violation("within the budget", team_id, message)


def _overrun_of(books: Books, job_id: str, month: str) -> int:
    """Micro-dollars of the month that were charged beyond the job's hold; the most that is allowed where a later month
    has touched the hold, and may have paid for what goes on from there."""
    hold = books.holds.get(job_id)
    records = books.compute.get(job_id, ())
    if hold is None or f"{hold.updated_at:%Y-%m}" <= month:
        until_then = sum(record.amount_microusd for record in records if record.month <= month)
        return max(0, until_then - (hold.amount_microusd if hold else 0))
    charged = sum(record.amount_microusd for record in records if record.month == month)
    return max(0, min(charged, charge(OVERRUN_MS, books.jobs[job_id].price_microusd_per_hour)))


def _ceiling(books: Books, team_id: str, month: str) -> int | None:
    """The budget in force at the month's end; None: unlimited, or unknown."""
    changes = books.changes.get(team_id, [])
    before = [change.details for change in changes if f"{change.at:%Y-%m}" <= month]
    if before:
        last = before[-1]
        return None if last.get("to") is None else max(last["to"], last["posted"] + last["held"])
    return changes[0].details.get("from") if changes else books.teams.get(team_id)


def alerted_once(books: Books) -> Iterator[Violation]:
    """An owner hears of a threshold once a month: the unique key says of what, and to whom."""
    for alert in books.alerts:
        months = {f"{alert.created_at - late:%Y-%m}" for late in (timedelta(0), WRITE)}
        threshold = alert.details.get("threshold")
        keys = {
            f"{NotificationType.COST_ALERT}:{alert.team_id}:{month}:{threshold}:{alert.user_id}" for month in months
        }
        if alert.dedupe_key not in keys:
            message = f"{threshold} % of team {alert.team_id} on {alert.created_at:%Y-%m-%d} as {alert.dedupe_key}"
            yield Violation("alerted once a month", alert.id, message)
