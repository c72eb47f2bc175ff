"""A cancelled session gives back what it had locked, at once."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from contextlib import suppress

from sqlalchemy import text

from control_plane.db import Database


async def test_a_cancelled_transaction_keeps_no_lock(database: Database) -> None:
    """Also while its statement is half read, and something still refers to it (as a traceback does)."""
    async with database.write() as session:
        await session.execute(text("CREATE TABLE numbers (n INTEGER)"))
        for n in range(200):
            await session.execute(text("INSERT INTO numbers VALUES (:n)"), {"n": n})
    chance = random.Random(7)
    cancelled = []

    async def read_and_write() -> None:
        async with database.write() as session:
            while True:
                await session.execute(text("SELECT n FROM numbers"))
                await session.execute(text("UPDATE numbers SET n = n WHERE n = 1"))

    gc.disable()
    try:
        for _ in range(40):
            task = asyncio.create_task(read_and_write())
            await asyncio.sleep(chance.random() * 0.02)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            cancelled.append(task)
            started = time.monotonic()
            async with database.write() as session:
                await session.execute(text("UPDATE numbers SET n = n WHERE n = 2"))
            assert time.monotonic() - started < 5
    finally:
        gc.enable()
