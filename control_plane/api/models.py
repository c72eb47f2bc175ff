"""/api/models."""

from __future__ import annotations

from datetime import timedelta

from litestar import Controller, delete, get, patch
from litestar.params import FromPath, FromQuery, JSONBody

from control_plane.api.context import Caller, House, Pages, Session
from control_plane.auth import READ, TRAIN
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.models import ChangeModel, Download, Downloads, ModelData, ModelOut, Models
from control_plane.services import models
from control_plane.services.scope import get_owned
from control_plane.tables import ModelArtifact, now
from control_plane.tables.work import ModelStatus

LONGEST_TTL_S = 300


class ModelController(Controller):
    path = "/api/models"
    tags = ("models",)

    @get(guards=[READ], summary="The team's models; sortBy=created or quality")
    async def list_models(
        self,
        session: Session,
        who: Caller,
        paging: Pages,
        status: FromQuery[ModelStatus | None] = None,
        search: FromQuery[str | None] = None,
    ) -> Ok[Models]:
        rows, pagination = await models.listed(session, who.team_id, paging, status, search)
        return ok(Models(models=[ModelOut.seen(row) for row in rows], pagination=pagination))

    @get("/{model_id:str}", guards=[READ], summary="A model")
    async def get_model(self, model_id: FromPath[str], session: Session, who: Caller) -> Ok[ModelData]:
        return ok(ModelData(model=ModelOut.seen(await get_owned(session, ModelArtifact, who.team_id, model_id))))

    @patch("/{model_id:str}", guards=[TRAIN], summary="Change name, description or the owner's mark")
    async def change(
        self, model_id: FromPath[str], data: JSONBody[ChangeModel], session: Session, who: Caller
    ) -> Ok[ModelData]:
        return ok(ModelData(model=ModelOut.seen(await models.change(session, who, model_id, data))))

    @delete("/{model_id:str}", guards=[TRAIN], status_code=200, summary="Delete")
    async def delete_model(self, model_id: FromPath[str], session: Session, who: Caller) -> Ok[None]:
        await models.delete(session, who, model_id)
        return ok(None)

    @get("/{model_id:str}/download", guards=[READ], summary="Short-lived signed URLs of its files")
    async def download(
        self, model_id: FromPath[str], installation: House, who: Caller, artifact: FromQuery[str] = "all"
    ) -> Ok[Downloads]:
        async with installation.database.read() as session:
            model = await get_owned(session, ModelArtifact, who.team_id, model_id)
        ttl_s = min(installation.settings.signed_url_ttl_s, LONGEST_TTL_S)
        expires_at = now() + timedelta(seconds=ttl_s)
        files = [
            Download(
                name=file.name,
                url=await installation.storage.sign("GET", file.key, ttl_s=ttl_s, name=file.name),
                size=file.size,
                sha256=file.sha256,
                expires_at=expires_at,
            )
            for file in models.files(model, artifact)
        ]
        return ok(Downloads(files=files))
