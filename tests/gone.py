"""A cluster where nothing runs any more."""

from __future__ import annotations

from typing import Any

from scheduler.executor import RankTimes


class GoneExecutor:
    """``held``: what it has recorded of every attempt's ranks."""

    def __init__(self, *held: RankTimes) -> None:
        self.held = list(held)

    async def times(self, _name: str) -> list[RankTimes]:
        return list(self.held)

    async def release(self, _name: str, **_fence: Any) -> None: ...
