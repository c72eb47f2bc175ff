"""What a job will take and cost, before it starts: steps exactly, speed from the catalog or from like jobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import quantiles
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import charge, usd
from control_plane.schemas.base import MoneyRange, Range
from control_plane.schemas.jobs import Estimate
from control_plane.services.catalog import BaseModelEntry, GpuType
from control_plane.states import Status
from control_plane.tables import TrainingJob
from trainer.config import Hyperparameters

VERDICT_FRACTION = 0.1
"""The validation fraction with which the verdict counts; with another one the count here is an expectation."""
LIKE_JOBS = 3
"""From so many completed jobs on, their measured speed replaces the catalog's."""
UNMEASURED = (0.6, 1.0, 1.4)
"""Speed as a multiple of the catalog's that 10, 50 and 90 of 100 jobs stay at or below, until there are such jobs."""
SAVE_BYTES_PER_S = 100e6
SAVE_S = 1.0
TOKENIZER_BYTES = 4_000_000
CHECKPOINTS_KEPT = 3
STORAGE_DAYS = 30
GIB = 1024**3


class Figures(msgspec.Struct, frozen=True, rename="camel"):
    """What an estimate needs of a verdict's statistics."""

    conversations: int
    tokens: int
    learned_tokens: int
    validation_conversations: int
    """Held out when a job takes ``VERDICT_FRACTION``: by the file's own split, the rest by content."""


class Plan(msgspec.Struct, frozen=True):
    """Known before the start: steps, and the tokens that go through the model."""

    steps: int
    epochs: int
    training_tokens: float
    evaluated_tokens: float
    """Forward only: before training, at every evaluation, and at the end."""
    saves: int
    mean_tokens: float
    """A conversation's, after truncation."""
    learned_share: float


class Shape(msgspec.Struct, frozen=True):
    """FLOPs a token, and the adapter's size."""

    training: float
    forward: float
    adapter_parameters: float


def plan(figures: Figures, h: Hyperparameters) -> Plan:
    """Steps are exact: min(maxSteps, numEpochs × ⌈training conversations / batchSize⌉)."""
    validation = figures.validation_conversations
    if h.validation_fraction != VERDICT_FRACTION:
        validation = min(round(figures.conversations * h.validation_fraction), figures.conversations - 1)
    training = max(1, figures.conversations - validation)
    an_epoch = math.ceil(training / h.batch_size)
    steps = h.num_epochs * an_epoch
    if h.max_steps is not None:
        steps = min(steps, h.max_steps)
    mean = min(figures.tokens / max(1, figures.conversations), h.max_seq_length)
    evaluations = 2 + (steps - 1) // (h.eval_steps or an_epoch)
    return Plan(
        steps=steps,
        epochs=h.num_epochs,
        training_tokens=steps / an_epoch * training * mean,
        evaluated_tokens=evaluations * validation * mean,
        saves=2 + (steps - 1) // (h.checkpoint_steps or an_epoch),
        mean_tokens=mean,
        learned_share=figures.learned_tokens / max(1, figures.tokens),
    )


def shape(model: BaseModelEntry, h: Hyperparameters, mean_tokens: float, learned_share: float) -> Shape:
    """4N + 4fH + 6P + 3A a trained token: frozen weights need no weight gradient, logits stand only where loss is.

    N body weights, H head, f share of learned tokens, P adapter weights, A causal attention.
    """
    head = model.vocabulary_size * model.hidden_size
    body = max(model.parameters - head, 0)
    attention = 2 * model.layers * model.hidden_size * mean_tokens
    adapter = adapter_parameters(model, body, h)
    return Shape(
        training=4 * body + 4 * learned_share * head + 6 * adapter + 3 * attention,
        forward=2 * body + 2 * learned_share * head + 2 * adapter + attention,
        adapter_parameters=adapter,
    )


