"""The data folder of an embedded installation: one ``brightrun up`` at a time, its key, its log."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG_LIMIT_BYTES = 16 * 1024 * 1024


class FolderInUse(Exception):
    """Another ``brightrun up`` holds the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it; the lock goes with the process, however that ends. Raises FolderInUse."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise FolderInUse(f"{folder} is in use by another `brightrun up` (process {lock.read()})") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def make_secret(folder: Path) -> None:
    """The key of signed URLs: made once, whole or not at all, readable by its owner only."""
    path = folder / "secret"
    if path.exists():
        return
    draft = folder / "secret.new"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def log_file(folder: Path, name: str) -> Path:
    """``logs/NAME.log``; one that has grown over the limit becomes ``NAME.log.1`` first."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        log.replace(log.with_name(log.name + ".1"))
    return log


def logger_to(log: Path) -> logging.Logger:
    """What ``up`` itself has to say, for the person at the terminal (standard error) and for later."""
    to_file, to_person = logging.FileHandler(log), logging.StreamHandler()
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("brightrun.up")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [to_file, to_person]
    return logger
