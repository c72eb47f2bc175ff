"""Events out: one JSON object a line on a private file descriptor, from any thread."""

from __future__ import annotations

import os
import threading
from typing import Protocol

import msgspec

from trainer.protocol import Event


class Report(Protocol):
    """Where events go."""

    def __call__(self, event: Event) -> None: ...


class Pipe:
    """Writes events to a file descriptor, each line whole. Raises OSError when nobody reads any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        line = memoryview(msgspec.json.encode(event) + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]


def private_stdout() -> int:
    """A descriptor of standard output as it was; from now on whatever is printed goes to standard error."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    return descriptor
