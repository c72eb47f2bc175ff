"""Datasets from their first byte to their verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET
from sqlalchemy import exists, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Conflict, PayloadTooLarge
from control_plane.schemas.base import Pagination
from control_plane.schemas.datasets import ChangeDataset, CreateDataset
from control_plane.services.accounts import audit
from control_plane.services.catalog import BaseModelEntry, Catalog
from control_plane.services.listing import Paging, containing, paginate
from control_plane.services.notifications import notify
from control_plane.services.scope import Principal, get_owned, owned
from control_plane.services.sql import ROW
from control_plane.states import UNFINISHED, Status
from control_plane.tables import Dataset, TrainingJob, Verdict, now, uuid7
from control_plane.tables.notices import NotificationType
from control_plane.tables.work import DatasetFormat, DatasetStatus

COLUMNS = {
    "createdAt": Dataset.created_at,
    "name": Dataset.name,
    "status": Dataset.status,
    "fileSize": Dataset.file_size,
    "totalTokens": Dataset.total_tokens,
}


async def create(session: AsyncSession, who: Principal, body: CreateDataset, model: BaseModelEntry) -> Dataset:
    """A dataset that waits for its file."""
    dataset_id = uuid7()
    dataset = Dataset(
        id=dataset_id,
        team_id=who.team_id,
        created_by=who.user_id,
        name=body.name,
        description=body.description,
        stated_format=body.format,
        format=body.format,
        base_model=model.id,
        storage_key=f"datasets/{who.team_id}/{dataset_id}/source",
        file_name=body.file_name,
        file_size=body.file_size,
    )
    session.add(dataset)
    await session.flush()
    audit(session, "create", "dataset", dataset.id, user_id=who.user_id, team_id=who.team_id)
    return dataset


async def listed(
    session: AsyncSession,
    team_id: str,
    paging: Paging,
    *,
    format: DatasetFormat | None,
    status: DatasetStatus | None,
    training_ready: bool | None,
    search: str | None,
) -> tuple[list[Dataset], Pagination]:
    query = owned(Dataset, team_id)
    if format is not None:
        query = query.where(Dataset.format == format)
    if status is not None:
        query = query.where(Dataset.status == status)
    if training_ready is not None:
        query = query.where(Dataset.training_ready.is_(training_ready))
    if search:
        query = query.where(
            or_(*(containing(c, search) for c in (Dataset.name, Dataset.description, Dataset.file_name)))
        )
    return await paginate(session, query, paging, COLUMNS, Dataset.id)


async def verdicts_of(session: AsyncSession, dataset_id: str) -> Sequence[Verdict]:
    return (await session.scalars(select(Verdict).where(Verdict.dataset_id == dataset_id).order_by(Verdict.id))).all()


async def verdict_for(session: AsyncSession, dataset_id: str, model: BaseModelEntry) -> Verdict | None:
    """The verdict on a dataset under a base model at its present revision."""
    return await session.scalar(
        select(Verdict).where(
            Verdict.dataset_id == dataset_id, Verdict.base_model == model.id, Verdict.revision == model.revision
        )
    )


async def change(session: AsyncSession, team_id: str, dataset_id: str, body: ChangeDataset) -> Dataset:
    dataset = await get_owned(session, Dataset, team_id, dataset_id, lock=True)
    if body.name is not UNSET:
        dataset.name = body.name
    if body.description is not UNSET:
        dataset.description = body.description
    await session.flush()
    return dataset


async def delete(session: AsyncSession, who: Principal, dataset_id: str) -> None:
    """Soft. Raises Conflict while a job on it is unfinished."""
    dataset = await get_owned(session, Dataset, who.team_id, dataset_id, lock=True)
    busy = exists().where(TrainingJob.dataset_id == dataset_id, TrainingJob.status.in_(UNFINISHED))
    if await session.scalar(select(busy)):
        raise Conflict(
            "A job on this dataset is unfinished. Cancel it (POST /api/jobs/{id}/cancel) or wait for its end."
        )
    dataset.deleted_at = now()
    audit(session, "delete", "dataset", dataset_id, user_id=who.user_id, team_id=who.team_id)
    await session.flush()


async def is_uploading(session: AsyncSession, dataset_id: str) -> bool:
    status = await session.scalar(select(Dataset.status).where(Dataset.id == dataset_id, Dataset.deleted_at.is_(None)))
    return status is DatasetStatus.UPLOADING


async def set_sha256(session: AsyncSession, dataset_id: str, sha256: str) -> None:
    """Of the file as it was uploaded."""
    await session.execute(
        update(Dataset).where(Dataset.id == dataset_id, Dataset.status == DatasetStatus.UPLOADING).values(sha256=sha256)
    )


async def confirm(
    session: AsyncSession, team_id: str, dataset_id: str, size: int | None, catalog: Catalog
) -> tuple[Dataset, Verdict]:
    """The file is there (``size`` bytes): its examination is queued. Raises Conflict, PayloadTooLarge."""
    dataset = await get_owned(session, Dataset, team_id, dataset_id, lock=True)
    if dataset.status is not DatasetStatus.UPLOADING:
        raise Conflict(f"The dataset is {dataset.status}: its upload was confirmed before")
    if size is None:
        raise Conflict("Nothing was uploaded: PUT the file to the uploadUrl that POST /api/datasets answered")
    if size == 0:
        raise Conflict("The uploaded file is empty: PUT it again")
    if size > dataset.file_size:
        raise PayloadTooLarge(f"The file has {size} bytes, more than the declared fileSize of {dataset.file_size}")
    dataset.file_size = size
    dataset.uploaded_at = now()
    return dataset, await _queue_verdict(session, dataset, catalog.base_model(dataset.base_model), catalog)


async def validate(
    session: AsyncSession, team_id: str, dataset_id: str, base_model: str, catalog: Catalog
) -> tuple[Dataset, Verdict]:
    """Queue the examination under a base model, unless it has been made or is under way. One that failed is redone."""
    model = catalog.base_model(base_model)
    dataset = await get_owned(session, Dataset, team_id, dataset_id, lock=True)
    if dataset.status is DatasetStatus.UPLOADING:
        raise Conflict(f"The upload is not confirmed: POST /api/datasets/{dataset_id}/confirm")
    verdict = await verdict_for(session, dataset_id, model)
    if verdict is not None:
        if verdict.status in UNFINISHED or verdict.status is Status.COMPLETED:
            return dataset, verdict
        await session.delete(verdict)
        await session.flush()
    return dataset, await _queue_verdict(session, dataset, model, catalog)


async def _queue_verdict(session: AsyncSession, dataset: Dataset, model: BaseModelEntry, catalog: Catalog) -> Verdict:
    verdict = Verdict(
        team_id=dataset.team_id,
        dataset_id=dataset.id,
        base_model=model.id,
        revision=model.revision,
        max_seq_length=min(model.context_length, catalog.limits["maxSeqLength"].default),
    )
    session.add(verdict)
    if dataset.base_model == model.id:
        dataset.status = DatasetStatus.VALIDATING
        dataset.training_ready = False
        dataset.error_message = None
    await session.flush()
    return verdict


async def findings(
    session: AsyncSession, team_id: str, dataset_id: str, base_model: str | None
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Counts by code, and the listed findings, of the verdict under a base model (default: the dataset's own)."""
    dataset = await get_owned(session, Dataset, team_id, dataset_id)
    verdicts = [v for v in await verdicts_of(session, dataset_id) if v.base_model == (base_model or dataset.base_model)]
    newest = verdicts[-1] if verdicts else None
    return (newest and newest.counts) or {}, (newest and newest.findings) or []


