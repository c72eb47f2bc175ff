"""A process that is started again whenever it ends: a second scheduler, a second node."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PAUSE_S = 0.5
GRACE_S = 20


class Kept:
    """``command`` is asked at each start. Ended with SIGTERM, then by force with all its descendants."""

    def __init__(self, command: Callable[[], list[str]], env: dict[str, str], log: Path) -> None:
        self._command, self._env, self._log = command, env, log
        self._ending = threading.Event()
        self.starts = 0
        self.process = self._spawn()
        self._thread = threading.Thread(target=self._keep, name=f"keep {log.stem}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        tree: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            tree = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        self.process.kill()
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._thread.join(GRACE_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command(),
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _keep(self) -> None:
        while True:
            self.process.wait()
            if self._ending.wait(PAUSE_S):
                return
            self.process = self._spawn()
