"""/api/datasets."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, delete, get, patch, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from control_plane.api.context import Caller, House, Once, Pages, Session
from control_plane.auth import READ, TRAIN
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.datasets import (
    ChangeDataset,
    CreateDataset,
    DatasetData,
    DatasetOut,
    Datasets,
    Findings,
    Judged,
    Upload,
    Validate,
    VerdictOut,
)
from control_plane.services import datasets
from control_plane.services.scope import get_owned
from control_plane.tables import Dataset
from control_plane.tables.work import DatasetFormat, DatasetStatus


class DatasetController(Controller):
    path = "/api/datasets"
    tags = ("datasets",)

    @post(guards=[TRAIN], summary="Announce a file; answers where to PUT it")
    async def create(
        self,
        data: JSONBody[CreateDataset],
        installation: House,
        session: Session,
        who: Caller,
        idempotent: Once,
    ) -> Ok[Upload]:
        settings = installation.settings
        model = installation.catalog.base_model(data.base_model or settings.default_base_model)

        async def run() -> Upload:
            installation.require_room(data.file_size if installation.storage.folder else 0)
            dataset = await datasets.create(session, who, data, model)
            return Upload(dataset_id=dataset.id, upload_url=dataset.storage_key, upload_method="PUT", upload_headers={})

        made = await idempotent(Upload, run)  # what is kept for a repetition holds the key, signed afresh each time
        made.upload_headers = {"Content-Type": "application/octet-stream"}
        made.upload_url = await installation.storage.sign(
            "PUT", made.upload_url, ttl_s=settings.signed_url_ttl_s, limit=str(data.file_size), dataset=made.dataset_id
        )
        return ok(made)

    @post("/{dataset_id:str}/confirm", guards=[TRAIN], status_code=202, summary="The file is there: examine it")
    async def confirm(self, dataset_id: FromPath[str], installation: House, who: Caller) -> Ok[Judged]:
        """The object store is asked between transactions, not within one."""
        async with installation.database.read() as session:
            key = (await get_owned(session, Dataset, who.team_id, dataset_id)).storage_key
        size = await installation.storage.size(key)
        async with installation.database.write() as session:
            dataset, verdict = await datasets.confirm(session, who.team_id, dataset_id, size, installation.catalog)
        return ok(Judged(dataset=DatasetOut.brief(dataset), verdict=VerdictOut.of(verdict)))

    @post("/{dataset_id:str}/validate", guards=[TRAIN], status_code=202, summary="Examine it under another base model")
    async def validate(
        self, dataset_id: FromPath[str], data: JSONBody[Validate], session: Session, who: Caller, installation: House
    ) -> Ok[Judged]:
        catalog = installation.catalog
        dataset, verdict = await datasets.validate(session, who.team_id, dataset_id, data.base_model, catalog)
        return ok(Judged(dataset=DatasetOut.brief(dataset), verdict=VerdictOut.of(verdict)))

    @get(guards=[READ], summary="The team's datasets")
    async def list_datasets(
        self,
        session: Session,
        who: Caller,
        paging: Pages,
        format: FromQuery[DatasetFormat | None] = None,
        status: FromQuery[DatasetStatus | None] = None,
        training_ready: Annotated[bool | None, QueryParameter(name="trainingReady")] = None,
        search: FromQuery[str | None] = None,
    ) -> Ok[Datasets]:
        rows, pagination = await datasets.listed(
            session, who.team_id, paging, format=format, status=status, training_ready=training_ready, search=search
        )
        return ok(Datasets(datasets=[DatasetOut.brief(row) for row in rows], pagination=pagination))

    @get("/{dataset_id:str}", guards=[READ], summary="A dataset with its sample and verdicts")
    async def get_dataset(self, dataset_id: FromPath[str], session: Session, who: Caller) -> Ok[DatasetData]:
        dataset = await get_owned(session, Dataset, who.team_id, dataset_id)
        verdicts = await datasets.verdicts_of(session, dataset_id)
        return ok(DatasetData(dataset=DatasetOut.whole(dataset, verdicts)))

    @get("/{dataset_id:str}/errors", guards=[READ], summary="What is wrong with it: all counted, the first listed")
    async def errors(
        self,
        dataset_id: FromPath[str],
        session: Session,
        who: Caller,
        base_model: Annotated[str | None, QueryParameter(name="baseModel")] = None,
    ) -> Ok[Findings]:
        counts, errors = await datasets.findings(session, who.team_id, dataset_id, base_model)
        return ok(Findings(counts=counts, errors=errors))

    @patch("/{dataset_id:str}", guards=[TRAIN], summary="Change name or description")
    async def change(
        self, dataset_id: FromPath[str], data: JSONBody[ChangeDataset], session: Session, who: Caller
    ) -> Ok[DatasetData]:
        dataset = await datasets.change(session, who.team_id, dataset_id, data)
        return ok(DatasetData(dataset=DatasetOut.whole(dataset, await datasets.verdicts_of(session, dataset_id))))

    @delete("/{dataset_id:str}", guards=[TRAIN], status_code=200, summary="Delete; 409 while a job needs it")
    async def delete_dataset(self, dataset_id: FromPath[str], session: Session, who: Caller) -> Ok[None]:
        await datasets.delete(session, who, dataset_id)
        return ok(None)
