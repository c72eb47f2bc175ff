"""Model artifacts: lists, the owner's marks, and which files a download names."""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec import UNSET
from sqlalchemy import or_
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Conflict, NotFound, ValidationFailed
from control_plane.schemas.base import Pagination
from control_plane.schemas.models import ChangeModel
from control_plane.services.accounts import audit
from control_plane.services.listing import Paging, containing, paginate
from control_plane.services.scope import Principal, get_owned, owned
from control_plane.tables import ModelArtifact, now
from control_plane.tables.work import ModelStatus

QUALITY = ModelArtifact.quality_metrics["stars"].as_float()
COLUMNS: dict[str, Any] = {
    "created": ModelArtifact.created_at,
    "createdAt": ModelArtifact.created_at,
    "quality": QUALITY,
    "name": ModelArtifact.name,
}
TOKENIZER_FILES = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")
EXPORTS = ("merged", "gguf", "archive")


class File(NamedTuple):
    name: str
    key: str
    size: int
    sha256: str


async def listed(
    session: AsyncSession, team_id: str, paging: Paging, status: ModelStatus | None, search: str | None
) -> tuple[list[ModelArtifact], Pagination]:
    query = owned(ModelArtifact, team_id)
    if status is not None:
        query = query.where(ModelArtifact.status == status)
    if search:
        query = query.where(or_(*(containing(c, search) for c in (ModelArtifact.name, ModelArtifact.description))))
    return await paginate(session, query, paging, COLUMNS, ModelArtifact.id)


async def change(session: AsyncSession, who: Principal, model_id: str, body: ChangeModel) -> ModelArtifact:
    model = await get_owned(session, ModelArtifact, who.team_id, model_id, lock=True)
    if body.name is not UNSET:
        model.name = body.name
    if body.description is not UNSET:
        model.description = body.description
    if body.status is not UNSET and body.status is not model.status:
        model.status = body.status
        if body.status is ModelStatus.DEPLOYED:
            model.deployed_at = now()
        audit(session, f"mark {body.status}", "model", model.id, user_id=who.user_id, team_id=who.team_id)
    await session.flush()
    return model


async def delete(session: AsyncSession, who: Principal, model_id: str) -> None:
    model = await get_owned(session, ModelArtifact, who.team_id, model_id, lock=True)
    model.deleted_at = now()
    audit(session, "delete", "model", model_id, user_id=who.user_id, team_id=who.team_id)
    await session.flush()


def files(model: ModelArtifact, artifact: str) -> list[File]:
    """The stored files that ``artifact`` names. Raises Conflict for an export that is not ready, ValidationFailed."""
    everything = [File(n, f["key"], f["size"], f["sha256"]) for n, f in sorted(model.artifacts.items())]
    chosen = {
        "all": lambda _: True,
        "adapter-model": lambda name: name == "adapter_model.safetensors",
        "adapter-config": lambda name: name == "adapter_config.json",
        "tokenizer": lambda name: name.startswith(TOKENIZER_FILES),
    }
    if artifact in EXPORTS:
        raise Conflict(f"This model has no {artifact} export yet; the adapter's files are there as artifact=all")
    if artifact not in chosen:
        raise ValidationFailed.field("artifact", f"Choose one of: {', '.join([*chosen, *EXPORTS])}")
    found = [file for file in everything if chosen[artifact](file.name.rpartition("/")[2])]
    if not found:
        raise NotFound(f"This model has no {artifact} file")
    return found
