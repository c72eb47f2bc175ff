"""What the trainer is told: one JSON file, read once. Torch-free, so that the control plane may import it.

Paths are local; nothing here names a database, an object store, a tenant or a Ray cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Scheduler = Literal["linear", "cosine", "constant"]
Precision = Literal["bf16", "fp32"]
Quantization = Literal["none", "4bit"]


class Hyperparameters(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """The full resolved set of a run. Wire names are camelCase; bounds stand in ``configs/presets/limits.yaml``.

    ``batch_size`` counts conversations per optimiser step, whatever the number of ranks and however they are packed.
    ``eval_steps`` and ``checkpoint_steps`` are intervals in optimiser steps; 0 means at the end of each epoch.
    """

    learning_rate: float
    batch_size: int
    num_epochs: int
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    max_steps: int | None = None
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    max_seq_length: int = 2048
    warmup_ratio: float = 0.03
    lr_scheduler: Scheduler = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_steps: int = 0
    checkpoint_steps: int = 0
    validation_fraction: float = 0.1
    early_stopping: int | None = None
    seed: int = 42
    precision: Precision = "bf16"
    quantization: Quantization = "none"
    use_rslora: bool = False


class BaseModelSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a base model comes from.

    ``hub``: ``location`` is a Hugging Face repository id and ``revision`` is required.
    ``folder``: ``location`` is a local folder in transformers' layout.
    ``gguf``: ``location`` is a ``.gguf`` file, or ``package:NAME/FILE`` inside an installed Python package;
    it is dequantised once into the cache.
    """

    kind: Literal["hub", "folder", "gguf"]
    location: str
    revision: str = "main"


class BaseModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A base model as an adapter will name it (``id``, ``revision``), and where to read it."""

    id: str
    revision: str
    source: BaseModelSource


class World(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This rank's place in the gang; ``init_method`` is torch.distributed's (``tcp://host:port``)."""

    rank: int = 0
    size: int = 1
    init_method: str | None = None


class _Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    base_model: BaseModel
    dataset_path: str
    """The uploaded file, exactly as the user sent it."""
    dataset_format: str | None = None
    """The format that the user stated or the verdict found; None: recognise it."""
    work_dir: str
    """Private scratch folder of this attempt."""
    cache_dir: str
    """Shared between attempts on a node: prepared base models."""
    threads: int = 1


class TrainConfig(_Task, frozen=True, tag_field="kind", tag="train", kw_only=True):
    """One execution (attempt) of one training job on one rank."""

    job_id: str
    attempt: int
    name: str
    """The job's name, for the model card."""
    hyperparameters: Hyperparameters
    output_dir: str
    """Finished folders appear here: ``checkpoints/a{attempt}-s{step}/`` and ``adapter/``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume_from: str | None = None
    """A whole checkpoint folder (manifest verified by the reader again)."""
    parent_adapter: str | None = None
    """An adapter folder to start the weights from (training on from a model)."""
    world: World = World()
    sample_prompts: int = 1
    """How many validation prompts are answered before and after training."""


class VerdictConfig(_Task, frozen=True, tag_field="kind", tag="verdict", kw_only=True):
    """One examination of one dataset against one base model."""

    max_seq_length: int = 2048
    max_listed: int = 100
    """Findings listed for each code; all are counted."""


Config = TrainConfig | VerdictConfig


def load(path: Path) -> Config:
    """Read a config file. Raises ``msgspec.ValidationError`` naming the field."""
    return msgspec.json.decode(path.read_bytes(), type=Config)


def dump(config: Config) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config), indent=2)
