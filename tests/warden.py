"""Ends what a test session started when the session itself was killed and can end nothing any more."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warden(command: str) -> Iterator[None]:
    """Within it, the shell runs ``command`` if this process dies: its end closes the pipe that the shell reads."""
    watching = subprocess.Popen(
        ["sh", "-c", f"cat > /dev/null; {command}"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        watching.kill()
        watching.wait()
        assert watching.stdin
        watching.stdin.close()
