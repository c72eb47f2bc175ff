"""Namespaces of our own, so that nothing outlives the harness, however it ends, and whatever leaks is seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache
from types import FrameType

import psutil

INSIDE = "FAULTS_SANDBOX"
INIT = '"$@"; exit $?'
"""A shell as process 1 adopts and reaps orphans, which would stay zombies otherwise."""


@cache
def unshare() -> list[str] | None:
    """The command that runs another in PID and mount namespaces of its own; None where that is not allowed."""
    namespaces = ["--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
    users = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    command = ["unshare", *users, *namespaces]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    return command if allowed else None


def is_inside() -> bool:
    return INSIDE in os.environ


def run_inside(module: str, arguments: list[str]) -> int | None:
    """``python -m MODULE`` within; its exit code. None: not allowed here.

    The first SIGINT or SIGTERM reaches it as SIGINT, the second ends everything at once.
    """
    command = unshare()
    if command is None:
        return None
    shell = ["sh", "-c", INIT, "sh", sys.executable, "-m", module, *arguments]
    process = subprocess.Popen([*command, *shell], env=os.environ | {INSIDE: "1"}, start_new_session=True)

    def kill(_number: int, _frame: FrameType | None) -> None:
        process.kill()

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, kill)
        for inner in psutil.Process(process.pid).children(recursive=True):
            if inner.cmdline()[1:3] == ["-m", module]:
                inner.send_signal(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    return process.wait()


def interruptible() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt, even where a shell in the background has switched SIGINT off."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def others() -> list[psutil.Process]:
    """Every process of the sandbox but this one and the shell that holds it."""
    mine = {1, os.getpid()}
    return [p for p in psutil.process_iter(["cmdline"]) if p.pid not in mine and p.status() != psutil.STATUS_ZOMBIE]
