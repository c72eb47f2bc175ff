"""The ledger's invariants, checked from the rows alone; ``python -m scheduler.verify`` does it for an installation."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from scheduler.verify.absorbed import absorbed_as_lost, recovery_absorbed
from scheduler.verify.books import Books
from scheduler.verify.rules import (
    TOLERANCE_MS,
    Rule,
    Violation,
    alerted_once,
    append_only,
    books_closed,
    held_as_used,
    known_objects,
    posted_as_used,
    price_pinned,
    rounded_once,
    signs,
    told_as_posted,
    within_the_budget,
    within_the_hold,
)
from scheduler.verify.storage import storage_every_day, storage_once_a_day

__all__ = ["RULES", "TOLERANCE_MS", "Books", "Violation", "verify"]

RULES: tuple[Rule, ...] = (
    price_pinned,
    known_objects,
    append_only,
    signs,
    rounded_once,
    posted_as_used,
    held_as_used,
    absorbed_as_lost,
    recovery_absorbed,
    books_closed,
    told_as_posted,
    within_the_hold,
    within_the_budget,
    storage_once_a_day,
    storage_every_day,
    alerted_once,
)


async def verify(session: AsyncSession) -> list[Violation]:
    """Every violation of what architecture says of money; none in a ledger that balances.

    The session's transaction should see one state of the database (see ``scheduler.verify.__main__``).
    """
    return judge(await Books.read(session))


def judge(books: Books) -> list[Violation]:
    return [violation for rule in RULES for violation in rule(books)]
