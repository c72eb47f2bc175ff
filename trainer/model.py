"""The base model, frozen, and its loss on packed documents that do not see one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from trainer.data import Packed
from trainer.errors import TrainerError

ATTENTION = "brightrun_documents"
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}
"""Tokens a forward pass, unless one document is longer."""


def load(folder: Path, device: torch.device, precision: str) -> nn.Module:
    """The frozen base in ``bf16`` or ``fp32``, on the device. Raises TrainerError MODEL_REFUSED."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise TrainerError(
            "MODEL_REFUSED", f"The base model cannot be loaded: {error}", "Choose a causal language model."
        ) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.to(device)


def negative_log_likelihood(model: nn.Module, packed: Packed) -> Tensor:
    """Sum over the learned tokens, in nats. Logits are made only where there is something to learn."""
    logits = model(
        input_ids=packed.ids,
        position_ids=packed.position_ids,
        logits_to_keep=packed.positions,
        use_cache=False,
        lengths=packed.lengths,
    ).logits
    return F.cross_entropy(logits[0].float(), packed.targets, reduction="sum")


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of ``lengths`` tokens; without them, of the newest tokens to all before them.

    ``query`` is (1, heads, T, width), ``key`` and ``value`` may have fewer heads; returns (1, T, heads, width).
    """
    if unsupported.get("softcap") is not None or unsupported.get("s_aux") is not None:
        raise TrainerError("MODEL_REFUSED", "The base model's attention (soft cap or sinks) is not supported.")
    total = key.shape[2]
    outputs = []
    for start, length in _segments(lengths or [total]):
        keys, values = key[:, :, start : start + length], value[:, :, start : start + length]
        queries = query[:, :, start : start + length]
        window = sliding_window is not None and length > sliding_window
        outputs.append(
            F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=_window(queries.shape[2], length, sliding_window or 0, query.device) if window else None,
                is_causal=not window and queries.shape[2] > 1,
                dropout_p=dropout if module.training else 0.0,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _segments(lengths: list[int]) -> list[tuple[int, int]]:
    start, segments = 0, []
    for length in lengths:
        segments.append((start, length))
        start += length
    return segments


def _window(queries: int, keys: int, width: int, device: torch.device) -> Tensor:
    ahead = torch.arange(keys, device=device)[None, :] - torch.arange(keys - queries, keys, device=device)[:, None]
    return (ahead <= 0) & (ahead > -width)


AttentionInterface.register(ATTENTION, document_attention)
