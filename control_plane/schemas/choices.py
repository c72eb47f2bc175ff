"""Presets, base models and GPU types on the wire."""

from __future__ import annotations

from typing import Any

import msgspec

from control_plane.schemas.base import Money, Out


class PresetOut(Out):
    id: str
    name: str
    description: str
    hyperparameters: dict[str, Any]
    """The full resolved set."""


class Presets(Out):
    presets: list[PresetOut]
    limits: dict[str, Any]
    """By hyperparameter: min, max, warnMin, warnMax, step, default, or choices."""


class BaseModelOut(Out):
    id: str
    name: str
    revision: str
    parameters: int
    context_length: int
    license: str
    is_default: bool


class BaseModels(Out):
    base_models: list[BaseModelOut]


class GpuTypeOut(Out):
    id: str
    name: str
    counts: list[int]
    price_per_hour: Money
    memory_gib: int = msgspec.field(name="memoryGiB")
    free: int | None
    """How many more of them could start now; null while the cluster is not known."""
    total: int | None


class GpuTypes(Out):
    gpu_types: list[GpuTypeOut]
