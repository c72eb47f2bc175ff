"""When a child is given up: pure rules over what was heard and a monotonic clock."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

HANG_FACTOR = 20
STOP_FACTOR = 3
STEPS_REMEMBERED = 101
STEPS = frozenset({"metrics", "progress"})


class Watch:
    """``heard`` every event and ``stopping`` once; ``overdue`` says whether, and why, the child must be ended.

    Hung: no step for max(``hang_floor_s``, 20 × the median step) while training (``always``: from the first event on).
    Unresponsive: max(``grace_s``, 3 × the median step) after a stop request, or after the last sign that it saves.
    """

    def __init__(
        self, *, hang_floor_s: float, grace_s: float, always: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hang_floor_s, self._grace_s, self._clock = hang_floor_s, grace_s, clock
        self._steps_s: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._training = self._always = always
        self._last_step = clock()
        self._stop_since: float | None = None

    def heard(self, event: dict[str, Any]) -> None:
        now, kind = self._clock(), event["type"]
        if kind in STEPS:
            if self._training:
                self._steps_s.append(now - self._last_step)
            self._last_step = now
        elif kind in ("phase", "started"):
            self._training = self._always or event.get("name") == "training"
            self._last_step = now
        if self._stop_since is not None and kind in ("phase", "stored"):
            self._stop_since = now

    def stopping(self) -> None:
        if self._stop_since is None:
            self._stop_since = self._clock()

    def overdue(self) -> tuple[str, str] | None:
        """(code, message), or None."""
        now = self._clock()
        step_s = statistics.median(self._steps_s) if self._steps_s else 0.0
        grace_s = max(self._grace_s, STOP_FACTOR * step_s)
        if self._stop_since is not None and now - self._stop_since > grace_s:
            return "UNRESPONSIVE", f"the trainer did not end within {grace_s:.0f} s of being asked to stop"
        hang_s = max(self._hang_floor_s, HANG_FACTOR * step_s)
        if self._training and now - self._last_step > hang_s:
            return "HUNG", f"no training step for {hang_s:.0f} s"
        return None
