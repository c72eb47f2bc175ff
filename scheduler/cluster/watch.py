"""When a child is given up: pure rules over what was heard and a monotonic clock."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

HANG_FACTOR = 20
LOADING_FACTOR = 6
"""Before the first step a base model may have to be fetched, which tells nothing while it lasts."""
STOP_FACTOR = 3
STEPS_REMEMBERED = 101
STEPS = frozenset({"metrics", "progress"})
OF_THE_RANK = frozenset({"pending", "stored", "adapter"})
"""Events that tell nothing of the child."""
GRACE_S = 20.0
"""How long a child may take to obey a stop request, and then to save and have its checkpoint stored."""


class Overdue(NamedTuple):
    code: str
    message: str
    by_s: float
    """How long ago its time was up."""


class Watch:
    """``heard`` every event, ``beat`` at every sign of work, ``stopping`` once; ``overdue`` says whether, and why, the
    child must be ended.

    Hung: no step for max(``hang_floor_s``, 20 × the median step) while training; no sign at all for as long while
    evaluating and saving, and for ``LOADING_FACTOR`` times as long while loading.
    Unresponsive: max(``grace_s``, 3 × the median step) after a stop request nothing is being saved yet, or ``grace_s``
    after that began, or after the request that met it, it is not over.
    ``always``: one deadline whatever the phase (verdicts).
    """

    def __init__(
        self, *, hang_floor_s: float, grace_s: float, always: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hang_floor_s, self._grace_s, self._always, self._clock = hang_floor_s, grace_s, always, clock
        self._steps_s: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._phase = "loading"
        self._last_sign = self._last_step = clock()
        self._asked_at: float | None = None
        self._obeyed_at: float | None = None

    def begin(self) -> None:
        """It has its place: from here on its time runs."""
        self._last_sign = self._last_step = self._clock()

    def heard(self, event: dict[str, Any]) -> None:
        now, kind = self._clock(), event["type"]
        if kind in OF_THE_RANK:
            return
        self._last_sign = now
        if kind in STEPS:
            if self._phase == "training":
                self._steps_s.append(now - self._last_step)
            self._last_step = now
        elif kind == "phase":
            self._phase, self._last_step = event["name"], now
            if self._asked_at is not None and self._obeyed_at is None and self._phase == "saving":
                self._obeyed_at = now

    def beat(self) -> None:
        """Work goes on, though no event tells so."""
        self._last_sign = self._clock()

    def stopping(self) -> None:
        if self._asked_at is None:
            self._asked_at = self._clock()
            if self._phase == "saving":
                self._obeyed_at = self._asked_at

    def overdue(self) -> Overdue | None:
        """Whose time is up, and how long since."""
        unresponsive, hung = self._unresponsive(), self._hung()
        late = [found for found in (unresponsive, hung) if found.by_s > 0]
        return max(late, key=lambda found: found.by_s, default=None)

    def _unresponsive(self) -> Overdue:
        if self._asked_at is None:
            return Overdue("", "", 0)
        if self._obeyed_at is not None:
            by_s = self._clock() - self._obeyed_at - self._grace_s
            return Overdue("UNRESPONSIVE", f"its checkpoint was not stored within {self._grace_s:.0f} s", by_s)
        grace_s = max(self._grace_s, STOP_FACTOR * self._median_step_s())
        by_s = self._clock() - self._asked_at - grace_s
        return Overdue("UNRESPONSIVE", f"the trainer did not stop within {grace_s:.0f} s of being asked to", by_s)

    def _hung(self) -> Overdue:
        limit_s = max(self._hang_floor_s, HANG_FACTOR * self._median_step_s())
        if self._phase == "training" and not self._always:
            return Overdue("HUNG", f"no training step for {limit_s:.0f} s", self._clock() - self._last_step - limit_s)
        if self._phase == "loading" and not self._always:
            limit_s = self._hang_floor_s * LOADING_FACTOR
        told = f"no sign of work for {limit_s:.0f} s while {self._phase}"
        return Overdue("HUNG", told, self._clock() - self._last_sign - limit_s)

    def _median_step_s(self) -> float:
        return statistics.median(self._steps_s) if self._steps_s else 0.0