async def apply_verdict(session: AsyncSession, verdict: Verdict, report: dict[str, Any] | None) -> None:
    """What a verdict's report means for its dataset; runs in the transaction that records the report or the failure.

    ``report`` is the trainer's; None: the examination itself failed (``verdict.error_code``, ``error_message``).
    Only the verdict under the dataset's own base model moves the dataset.
    """
    dataset = await session.get_one(Dataset, verdict.dataset_id, with_for_update=ROW)
    if report is not None:
        verdict.passed = report["passed"]
        verdict.counts = report["counts"]
        verdict.findings = report["findings"]
        verdict.statistics = report["statistics"]
        verdict.progress = 100.0
    if verdict.base_model == dataset.base_model and dataset.status is DatasetStatus.VALIDATING:
        _judge(dataset, verdict, report)
        await _tell(session, dataset, verdict)
    await session.flush()


def _judge(dataset: Dataset, verdict: Verdict, report: dict[str, Any] | None) -> None:
    dataset.status = DatasetStatus.READY if verdict.passed else DatasetStatus.ERROR
    dataset.training_ready = bool(verdict.passed)
    dataset.validated_at = dataset.processed_at = now()
    if report is None:
        dataset.error_message = verdict.error_message or "The examination could not be made"
        return
    statistics = report["statistics"]
    dataset.format = DatasetFormat(report["format"]) if report["format"] else None
    dataset.total_training_pairs = statistics["trainingConversations"]
    dataset.total_validation_pairs = statistics["validationConversations"]
    dataset.total_tokens = statistics["tokens"]
    dataset.avg_turns_per_conversation = statistics["avgTurnsPerConversation"]
    dataset.avg_tokens_per_turn = statistics["avgTokensPerTurn"]
    dataset.sample_data = report["sample"]
    dataset.validation_errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    errors = {finding["code"] for finding in dataset.validation_errors}
    wrong = sum(count for code, count in report["counts"].items() if code in errors)
    dataset.error_message = None if verdict.passed else f"{wrong} errors: {', '.join(sorted(errors))}"


async def _tell(session: AsyncSession, dataset: Dataset, verdict: Verdict) -> None:
    ready = dataset.status is DatasetStatus.READY
    await notify(
        session,
        user_id=dataset.created_by,
        team_id=dataset.team_id,
        type=NotificationType.DATASET_READY,
        title=f"Dataset {'ready' if ready else 'refused'}: {dataset.name}",
        message="It can be trained on." if ready else dataset.error_message or "",
        action_url=f"/datasets/{dataset.id}",
        details={"datasetId": dataset.id, "status": dataset.status, "baseModel": verdict.base_model},
        dedupe_key=f"{NotificationType.DATASET_READY}:{verdict.id}:{dataset.created_by}",
    )
