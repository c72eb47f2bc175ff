"""Datasets and their verdicts on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from control_plane.schemas.base import In, Name, Out, Pagination, said
from control_plane.states import Status
from control_plane.tables import Dataset, Verdict
from control_plane.tables.work import DatasetFormat, DatasetStatus

MAX_FILE_SIZE = 10 * 1024**3

FileName = Annotated[
    str,
    said(
        "Must be a file's name of 1 to 255 characters, without a path",
        max_length=255,
        pattern=r"^(?!\.{1,2}\Z)[^/\\\x00-\x1f]+\Z",
    ),
]
Description = Annotated[str, Meta(max_length=10_000)]


class CreateDataset(In):
    name: Name
    file_name: FileName
    file_size: Annotated[int, Meta(ge=1, le=MAX_FILE_SIZE)]
    description: Description | None = None
    format: DatasetFormat | None = None
    base_model: str | None = None


class ChangeDataset(In):
    name: Name | UnsetType = UNSET
    description: Description | UnsetType | None = UNSET


class Validate(In):
    base_model: str


class Upload(Out):
    dataset_id: str
    upload_url: str
    upload_method: str
    upload_headers: dict[str, str]


class VerdictOut(Out):
    id: str
    base_model: str
    revision: str
    status: Status
    progress: float
    passed: bool | None
    counts: dict[str, int] | None
    statistics: dict[str, Any] | None
    queue_reason: str | None
    error_code: str | None
    error_message: str | None
    created_at: datetime
    completed_at: datetime | None


class DatasetOut(Out):
    id: str
    team_id: str
    created_by: str
    name: str
    description: str | None
    format: DatasetFormat | None
    status: DatasetStatus
    base_model: str
    file_name: str
    file_size: int
    sha256: str | None
    total_training_pairs: int | None
    total_validation_pairs: int | None
    total_tokens: int | None
    avg_turns_per_conversation: float | None
    avg_tokens_per_turn: float | None
    training_ready: bool
    uploaded_at: datetime | None
    validated_at: datetime | None
    processed_at: datetime | None
    validation_errors: list[Any] | None
    error_message: str | None
    created_at: datetime
    updated_at: datetime
    sample_data: list[Any] | None
    verdicts: list[VerdictOut] | None
    """Findings, sample and verdicts come only with the single dataset; null in lists."""

    @classmethod
    def whole(cls, dataset: Dataset, verdicts: Sequence[Verdict]) -> DatasetOut:
        return cls.of(dataset, verdicts=[VerdictOut.of(v) for v in verdicts])

    @classmethod
    def brief(cls, dataset: Dataset) -> DatasetOut:
        return cls.of(dataset, validation_errors=None, sample_data=None, verdicts=None)


class DatasetData(Out):
    dataset: DatasetOut


class Judged(Out):
    dataset: DatasetOut
    verdict: VerdictOut


class Datasets(Out):
    datasets: list[DatasetOut]
    pagination: Pagination


class Findings(Out):
    counts: dict[str, int]
    errors: list[dict[str, Any]]
    """line, pointer, code, severity, found, advice."""
