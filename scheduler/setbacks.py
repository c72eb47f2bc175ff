"""Work that could not be dispatched for a reason of its own: it stands aside, each time for longer, so that it does not
take the same place again from those behind it."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple


class _Setback(NamedTuple):
    reason: str
    until: float
    """By the monotonic clock."""
    pause_s: float


class Setbacks:
    """Of one scheduler process, by work id; a cache that may be lost."""

    def __init__(self) -> None:
        self._known: dict[str, _Setback] = {}

    def note(self, work_id: str, reason: str, *, first_s: float, longest_s: float) -> None:
        """It failed: aside for ``first_s``, and twice as long as the last time after that, up to ``longest_s``."""
        last = self._known.get(work_id)
        pause_s = min(2 * last.pause_s if last else first_s, longest_s)
        self._known[work_id] = _Setback(reason, time.monotonic() + pause_s, pause_s)

    def current(self, waiting: Collection[str]) -> dict[str, str]:
        """Why work stands aside now, by id. What is not among ``waiting`` any more is forgotten."""
        self._known = {work_id: self._known[work_id] for work_id in self._known.keys() & set(waiting)}
        return {work_id: known.reason for work_id, known in self._known.items() if time.monotonic() < known.until}
