"""The trainer child: a program in a scrubbed environment, events out of its stdout, stop requests into its stdin."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from trainer.protocol import ChildEvent, Log, Stop, StopReason

LINE_LIMIT = 8 * 1024 * 1024
STDERR_LINES = 60
STDERR_BYTES = 16 * 1024

INHERITED = (
    *("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
)
"""All that passes from the rank's environment; never a credential."""


def scrubbed_env(parent: Mapping[str, str], *, home: Path, cache_dir: Path, threads: int) -> dict[str, str]:
    """The child's whole environment."""
    return {
        **{name: parent[name] for name in INHERITED if name in parent},
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_HOME": str(cache_dir / "huggingface"),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }


class Child:
    """One child process, leader of its own process group so that it can be ended with whatever it started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._reading_stderr = asyncio.create_task(self._read_stderr())

    @classmethod
    async def start(cls, command: Sequence[str], *, env: dict[str, str], cwd: Path) -> Child:
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(
                *command, env=env, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE_LIMIT,
                start_new_session=True,
            )
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def events(self) -> AsyncIterator[ChildEvent]:
        """What it says until it closes its stdout; a line that is no event becomes a warning in the log."""
        assert self._process.stdout
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:
                yield Log(level="WARNING", message=f"the trainer wrote a line of more than {LINE_LIMIT} bytes")
                continue
            if not line:
                return
            try:
                yield msgspec.json.decode(line, type=ChildEvent)
            except msgspec.DecodeError as error:
                shown = line[:200].decode(errors="replace").strip()
                yield Log(level="WARNING", message=f"the trainer wrote what is no event ({error}): {shown}")

    async def stop(self, reason: StopReason) -> None:
        """Ask it to save a checkpoint and end; a child that is gone is fine."""
        assert self._process.stdin
        with suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(msgspec.json.encode(Stop(reason=reason)) + b"\n")
            await self._process.stdin.drain()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code; negative: the signal that ended it. Its process group is gone then too."""
        code = await self._process.wait()
        self.kill()
        await asyncio.wait({self._reading_stderr}, timeout=1)
        return code

    def stderr_tail(self) -> str:
        return "\n".join(self._stderr)[-STDERR_BYTES:]

    async def _read_stderr(self) -> None:
        assert self._process.stderr
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:
                continue
            if not line:
                return
            self._stderr.append(line.decode(errors="replace").rstrip())


def exit_reason(code: int) -> tuple[str, str]:
    """(code, message) of a child that ended without a last word."""
    if code < 0:
        return "CHILD_KILLED", f"the trainer was ended by {signal.Signals(-code).name}"
    return "CHILD_EXITED", f"the trainer exited with code {code} and no last event"
