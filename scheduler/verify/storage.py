"""The rules of storage, which is charged by the day."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta

from control_plane.money import storage_charge
from control_plane.tables.money import CostType
from scheduler.verify.books import Books, Record, Stored, Version
from scheduler.verify.rules import Violation

DAY = timedelta(days=1)
CATCH_UP = timedelta(days=31)
"""Days that were missed for longer are given up."""
DOUBT = timedelta(days=1)
"""Whether something was there within this time of its coming or going, no two machines' clocks need agree."""


def storage_once_a_day(books: Books) -> Iterator[Violation]:
    """One record a team and finished UTC day, at the price of the version that it names."""
    versions = {version.number: version for version in books.versions.values()}
    for record in _records(books):
        day = _day(record)
        if record.dedupe_key != _key(record.team_id, day) or record.billing_period.date() <= day:
            message = f"{record.dedupe_key} for {day}, recorded at {record.recorded_at}"
            yield Violation("storage once a day", record.id, message)
        version = versions.get(int(record.details.get("priceVersion", 0)))
        owed = _price(_bytes(record), version, day)
        if version is None or record.amount_microusd != owed:
            message = f"{record.amount_microusd} micro-USD for what costs {owed}"
            yield Violation("storage at its price", record.id, message)


def storage_every_day(books: Books) -> Iterator[Violation]:
    """Each team's days before the newest that was charged at all are charged, for what was stored on them."""
    charged = {record.dedupe_key: record for record in _records(books)}
    for day in _charged_days(books):
        version = _version_of(books, day)
        for team_id, stored in books.stored.items():
            least = sum(entry.size for entry in stored if _was_there(entry, day, DOUBT))
            most = sum(entry.size for entry in stored if _was_there(entry, day, -DAY - DOUBT))
            record = charged.get(_key(team_id, day))
            if record is not None and not least <= _bytes(record) <= most:
                message = f"{_bytes(record)} bytes, {least} to {most} were stored"
                yield Violation("storage as stored", record.id, message)
            elif record is None and _price(least, version, day):
                yield Violation("storage every day", team_id, f"no record of {day}, when {least} bytes were stored")


def _records(books: Books) -> list[Record]:
    return [record for record in books.records if record.cost_type is CostType.STORAGE]


def _charged_days(books: Books) -> list[date]:
    """Days are charged in their order: when one was, those before it had been, unless they were given up."""
    over = [record for record in _records(books) if _day(record) < record.recorded_at.date()]
    newest = max(over, key=lambda record: (_day(record), record.recorded_at), default=None)
    if newest is None:
        return []
    first = newest.recorded_at.date() - CATCH_UP
    return [first + n * DAY for n in range((_day(newest) - first).days)]


def _version_of(books: Books, day: date) -> Version | None:
    """The one in force when the day began; on the first day of all, the first."""
    versions = sorted(books.versions.values(), key=lambda version: (version.effective_from, version.number))
    begun = [version for version in versions if version.effective_from <= _midnight(day)]
    return begun[-1] if begun else next((v for v in versions if v.effective_from < _midnight(day + DAY)), None)


def _was_there(stored: Stored, day: date, margin: timedelta) -> bool:
    """All day, and so long before and after it; with a negative margin so much less of it."""
    begin, end = _midnight(day) - margin, _midnight(day + DAY) + margin
    return stored.since <= begin and (stored.until is None or stored.until >= end)


def _price(size: int, version: Version | None, day: date) -> int:
    return storage_charge(size, version.storage_microusd_per_gib_month, day) if version else 0


def _day(record: Record) -> date:
    return date.fromisoformat(str(record.details.get("day", "9999-12-31")))


def _bytes(record: Record) -> int:
    return int(record.details.get("bytes", 0))


def _key(team_id: str, day: date) -> str:
    return f"storage:{team_id}:{day}"


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
