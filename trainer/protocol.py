"""What the trainer says and hears: JSON lines over pipes. Torch-free; the rank actor imports it.

Events go out on a private copy of standard output (whatever libraries print goes to standard error), one JSON object
a line, told apart by ``type``. Control messages come in on standard input when the child runs with ``--supervised``;
the end of standard input ends the child at once, so that it can never outlive its rank.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

PhaseName = Literal["loading", "training", "evaluating", "saving"]
StopReason = Literal["CANCEL", "PAUSE", "BUDGET", "PREEMPT"]


class Event(msgspec.Struct, tag_field="type", tag=str.lower, omit_defaults=True, kw_only=True):
    """Base of all events. Steps are optimiser steps done so far; losses are nats per learned token."""


class Phase(Event):
    """What the GPU time goes to from now on; the rank meters it under this kind."""

    name: PhaseName


class Plan(Event):
    """Known once the data is read, before the first step (and again after a resume, with the same figures)."""

    total_steps: int
    total_epochs: int
    train_conversations: int
    validation_conversations: int
    start_step: int = 0
    parameters: int = 0
    trainable_parameters: int = 0


class Metrics(Event):
    """One optimiser step. ``throughput``: real tokens per second since the last report."""

    step: int
    epoch: int
    training_loss: float
    learning_rate: float
    gradient_norm: float | None = None
    throughput: float = 0.0
    tokens: int = 0
    gpu_utilization: float | None = None
    gpu_memory: int | None = None
    """Peak bytes allocated on the device."""


class Evaluation(Event):
    """Validation loss at a step; step 0 is the untouched base model. Comes after the ``Metrics`` of its step."""

    step: int
    epoch: int
    validation_loss: float
    perplexity: float
    tokens: int = 0
    best: bool = False


class Sample(Event):
    """An answer to a validation prompt, before or after training."""

    when: Literal["before", "after"]
    prompt: list[dict[str, str]]
    answer: str
    reference: str = ""


class Checkpoint(Event):
    """A checkpoint folder is whole on local disk (manifest written last)."""

    step: int
    epoch: int
    loss: float
    path: str
    size: int
    sha256: str
    """Of the manifest file, which holds the SHA-256 of every other file."""
    best: bool = False


class Adapter(Event):
    """The finished adapter folder is on local disk."""

    path: str
    size: int
    best_step: int


class Log(Event):
    level: Literal["INFO", "WARNING", "ERROR"]
    message: str
    metadata: dict[str, Any] | None = None


class Verdict(Event):
    """The whole report on a dataset; its shape is ``trainer.verdict``'s, bounded to about 4 MiB."""

    report: dict[str, Any]


class Progress(Event):
    """How far a verdict is, 0 to 100."""

    percent: float


class Beat(Event):
    """Work goes on, though no other event has told so for a while; for whoever watches, not to be kept."""


class Finished(Event):
    """The last event of a child that did what it was asked. ``stopped`` says it obeyed a stop request."""

    outcome: Literal["completed", "stopped"]
    step: int = 0
    reason: StopReason | None = None
    result: dict[str, Any] = {}
    """For training: finalTrainingLoss, finalValidationLoss, perplexity, bestStep, tokens, tokensPerS, before, after."""


class Failed(Event):
    """The last event of a child that could not: the user's or the platform's fault by ``code`` (see ``FAULTS``)."""

    code: str
    message: str
    advice: str = ""
    stack: str = ""


ChildEvent = (
    Phase | Plan | Metrics | Evaluation | Sample | Checkpoint | Adapter | Log | Verdict | Progress | Beat
    | Finished | Failed
)  # fmt: skip

USER_FAULTS = frozenset(
    {"OUT_OF_MEMORY", "NAN_LOSS", "BAD_DATA", "NOTHING_TO_LEARN", "MODEL_UNAVAILABLE", "MODEL_REFUSED", "BAD_CONFIG"}
)
"""Codes after which trying again cannot help; every other code is the platform's fault and is retried."""


class Stop(msgspec.Struct, tag_field="type", tag="stop"):
    """Control message: finish the micro-batch, save a checkpoint, end."""

    reason: StopReason


Control = Stop

MANIFEST = "manifest.json"
"""Last file written into a checkpoint: ``{"files": {name: {"size", "sha256"}}, "step", "epoch"}``."""


def checkpoint_name(attempt: int, step: int) -> str:
    return f"a{attempt}-s{step}"
