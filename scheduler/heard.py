"""What supervisors tell, as types: the child's own events and those that the rank adds; nothing else gets through."""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from scheduler.executor import UpEvent
from trainer.protocol import Evaluation, Failed, Finished, Log, Metrics, Phase, Plan, Progress, Sample, Verdict

log = logging.getLogger(__name__)


class _FromRank(msgspec.Struct, tag_field="type", tag=str.lower, kw_only=True):
    """See ``scheduler.executor.UpEvent``."""


class Pending(_FromRank):
    reason: str = ""


class Started(_FromRank):
    node: str | None = None
    ranks: int = 1
    checkpoint_id: str | None = None
    step: int = 0


class Stored(_FromRank):
    step: int
    epoch: int
    loss: float | None
    key: str
    size: int
    sha256: str
    best: bool = False
    usage: dict[str, dict[str, int]] = {}


class Adapter(_FromRank):
    files: dict[str, dict[str, Any]]
    best_step: int = 0


AnyEvent = (
    Phase | Plan | Metrics | Evaluation | Sample | Log | Verdict | Progress | Finished | Failed
    | Pending | Started | Stored | Adapter
)  # fmt: skip


class Heard(NamedTuple):
    number: int
    at: datetime
    event: AnyEvent


def parse(events: list[UpEvent]) -> list[Heard]:
    """The events that can be understood, in order. One that cannot is logged and left out: it must not hold up the
    others."""
    heard = []
    for up in events:
        try:
            event = msgspec.convert(clean(up.event), AnyEvent)
            heard.append(Heard(up.number, datetime.fromtimestamp(up.at, UTC), event))
        except (msgspec.ValidationError, ValueError, OverflowError) as error:
            log.warning("event %d left out: %s", up.number, error)
    return heard


def clean(value: Any) -> Any:
    """Without what PostgreSQL or JSON cannot hold: NUL and lone surrogates in text, NaN and infinities."""
    match value:
        case str():
            return value.replace("\0", "").encode(errors="replace").decode()
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {clean(key): clean(entry) for key, entry in value.items()}
        case list() | tuple():
            return [clean(entry) for entry in value]
    return value
