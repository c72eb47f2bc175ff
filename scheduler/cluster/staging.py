"""Bringing inputs from the object store into an attempt's folder, and its outputs back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from control_plane.storage import Storage
from scheduler.executor import ResumePoint, Stage
from trainer.protocol import MANIFEST

T = TypeVar("T")
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 30.0, 60.0, 60.0, 60.0)
"""An object store that is away for longer than all of these together (about 5 minutes) is a platform fault."""


class Torn(Exception):
    """A checkpoint in the store is not whole: a file or its manifest is missing or has another content."""


async def retried(action: Callable[[], Awaitable[T]]) -> T:
    """The action's result; a store that fails is asked again after pauses. A missing object is an answer."""
    for pause_s in RETRY_PAUSES_S:
        try:
            return await action()
        except (FileNotFoundError, Torn):
            raise
        except Exception:
            await asyncio.sleep(pause_s)
    return await action()


async def stage_in(storage: Storage, stages: tuple[Stage, ...], folder: Path) -> None:
    """Download every input below ``folder``. Raises FileNotFoundError for one that does not exist."""
    for stage in stages:
        for key, path in await _files_of(storage, stage, folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            await retried(partial(storage.download, key, path))


async def _files_of(storage: Storage, stage: Stage, folder: Path) -> list[tuple[str, Path]]:
    target = folder / stage.path
    if not stage.prefix:
        return [(stage.key, target)]
    prefix = stage.key.rstrip("/") + "/"
    listed = await retried(partial(storage.list, prefix))
    if not listed:
        raise FileNotFoundError(prefix)
    return [(key, target / key.removeprefix(prefix)) for key, _ in listed]


async def fetch_checkpoint(storage: Storage, point: ResumePoint, folder: Path) -> None:
    """Download a checkpoint into ``folder``, every file verified against its manifest. Raises Torn."""
    try:
        manifest = await retried(partial(storage.get, f"{point.key}/{MANIFEST}"))
        if hashlib.sha256(manifest).hexdigest() != point.sha256:
            raise Torn(f"{MANIFEST} has another content than was recorded")
        for name, entry in _files_in(manifest):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            await retried(partial(storage.download, f"{point.key}/{name}", path))
            if path.stat().st_size != entry["size"] or await asyncio.to_thread(sha256_of, path) != entry["sha256"]:
                raise Torn(f"{name} has another content than its manifest says")
    except FileNotFoundError as error:
        raise Torn(f"a file is missing: {error}") from error
    (folder / MANIFEST).write_bytes(manifest)


def _files_in(manifest: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        files = msgspec.json.decode(manifest)["files"]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise Torn(f"{MANIFEST} cannot be read: {error}") from error
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Torn(f"{MANIFEST} names a path outside of the checkpoint: {name}")
        yield name, entry


async def upload_folder(storage: Storage, folder: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Upload every file under ``prefix``, the manifest last. Answers ``{name: {"key", "size", "sha256"}}``."""
    files: dict[str, dict[str, Any]] = {}
    for path in await asyncio.to_thread(_manifest_last, folder):
        name = path.relative_to(folder).as_posix()
        key = f"{prefix}/{name}"
        await retried(partial(storage.upload, path, key))
        digest = await asyncio.to_thread(sha256_of, path)
        files[name] = {"key": key, "size": path.stat().st_size, "sha256": digest}
    return files


def _manifest_last(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.name == MANIFEST, path)
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
