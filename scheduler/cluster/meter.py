"""Where a rank's time goes, by kind, on a clock that never jumps."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.protocol import PhaseName


class Meter:
    """Cumulative milliseconds by kind since it was made; every reading is at least the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._kind: PhaseName = "loading"
        self._spent_s: dict[str, float] = {}

    def switch(self, kind: PhaseName) -> None:
        now = self._clock()
        self._spent_s[self._kind] = self._spent_s.get(self._kind, 0.0) + now - self._since
        self._since, self._kind = now, kind

    def read(self) -> dict[str, int]:
        self.switch(self._kind)
        return {kind: int(seconds * 1000) for kind, seconds in self._spent_s.items()}
