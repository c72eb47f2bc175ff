"""Numbered events that wait to be acknowledged: bounded in memory, the overflow on disk."""

from __future__ import annotations

import logging
import time
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from scheduler.executor import UpEvent

log = logging.getLogger(__name__)
MEMORY_EVENTS = 2_000
SPILL_BYTES = 64 * 1024 * 1024
"""Beyond this, and while the disk takes nothing, events that only describe are given up (before they get a number, so
that there is no gap)."""
EXPENDABLE = frozenset({"metrics", "log", "progress", "phase", "sample"})


class EventLog:
    """Gives numbers 1, 2, 3 …; ``after`` reads on from a cursor, ``acknowledge`` forgets up to one.

    The newest events are in memory; older ones that nobody has acknowledged lie in ``spill``, one JSON line each.
    """

    def __init__(self, spill: Path, *, memory_events: int = MEMORY_EVENTS, spill_bytes: int = SPILL_BYTES) -> None:
        self._spill = spill
        self._memory_events = memory_events
        self._spill_bytes = spill_bytes
        self._recent: deque[UpEvent] = deque()
        self._offsets: deque[int] = deque()
        """Where each spilled event's line begins; the first is number ``_first_spilled``."""
        self._first_spilled = 1
        self._size = 0
        self._disk_failed = False
        self.last = 0
        """Number of the newest event."""

    def append(self, event: dict[str, Any], at: float | None = None) -> None:
        if len(self._recent) >= self._memory_events:
            self._spill_older_half()
        full = len(self._recent) >= self._memory_events or self._size >= self._spill_bytes
        if full and event["type"] in EXPENDABLE:
            return
        self.last += 1
        self._recent.append(UpEvent(self.last, time.time() if at is None else at, event))

    def after(self, cursor: int, limit: int = 500) -> list[UpEvent]:
        """At most ``limit`` events with numbers above ``cursor``, in order."""
        found = self._spilled_after(cursor, limit)
        for event in self._recent:
            if len(found) >= limit:
                break
            if event.number > cursor:
                found.append(event)
        return found

    def acknowledge(self, cursor: int) -> None:
        """Everything up to ``cursor`` has been kept elsewhere."""
        while self._recent and self._recent[0].number <= cursor and not self._offsets:
            self._recent.popleft()
        if self._offsets and self._first_spilled + len(self._offsets) - 1 <= cursor:
            self.discard_spill()
            self.acknowledge(cursor)

    def discard_spill(self) -> None:
        self._offsets.clear()
        self._size = 0
        self._spill.unlink(missing_ok=True)

    def _spill_older_half(self) -> None:
        """To disk, unless that cannot be written: then they stay in memory."""
        older = list(islice(self._recent, self._memory_events // 2))
        lines = [msgspec.json.encode(event) + b"\n" for event in older]
        try:
            self._write(lines)
        except OSError as error:
            if not self._disk_failed:
                log.warning("events cannot be written to %s: %s", self._spill, error)
            self._disk_failed = True
            return
        self._disk_failed = False
        if not self._offsets:
            self._first_spilled = older[0].number
        for line in lines:
            self._recent.popleft()
            self._offsets.append(self._size)
            self._size += len(line)

    def _write(self, lines: list[bytes]) -> None:
        """Append them; over what was left of others that could not be written whole."""
        self._spill.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._spill.open("ab") as file:
            file.truncate(self._size)
            file.writelines(lines)

    def _spilled_after(self, cursor: int, limit: int) -> list[UpEvent]:
        skip = max(0, cursor + 1 - self._first_spilled)
        count = min(limit, len(self._offsets) - skip)
        if count <= 0:
            return []
        with self._spill.open("rb") as file:
            file.seek(self._offsets[skip])
            return [msgspec.json.decode(file.readline(), type=UpEvent) for _ in range(count)]
