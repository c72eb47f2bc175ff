"""Tokenised conversations on disk, and how some of them are packed into one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from trainer.chat import Chat
from trainer.config import TrainConfig
from trainer.control import StopRequest
from trainer.errors import TrainerError
from trainer.findings import Finding
from trainer.formats import Conversation, Message, Parsed, read
from trainer.splits import Digests

CHUNK_ROWS = 256
NAMED_DEFECTS = 5


class Prompt(NamedTuple):
    """The start of a validation conversation, up to where the assistant first speaks, and what it said there."""

    messages: list[Message]
    reference: str


class Corpus(NamedTuple):
    """All conversations as tokens (``ids``, ``learned``), memory-mapped, and which of them serve what."""

    documents: Dataset
    train: np.ndarray
    validation: np.ndarray
    prompts: list[Prompt]
    cut: int
    """Conversations that were longer than ``max_seq_length``, and the tokens cut from their ends."""
    cut_tokens: int


class Packed(NamedTuple):
    """Documents side by side in one row of T tokens, for one forward pass.

    ``targets`` (M) are the tokens to be predicted, ``positions`` (M) the places just before them; a document's
    positions count from 0 and attention stays within its ``lengths``.
    """

    ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    positions: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def learned(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Packed:
        ids, position_ids, positions, targets = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.ids, self.position_ids, self.positions, self.targets)
        )
        return Packed(ids, position_ids, self.lengths, positions, targets)


def prepare(config: TrainConfig, chat: Chat, stop: StopRequest) -> Corpus:
    """Tokenise the dataset into ``work_dir`` (private: it holds the tenant's text) and split it.

    Raises TrainerError BAD_DATA for a dataset that a verdict would refuse, NOTHING_TO_LEARN for one whose
    conversations have nothing to learn within ``max_seq_length``; Stopped on request.
    """
    file = Path(config.work_dir) / "documents.arrow"
    digests = Digests()
    cut = cut_tokens = 0
    with ArrowWriter(features=_FEATURES, path=str(file)) as writer:
        for rows in _chunks(_rows(config)):
            stop.check()
            conversations = [_sound(row) for row in rows]
            for conversation, document in zip(conversations, chat.encode(conversations), strict=True):
                if isinstance(document, Finding):
                    raise _refused([document])
                writer.write({"ids": document.ids, "learned": document.learned})
                digests.add(conversation.digest(), conversation.line, conversation.split)
                cut += document.length > len(document.ids)
                cut_tokens += document.length - len(document.ids)
        writer.finalize()
    held_out = digests.validation(config.hyperparameters.validation_fraction)
    train, validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not len(train):
        raise TrainerError("BAD_DATA", "No conversation is left to train on.", "Put some into the split train.")
    lines = digests.lines[validation[: config.sample_prompts]].tolist()
    documents = Dataset.from_file(str(file)).with_format("numpy")
    return Corpus(documents, train, validation, _prompts(config, lines), cut, cut_tokens)


def pack(documents: Dataset, rows: Sequence[int] | np.ndarray, budget: int) -> list[Packed]:
    """The conversations of ``rows`` in as few passes of at most ``budget`` tokens as first-fit-decreasing finds.

    One that is longer than the budget gets a pass of its own.
    """
    entries = [documents[int(row)] for row in rows]
    bins: list[list[dict[str, np.ndarray]]] = []
    room: list[int] = []
    for entry in sorted(entries, key=lambda entry: -len(entry["ids"])):
        size = len(entry["ids"])
        place = next((index for index, free in enumerate(room) if free >= size), None)
        if place is None:
            bins.append([])
            room.append(max(budget, size))
            place = len(bins) - 1
        bins[place].append(entry)
        room[place] -= size
    return [_packed(entries) for entries in bins]


_FEATURES = Features({"ids": List(Value("int32")), "learned": List(Value("bool"))})


def _packed(entries: list[dict[str, np.ndarray]]) -> Packed:
    ids = np.concatenate([entry["ids"] for entry in entries]).astype(np.int64)
    learned = np.flatnonzero(np.concatenate([entry["learned"] for entry in entries]))
    lengths = [len(entry["ids"]) for entry in entries]
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    return Packed(
        torch.from_numpy(ids)[None],
        torch.from_numpy(position_ids)[None],
        lengths,
        torch.from_numpy(learned - 1),
        torch.from_numpy(ids[learned]),
    )


def _rows(config: TrainConfig) -> Iterator[Parsed]:
    path = Path(config.dataset_path)
    with path.open("rb") as file:
        yield from read(file, path.stat().st_size, config.dataset_format)


def _chunks(rows: Iterable[Parsed]) -> Iterator[list[Parsed]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


def _sound(row: Parsed) -> Conversation:
    if row.conversation is None:
        raise _refused(row.findings)
    return row.conversation


def _prompts(config: TrainConfig, lines: list[int]) -> list[Prompt]:
    prompts: list[Prompt] = []
    wanted = set(lines)
    for row in _rows(config) if wanted else ():
        if row.line in wanted and row.conversation:
            messages = row.conversation.messages
            first = next(index for index, message in enumerate(messages) if message.role == "assistant")
            prompts.append(Prompt(list(messages[:first]), messages[first].content))
            if len(prompts) == len(wanted):
                break
    return prompts


def _refused(findings: list[Finding]) -> TrainerError:
    named = "; ".join(f"line {found.line}: {found.code} {found.found}" for found in findings[:NAMED_DEFECTS])
    code = "NOTHING_TO_LEARN" if findings[0].code == "NOTHING_TO_LEARN" else "BAD_DATA"
    return TrainerError(code, f"The dataset cannot be trained on: {named}.", findings[0].advice)
