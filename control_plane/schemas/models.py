"""Model artifacts on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from control_plane.schemas.base import In, Name, Out, Pagination
from control_plane.tables import ModelArtifact
from control_plane.tables.work import ModelStatus


class ChangeModel(In):
    name: Name | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=10000)] | UnsetType | None = UNSET
    status: ModelStatus | UnsetType = UNSET


class FileOut(Out):
    name: str
    size: int
    sha256: str


class ModelOut(Out):
    id: str
    team_id: str
    created_by: str
    job_id: str
    dataset_id: str
    name: str
    version: int
    description: str | None
    status: ModelStatus
    deployed_at: datetime | None
    quality_metrics: dict[str, Any]
    training_summary: dict[str, Any]
    configuration: dict[str, Any]
    artifacts: list[FileOut]
    parent_model_id: str | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def seen(cls, model: ModelArtifact) -> ModelOut:
        files = [FileOut(name=n, size=f["size"], sha256=f["sha256"]) for n, f in sorted(model.artifacts.items())]
        return cls.of(model, artifacts=files)


class ModelData(Out):
    model: ModelOut


class Models(Out):
    models: list[ModelOut]
    pagination: Pagination


class Download(Out):
    name: str
    url: str
    size: int
    sha256: str
    expires_at: datetime


class Downloads(Out):
    files: list[Download]
