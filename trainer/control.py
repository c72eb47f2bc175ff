"""Stop requests: from the rank over standard input, or from a shell by Ctrl-C. Torch-free."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import msgspec

from trainer.errors import Stopped
from trainer.protocol import Control, StopReason

ORPHANED = 70
"""Exit code after the end of standard input under ``--supervised``: the rank is gone."""
BEAT_S = 15.0


class StopRequest:
    """Set once, by any thread; ``reason`` is None until then.

    Whoever works asks it often, so that it also knows that work goes on: it then calls ``beat`` now and again.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.beat: Callable[[], None] = lambda: None
        self._beaten_at = time.monotonic()
        self.exit_code = ORPHANED
        """What the process ends with if standard input ends now."""

    def ask(self, reason: StopReason) -> None:
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if self.reason:
            raise Stopped
        if time.monotonic() - self._beaten_at > BEAT_S:
            self._beaten_at = time.monotonic()
            self.beat()

    def deaf(self) -> StopRequest:
        """One that cannot be asked to stop, for what must be brought to its end."""
        request = StopRequest()
        request.beat = self.beat
        return request


def supervised() -> StopRequest:
    """Obey control messages on standard input, and end the process at once when it ends."""
    request = StopRequest()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_listen, args=(request,), name="control", daemon=True).start()
    return request


def _listen(request: StopRequest) -> None:
    decoder, held = msgspec.json.Decoder(Control), b""
    try:
        # not sys.stdin: its lock, held while reading, would abort the interpreter's orderly end
        while data := os.read(0, 65536):
            *lines, held = (held + data).split(b"\n")
            for line in filter(None, lines):
                request.ask(decoder.decode(line).reason)
    finally:
        os._exit(request.exit_code)


def from_shell() -> StopRequest:
    """The first Ctrl-C asks for an orderly stop, the second ends the program."""
    request = StopRequest()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        request.ask("PAUSE")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, on_interrupt)
    return request
