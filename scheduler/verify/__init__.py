"""The ledger's invariants, checked from the rows alone; ``python -m scheduler.verify`` does it for an installation."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from scheduler.verify.books import Books
from scheduler.verify.rules import RULES, TOLERANCE_MS, Violation

__all__ = ["RULES", "TOLERANCE_MS", "Books", "Violation", "verify"]


async def verify(session: AsyncSession) -> list[Violation]:
    """Every violation of what architecture says of money; none in a ledger that balances.

    The session's transaction should see one state of the database (see ``scheduler.verify.__main__``).
    """
    return judge(await Books.read(session))


def judge(books: Books) -> list[Violation]:
    return [violation for rule in RULES for violation in rule(books)]
