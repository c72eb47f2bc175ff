"""The trainer child: a program in a scrubbed environment, events out of its stdout, stop requests into its stdin."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from trainer.protocol import ChildEvent, Log, Stop, StopReason

LINE_LIMIT = 8 * 1024 * 1024
OOM_SAMPLES_S = 10.0
"""Older news of the kernel's than one or two of these is of another process: the child has told something since."""
STDERR_LINES = 60
STDERR_BYTES = 16 * 1024

OUT_OF_MEMORY = (
    "The machine ran out of memory, and its operating system ended the trainer. Lower maxSeqLength first, then "
    "loraRank; or give the workers more memory."
)

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


def oom_kills() -> int:
    """Processes that the kernel has ended for want of memory: of our control group if it tells, else of the machine."""
    files = [Path("/proc/vmstat")]
    with suppress(OSError, StopIteration):
        unified = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        files.insert(0, Path(f"/sys/fs/cgroup{unified.removeprefix('0::')}/memory.events"))
    for file in files:
        with suppress(OSError, KeyError):
            return int(dict(line.split(" ", 1) for line in file.read_text().splitlines())["oom_kill"])
    return 0


class Child:
    """One child process, leader of its own process group so that it can be ended with whatever it started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._reading_stderr = asyncio.create_task(self._read_stderr())
        self._killed = False
        self._oom_kills = [oom_kills()] * 2
        """The last two samples: a death for want of memory is newer than the first of them."""
        self._sampled_at = time.monotonic()
        self.out_of_memory = False
        """The kernel ended it for want of memory; known once it has been waited for."""

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
            self._sample_oom_kills()
            try:
                yield msgspec.json.decode(line, type=ChildEvent)
            except msgspec.DecodeError as error:
                shown = line[:200].decode(errors="replace").strip()
                yield Log(level="WARNING", message=f"the trainer wrote what is no event ({error}): {shown}")

    def _sample_oom_kills(self) -> None:
        if time.monotonic() - self._sampled_at >= OOM_SAMPLES_S:
            self._oom_kills, self._sampled_at = [self._oom_kills[1], oom_kills()], time.monotonic()

    async def stop(self, reason: StopReason) -> None:
        """Ask it to save a checkpoint and end; a child that is gone is fine."""
        assert self._process.stdin
        with suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(msgspec.json.encode(Stop(reason=reason)) + b"\n")
            await self._process.stdin.drain()

    def kill(self) -> None:
        self._killed |= self.running
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code; negative: the signal that ended it. Its process group is gone then too."""
        code = await self._process.wait()
        self.out_of_memory = code == -signal.SIGKILL and not self._killed and oom_kills() > self._oom_kills[0]
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


def exit_reason(code: int, *, out_of_memory: bool = False) -> tuple[str, str]:
    """(code, message) of a child that ended without a last word."""
    if out_of_memory:
        return "OUT_OF_MEMORY", OUT_OF_MEMORY
    if code < 0:
        return "CHILD_KILLED", f"the trainer was ended by {signal.Signals(-code).name}"
    return "CHILD_EXITED", f"the trainer exited with code {code} and no last event"
