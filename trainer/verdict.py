"""The verdict on a dataset, before any GPU time is spent: every defect, and what there is to learn. Torch-free.

``examine`` streams the file once. It keeps 24 bytes a conversation for duplicates and 4 for lengths, and the first
findings of each code; everything else is counted.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainer.base import context_length, prepare_base
from trainer.chat import Chat, Document
from trainer.config import VerdictConfig
from trainer.control import StopRequest
from trainer.findings import CODES, Finding, finding
from trainer.formats import Conversation, Parsed, Reading, read
from trainer.protocol import Finished, Phase, Progress, Verdict
from trainer.report import Report
from trainer.splits import TRAIN, Digests

MAX_REPORT_BYTES = 2**22
"""Room for 100 findings of every code."""
FEW = 10
BATCH_CHARACTERS = 2**20
SAMPLE_CONVERSATIONS = 3
SAMPLE_CHARACTERS = 8000
VALIDATION_FRACTION = 0.1
"""Counted with the fraction that a job takes unless it says otherwise."""


def examine(config: VerdictConfig, report: Report, stop: StopRequest) -> Finished:
    """Examine ``config.dataset_path``; report ``Progress`` and, unless stopped, the ``Verdict``.

    The report: ``format``, ``container``, ``passed``, ``counts {code: n}``, ``findings [Finding]``, ``statistics``,
    ``sample``. Raises TrainerError when the base model cannot be used.
    """
    report(Phase(name="loading"))
    folder = prepare_base(config.base_model, config.cache_dir, weights=False)
    chat = Chat(folder, context_length(folder, config.max_seq_length))
    path = Path(config.dataset_path)
    tally = Tally(chat, config.max_listed)
    report(Phase(name="evaluating"))
    with path.open("rb") as file:
        reading = read(file, path.stat().st_size, config.dataset_format)
        said = 0
        for batch in _batches(reading):
            if stop.reason:
                return Finished(outcome="stopped", reason=stop.reason)
            tally.add(batch)
            if (percent := int(99 * reading.fraction)) > said:
                said = percent
                report(Progress(percent=float(percent)))
        report(Verdict(report=tally.result(reading)))
    report(Progress(percent=100.0))
    return Finished(outcome="completed")


class Tally:
    """Everything that the report is made of, fed batch by batch."""

    def __init__(self, chat: Chat, max_listed: int) -> None:
        self.chat = chat
        self.max_listed = max_listed
        self.counts: Counter[str] = Counter()
        self.listed: defaultdict[str, list[Finding]] = defaultdict(list)
        self.ids = Digests()
        self.contents = Digests()
        self.sizes: Counter[str] = Counter()
        self.lengths = array("I")
        self.over: Counter[str] = Counter()
        self.sample: list[dict[str, Any]] = []

    def note(self, found: Finding) -> None:
        self.counts[found.code] += 1
        if len(self.listed[found.code]) < self.max_listed:
            self.listed[found.code].append(found)

    def add(self, batch: list[Parsed]) -> None:
        """Count one batch of rows, the sound ones under the chat template."""
        for parsed in batch:
            for found in parsed.findings:
                self.note(found)
            if parsed.id is not None:
                self.ids.add(blake2b(parsed.id.encode(), digest_size=16).digest(), parsed.line)
        sound = [parsed.conversation for parsed in batch if parsed.conversation]
        for conversation, document in zip(sound, self.chat.encode(sound), strict=True):
            self._remember(conversation)
            if isinstance(document, Finding):
                self.note(document)
            else:
                self._measure(conversation, document)

    def result(self, reading: Reading) -> dict[str, Any]:
        """The report; cross-row findings are made here."""
        self._compare()
        if self.sizes["conversations"] < FEW:
            self.note(finding(0, "", "FEW_CONVERSATIONS", f"{self.sizes['conversations']} conversations"))
        whole = {
            "format": reading.format,
            "container": reading.container,
            "passed": not any(CODES[code].severity == "error" for code in self.counts),
            "counts": dict(self.counts),
            "statistics": self._statistics(),
            "sample": self.sample,
        }
        return _bounded(whole, self.listed)

    def _remember(self, conversation: Conversation) -> None:
        self.contents.add(conversation.digest(), conversation.line, conversation.split)
        self.sizes.update({"conversations": 1, "turns": len(conversation.messages)})

    def _measure(self, conversation: Conversation, document: Document) -> None:
        self.lengths.append(document.length)
        self.sizes.update({"tokens": document.length, "learned": document.learned_length})
        if len(self.sample) < SAMPLE_CONVERSATIONS:
            self.sample.append(_shown(conversation, document))
        lost = document.length - len(document.ids)
        if lost > 0:
            self.over.update(
                {"conversations": 1, "tokens": lost, "learned": document.learned_length - sum(document.learned)}
            )
            found = f"{document.length} tokens, {lost} past the limit of {self.chat.limit}"
            self.note(finding(conversation.line, "", "OVER_CONTEXT", found))

    def _compare(self) -> None:
        for line, first in self.ids.repeats():
            self.note(finding(line, "/conversation_id", "DUPLICATE_ID", f"the id of line {first}"))
        held_out = self.contents.validation(VALIDATION_FRACTION)
        self.sizes["validation"] = int(held_out.sum())
        overlap = self.contents.lines[held_out & (self.contents.labels == TRAIN)]
        for line in overlap:
            self.note(finding(int(line), "", "SPLIT_OVERLAP", "also in the validation split"))
        overlapping = set(overlap.tolist())
        for line, first in self.contents.repeats():
            if line not in overlapping:
                self.note(finding(line, "", "EXACT_DUPLICATE", f"equal to line {first}"))

    def _statistics(self) -> dict[str, Any]:
        sizes, lengths = self.sizes, np.array(self.lengths, dtype=np.int64)
        p50, p95 = np.percentile(lengths, (50, 95), method="nearest") if len(lengths) else (0, 0)
        return {
            "conversations": sizes["conversations"],
            "trainingConversations": sizes["conversations"] - sizes["validation"],
            "validationConversations": sizes["validation"],
            "turns": sizes["turns"],
            "tokens": sizes["tokens"],
            "learnedTokens": sizes["learned"],
            "avgTurnsPerConversation": _ratio(sizes["turns"], sizes["conversations"]),
            "avgTokensPerTurn": _ratio(sizes["tokens"], sizes["turns"]),
            "lengthHistogram": _histogram(lengths),
            "p50": int(p50),
            "p95": int(p95),
            "max": int(lengths.max()) if len(lengths) else 0,
            "overContext": {
                "limit": self.chat.limit,
                "conversations": self.over["conversations"],
                "tokensLost": self.over["tokens"],
                "learnedTokensLost": self.over["learned"],
            },
        }


def _batches(rows: Iterable[Parsed]) -> Iterator[list[Parsed]]:
    batch: list[Parsed] = []
    weight = 0
    for parsed in rows:
        batch.append(parsed)
        messages = parsed.conversation.messages if parsed.conversation else ()
        weight += 1000 + sum(len(message.content) for message in messages)
        if weight >= BATCH_CHARACTERS:
            yield batch
            batch, weight = [], 0
    yield batch


def _shown(conversation: Conversation, document: Document) -> dict[str, Any]:
    """A conversation for people: the rendered text in pieces, learned or not."""
    pieces: list[dict[str, Any]] = []
    position = 0
    for start, end in [*document.spans, (len(document.text), len(document.text))]:
        pieces += [{"text": document.text[position:start], "learned": False}]
        pieces += [{"text": document.text[start:end], "learned": True}]
        position = end
    left = SAMPLE_CHARACTERS
    shown = []
    for piece in pieces:
        if piece["text"] and left > 0:
            shown.append({**piece, "text": piece["text"][:left]})
            left -= len(piece["text"])
    return {
        "line": conversation.line,
        "id": conversation.id,
        "split": conversation.split,
        "turns": len(conversation.messages),
        "tokens": document.length,
        "learnedTokens": document.learned_length,
        "pieces": shown,
        "cut": left < 0,
    }


def _histogram(lengths: np.ndarray[Any, Any]) -> list[dict[str, int]]:
    """Counts between powers of two: ``from`` ≤ length < ``to``."""
    if not len(lengths):
        return []
    top = int(lengths.max()).bit_length()
    bottom = max(int(lengths.min()).bit_length() - 1, 0)
    counts, edges = np.histogram(lengths, bins=[2**n for n in range(bottom, top + 1)])
    return [
        {"from": int(low), "to": int(high), "count": int(count)}
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 2) if whole else 0.0


def _bounded(whole: dict[str, Any], listed: dict[str, list[Finding]]) -> dict[str, Any]:
    """Add the findings, fewer of each code if the report would be too large."""
    most = max((len(found) for found in listed.values()), default=0)
    while True:
        kept = sorted((f for found in listed.values() for f in found[:most]), key=lambda f: (f.line, f.pointer))
        whole["findings"] = msgspec.to_builtins(kept)
        if most <= 1 or len(msgspec.json.encode(whole)) <= MAX_REPORT_BYTES:
            return whole
        most //= 2
