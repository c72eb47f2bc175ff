"""Checkpoints: everything from which training goes on as if nothing had happened, whole or not there at all.

A folder holds ``adapter.safetensors``, ``optimizer.safetensors``, ``best.safetensors`` (the best adapter so far, if
there is one), ``state.json`` and, written last, ``manifest.json`` with the size and SHA-256 of each.
"""

from __future__ import annotations

import os
import shutil
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import TrainerError
from trainer.protocol import MANIFEST

ADAPTER, OPTIMIZER, BEST, STATE = "adapter.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"


class State(msgspec.Struct):
    """How far a run has come. Losses are nats per learned token; steps are optimiser steps done."""

    step: int = 0
    evaluated: int = -1
    """The step of the last evaluation."""
    stale: int = 0
    """Evaluations since the best one."""
    training_loss: float | None = None
    validation_loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    tokens: int = 0
    training_s: float = 0.0
    before: dict[str, Any] = {}
    """Loss, perplexity and sample answers of the model as it came."""


class Checkpoint(NamedTuple):
    state: State
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] | None


class Saved(NamedTuple):
    path: Path
    size: int
    sha256: str
    """Of the manifest."""


def save(checkpoint: Checkpoint, folder: Path, epoch: int) -> Saved:
    """Write a checkpoint beside ``folder`` and rename it there; every file is on disk before the manifest is."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(checkpoint.adapter, temporary / ADAPTER)
    save_file(checkpoint.optimizer, temporary / OPTIMIZER)
    if checkpoint.best is not None:
        save_file(checkpoint.best, temporary / BEST)
    (temporary / STATE).write_bytes(msgspec.json.encode(checkpoint.state))
    files = {file.name: _entry(file) for file in sorted(temporary.iterdir())}
    manifest = {"files": files, "step": checkpoint.state.step, "epoch": epoch}
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (temporary / MANIFEST).write_bytes(text)
    _sync(temporary / MANIFEST)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _sync(folder.parent)
    size = len(text) + sum(entry["size"] for entry in files.values())
    return Saved(folder, size, sha256(text).hexdigest())


def verify(folder: Path) -> None:
    """Raises TrainerError CHECKPOINT_TORN unless every file is there as the manifest says."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
        for name, entry in manifest["files"].items():
            if _measure(folder / name) != entry:
                raise _torn(folder, f"{name} is not what was written")
        missing = {ADAPTER, OPTIMIZER, STATE} - manifest["files"].keys()
    except (OSError, msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise _torn(folder, f"{type(error).__name__}: {error}") from error
    if missing:
        raise _torn(folder, f"the manifest does not name {', '.join(sorted(missing))}")


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint back, verified. Raises TrainerError CHECKPOINT_TORN."""
    verify(folder)
    best = folder / BEST
    return Checkpoint(
        msgspec.json.decode((folder / STATE).read_bytes(), type=State),
        load_file(folder / ADAPTER),
        load_file(folder / OPTIMIZER),
        load_file(best) if best.is_file() else None,
    )


def prune(folder: Path, keep: int) -> None:
    """Leave the ``keep`` newest checkpoints of ``folder``."""
    whole = sorted(folder.glob("a*-s*/" + MANIFEST), key=lambda file: file.stat().st_mtime_ns)
    for manifest in whole[:-keep]:
        shutil.rmtree(manifest.parent)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors (``index.name``); hyperparameters are not in it."""
    return {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _entry(file: Path) -> dict[str, Any]:
    _sync(file)
    return _measure(file)


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _torn(folder: Path, why: str) -> TrainerError:
    return TrainerError(
        "CHECKPOINT_TORN", f"The checkpoint {folder.name} is not whole: {why}.", "Resume from the one before it."
    )
