"""/api/presets, /api/base-models, /api/gpu-types."""

from __future__ import annotations

from litestar import get

from control_plane.api.context import House, Session
from control_plane.auth import READ
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.choices import BaseModels, GpuTypes, Presets
from control_plane.services import choices


@get("/api/presets", guards=[READ], tags=["choices"], summary="Presets, and the limits of each hyperparameter")
async def list_presets(installation: House) -> Ok[Presets]:
    return ok(choices.list_presets(installation.catalog))


@get("/api/base-models", guards=[READ], tags=["choices"], summary="Base models that a job may name")
async def list_base_models(installation: House) -> Ok[BaseModels]:
    return ok(choices.list_base_models(installation.catalog, installation.settings.default_base_model))


@get("/api/gpu-types", guards=[READ], tags=["choices"], summary="GPU types with price and free capacity")
async def list_gpu_types(installation: House, session: Session) -> Ok[GpuTypes]:
    return ok(await choices.list_gpu_types(session, installation.catalog))
