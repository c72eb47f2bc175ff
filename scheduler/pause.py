"""Sleeping in loops that must end when they are cancelled."""

from __future__ import annotations

import asyncio


async def pause(seconds: float) -> None:
    """Sleep. A cancellation that something swallowed since (as ``asyncio.wait_for`` may before Python 3.12, when its
    answer comes at the same moment) takes effect here."""
    await asyncio.sleep(seconds)
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