def adapter_parameters(model: BaseModelEntry, body: float, h: Hyperparameters) -> float:
    """rank × (in + out) of each target; widths that the catalog does not tell follow from the body's size."""
    hidden, key_value = model.hidden_size, model.hidden_size / 3
    a_layer = body / max(1, model.layers)
    inner = max(hidden, (a_layer - 2 * hidden * (hidden + key_value)) / (3 * hidden))
    widths = {
        "q_proj": hidden + hidden,
        "o_proj": hidden + hidden,
        "k_proj": hidden + key_value,
        "v_proj": hidden + key_value,
    }
    return h.lora_rank * model.layers * sum(widths.get(target, hidden + inner) for target in h.target_modules)


def speeds(measured: Sequence[float], gpu: GpuType, training_flops: float) -> Range:
    """Tokens per second of one GPU: quantiles of like jobs, or what the catalog's TFLOPS give."""
    if len(measured) >= LIKE_JOBS:
        tenths = quantiles(measured, n=10, method="inclusive")
        return Range(p10=tenths[0], p50=tenths[4], p90=tenths[8])
    rate = gpu.tflops * 1e12 / max(training_flops, 1.0)
    low, middle, high = (rate * f for f in UNMEASURED)
    return Range(p10=low, p50=middle, p90=high)


def estimate(
    figures: Figures,
    model: BaseModelEntry,
    h: Hyperparameters,
    gpu: GpuType,
    gpu_count: int,
    measured: Sequence[float],
    microusd_per_hour: int,
    storage_microusd_per_gib_month: int,
) -> tuple[Estimate, int, int]:
    """The estimate, its middle and its upper (held) compute cost in micro-dollars.

    ``measured``: tokens/s of completed jobs on the same GPU type and base model, per GPU.
    """
    planned = plan(figures, h)
    per_token = shape(model, h, planned.mean_tokens, planned.learned_share)
    speed = speeds(measured, gpu, per_token.training)
    equivalent = planned.training_tokens + planned.evaluated_tokens * per_token.forward / max(per_token.training, 1.0)
    checkpoint_bytes = per_token.adapter_parameters * 12
    overhead = gpu.load_seconds + planned.saves * (SAVE_S + checkpoint_bytes / SAVE_BYTES_PER_S)
    duration = Range(
        p10=overhead * 0.7 + equivalent / (speed.p90 * gpu_count),
        p50=overhead + equivalent / (speed.p50 * gpu_count),
        p90=overhead * 1.5 + equivalent / (speed.p10 * gpu_count),
    )
    compute = [
        charge(math.ceil(s * 1000) * gpu_count, microusd_per_hour) for s in (duration.p10, duration.p50, duration.p90)
    ]
    kept = per_token.adapter_parameters * 4 + TOKENIZER_BYTES + CHECKPOINTS_KEPT * checkpoint_bytes
    storage = round(kept / GIB * storage_microusd_per_gib_month * STORAGE_DAYS / 30)
    made = Estimate(
        compute_cost=_money(compute),
        storage_cost=_money([storage] * 3),
        total_cost=_money([c + storage for c in compute]),
        duration_s=_rounded(duration, 1),
        tokens_per_s=_rounded(
            Range(p10=speed.p10 * gpu_count, p50=speed.p50 * gpu_count, p90=speed.p90 * gpu_count), 1
        ),
    )
    return made, compute[1], compute[2]


async def measured_speeds(session: AsyncSession, gpu_type: str, base_model: str) -> list[float]:
    """Tokens per second and GPU of the newest completed jobs on this GPU type and base model."""
    rows = await session.execute(
        select(TrainingJob.result, TrainingJob.gpu_count)
        .where(
            TrainingJob.status == Status.COMPLETED,
            TrainingJob.gpu_type == gpu_type,
            TrainingJob.base_model == base_model,
        )
        .order_by(TrainingJob.id.desc())
        .limit(50)
    )
    found: list[tuple[dict[str, Any] | None, int]] = [(result, count) for result, count in rows]
    speeds = [(((result or {}).get("trained") or {}).get("tokensPerS"), count) for result, count in found]
    return [speed / count for speed, count in speeds if speed]


def _money(amounts: Sequence[int]) -> MoneyRange:
    return MoneyRange(p10=usd(amounts[0]), p50=usd(amounts[1]), p90=usd(amounts[2]))


def _rounded(value: Range, digits: int) -> Range:
    return Range(p10=round(value.p10, digits), p50=round(value.p50, digits), p90=round(value.p90, digits))
