"""What can be chosen, with limits, prices and free capacity."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import usd
from control_plane.schemas.choices import BaseModelOut, BaseModels, GpuTypeOut, GpuTypes, PresetOut, Presets
from control_plane.services import prices
from control_plane.services.catalog import Catalog, GpuType
from control_plane.services.presets import full
from control_plane.tables import ClusterState


def list_presets(catalog: Catalog) -> Presets:
    found = [
        PresetOut(
            id=p.id,
            name=p.name,
            description=p.description,
            hyperparameters=msgspec.to_builtins(full(catalog, p.id)),
        )
        for p in catalog.presets.values()
    ]
    return Presets(presets=found, limits=msgspec.to_builtins(catalog.limits))


def list_base_models(catalog: Catalog, default: str) -> BaseModels:
    return BaseModels(
        base_models=[BaseModelOut.of(m, is_default=m.id == default) for m in catalog.base_models.values()]
    )


async def list_gpu_types(session: AsyncSession, catalog: Catalog) -> GpuTypes:
    """GPU types that have a price, with the capacity that the scheduler last saw."""
    price = await prices.current(session)
    state = await session.get(ClusterState, 1)
    known = state if state is not None and state.reachable else None
    return GpuTypes(
        gpu_types=[
            GpuTypeOut.of(
                gpu,
                counts=list(gpu.counts),
                price_per_hour=usd(price.gpu_microusd_per_hour[gpu.id]),
                free=_room(gpu, known.free) if known else None,
                total=_room(gpu, known.total) if known else None,
            )
            for gpu in catalog.gpu_types.values()
            if gpu.id in price.gpu_microusd_per_hour
        ]
    )


def _room(gpu: GpuType, resources: dict[str, Any]) -> int:
    """How many ranks of this type fit; a node label's own resource (``accelerator_type:X``) bounds them too."""
    demand = dict(gpu.demand.resources)
    if gpu.demand.gpus:
        demand["GPU"] = gpu.demand.gpus
    fits = [int(resources.get(name, 0) // amount) for name, amount in demand.items() if amount]
    accelerator = gpu.demand.labels.get("ray.io/accelerator-type")
    if accelerator is not None and not resources.get(f"accelerator_type:{accelerator}"):
        return 0
    return min(fits, default=0)
