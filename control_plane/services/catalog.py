"""What can be chosen: GPU types, base models, presets and limits, read once from ``configs/``."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import yaml

from control_plane.errors import ValidationFailed
from control_plane.settings import Settings
from trainer.config import BaseModel, BaseModelSource

MICRO = 1_000_000


class GpuDemand(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank asks of Ray: GPUs, custom resources, node labels."""

    gpus: float = 0
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}


class GpuType(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    id: str
    name: str
    demand: GpuDemand
    counts: tuple[int, ...]
    usd_per_hour: str
    tflops: float
    load_seconds: float
    memory_gib: int = msgspec.field(name="memoryGiB")

    @property
    def microusd_per_hour(self) -> int:
        return int(Decimal(self.usd_per_hour) * MICRO)


class BaseModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    id: str
    name: str
    revision: str
    source: BaseModelSource
    parameters: int
    hidden_size: int
    layers: int
    vocabulary_size: int
    context_length: int
    license: str = ""

    @property
    def model(self) -> BaseModel:
        """As the trainer is told of it."""
        return BaseModel(id=self.id, revision=self.revision, source=self.source)


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    name: str
    description: str
    hyperparameters: dict[str, Any]
    """Wire names; what is absent has the default of ``trainer.config.Hyperparameters``."""


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    """Hard bounds and the range outside which a warning is given; or ``choices``."""

    min: float | None = None
    max: float | None = None
    warn_min: float | None = None
    warn_max: float | None = None
    step: float | None = None
    default: Any = None
    choices: tuple[Any, ...] | None = None


class Catalog(msgspec.Struct, frozen=True):
    """Everything by id, in the files' order."""

    gpu_types: dict[str, GpuType]
    base_models: dict[str, BaseModelEntry]
    presets: dict[str, Preset]
    limits: dict[str, Limit]
    storage_usd_per_gib_month: str

    @classmethod
    def load(cls, settings: Settings) -> Catalog:
        """Read the configuration folder. Raises ``msgspec.ValidationError`` naming the field."""
        folder = Path(settings.config_dir)
        gpus = _read(folder / "gpus.yaml")
        models = _read(folder / "base_models.yaml")["baseModels"]
        if settings.base_models_file:
            models = models + _read(Path(settings.base_models_file))["baseModels"]
        presets = {p.stem: {"id": p.stem, **_read(p)} for p in sorted((folder / "presets").glob("*.yaml"))}
        limits = presets.pop("limits")
        limits.pop("id")
        return cls(
            gpu_types={g.id: g for g in msgspec.convert(gpus["gpuTypes"], list[GpuType])},
            base_models={m.id: m for m in msgspec.convert(models, list[BaseModelEntry])},
            presets=msgspec.convert(presets, dict[str, Preset]),
            limits=msgspec.convert(limits, dict[str, Limit]),
            storage_usd_per_gib_month=gpus["storageUsdPerGibMonth"],
        )

    def base_model(self, model_id: str) -> BaseModelEntry:
        """Raises ValidationFailed (``baseModel``) with the ids that exist."""
        entry = self.base_models.get(model_id)
        if entry is None:
            raise ValidationFailed.field("baseModel", f"Unknown base model. Choose one of: {_names(self.base_models)}")
        return entry


def _names(entries: dict[str, Any]) -> str:
    return ", ".join(entries)


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
