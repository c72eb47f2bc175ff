"""Real two-person conversations (``chitchat-dataset``, MIT) as BRIGHTRUN_LORA_V4 rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import groupby
from typing import Any

VALIDATION_SHARE = 8
"""One conversation in so many validates."""


def conversations() -> Iterator[dict[str, Any]]:
    """All that end with an answer, in the package's order, each content once.

    Who speaks first is the user. What a conversation says decides its split, so that no content is in both.
    """
    seen: set[str] = set()
    source = json.loads(files("chitchat_dataset").joinpath("dataset.json").read_text())
    for name, conversation in source.items():
        turns = _turns(conversation["messages"])
        digest = hashlib.sha256(json.dumps(turns).encode()).hexdigest()
        if turns and digest not in seen:
            seen.add(digest)
            split = "validation" if int(digest, 16) % VALIDATION_SHARE == 0 else "train"
            yield {"conversation_id": name, "turns": turns, "split": split}


def _turns(groups: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Alternating turns, the last one the assistant's; empty when there is no such conversation."""
    said = [(message["sender"], message["text"].strip()) for group in groups for message in group]
    merged = [
        (sender, "\n".join(text for _, text in run))
        for sender, run in groupby((one for one in said if one[1]), key=lambda one: one[0])
    ]
    if len({sender for sender, _ in merged}) != 2:
        return []
    roles = ("user", "assistant")
    whole = merged[: len(merged) // 2 * 2]
    return [{"role": roles[place % 2], "content": text} for place, (_, text) in enumerate(whole)]
