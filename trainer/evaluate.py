"""How good the model is: loss on the validation conversations, and answers to their first questions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from trainer.chat import Chat
from trainer.control import StopRequest
from trainer.data import Corpus, pack
from trainer.formats import Message
from trainer.model import negative_log_likelihood

MAX_NEW_TOKENS = 48
MAX_PROMPT_TOKENS = 1024
GROUP = 64
"""Conversations read and packed together."""
MAX_PERPLEXITY_NATS = 700.0


class Score(NamedTuple):
    """``loss`` in nats per learned token, over ``tokens`` tokens read."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, MAX_PERPLEXITY_NATS))


@torch.no_grad()
def validation_loss(
    model: torch.nn.Module, corpus: Corpus, budget: int, device: torch.device, stop: StopRequest
) -> Score:
    """Mean loss over the learned tokens of all validation conversations. Raises Stopped on request."""
    model.eval()
    total, learned, tokens = 0.0, 0, 0
    for rows in np.split(corpus.validation, range(GROUP, len(corpus.validation), GROUP)):
        for packed in pack(corpus.documents, rows, budget):
            stop.check()
            total += negative_log_likelihood(model, packed.to(device)).item()
            learned += packed.learned
            tokens += packed.tokens
    return Score(total / learned, tokens)


def samples(
    model: torch.nn.Module, chat: Chat, corpus: Corpus, stop_ids: set[int], device: torch.device, stop: StopRequest
) -> list[dict[str, Any]]:
    """Greedy answers to the corpus's prompts: ``prompt``, ``answer``, ``reference``. Raises Stopped on request."""
    model.eval()
    return [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "answer": answer(model, chat, prompt.messages, stop_ids, device, stop),
            "reference": prompt.reference,
        }
        for prompt in corpus.prompts
    ]


@torch.no_grad()
def answer(
    model: torch.nn.Module,
    chat: Chat,
    messages: list[Message],
    stop_ids: set[int],
    device: torch.device,
    stop: StopRequest,
) -> str:
    """What the model says next, at most ``MAX_NEW_TOKENS`` tokens, always the likeliest one."""
    ids = chat.prompt_ids(messages)[-MAX_PROMPT_TOKENS:]
    cache = DynamicCache()
    written: list[int] = []
    for _ in range(MAX_NEW_TOKENS):
        stop.check()
        seen = cache.get_seq_length()
        new = torch.tensor([ids[seen:] + written[max(0, seen - len(ids)) :]], device=device)
        places = torch.arange(seen, seen + new.shape[1], device=device)[None]
        logits = model(
            input_ids=new, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        token = int(logits[0, -1].argmax())
        if token in stop_ids:
            break
        written.append(token)
    return str(chat.tokenizer.decode(written)).strip()
