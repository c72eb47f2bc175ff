"""What can be wrong with a dataset: stable codes, how grave each is, and how to mend it. Torch-free."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Severity = Literal["error", "warning"]
MAX_FOUND = 120


class Code(NamedTuple):
    severity: Severity
    advice: str


CODES: dict[str, Code] = {
    # The file
    "EMPTY_FILE": Code("error", "Upload a file with at least one conversation."),
    "CORRUPT_FILE": Code("error", "The compressed file is damaged or cut short: compress and upload it again."),
    "FILE_TOO_LARGE": Code("error", "The file unpacks to more than is accepted: split it."),
    "UNSUPPORTED_CONTAINER": Code("error", "Save the data as JSONL (plain or gzip) or as one JSON array."),
    "UNSUPPORTED_FORMAT": Code(
        "error",
        "Convert the rows to one of BRIGHTRUN_LORA_V4, BRIGHTRUN_LORA_V3, OPENAI_MESSAGES, SHAREGPT: for instance "
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.',
    ),
    # The row
    "NOT_UTF8": Code("error", "Save the file as UTF-8."),
    "NOT_JSON": Code("error", "Write one complete JSON object a line; check quotes, commas and brackets."),
    "NOT_OBJECT": Code("error", "A row must be a JSON object, as {…}."),
    "ROW_TOO_LARGE": Code("error", "Split the conversation: a row may have at most 8 MiB and 4,096 messages."),
    "ROW_TOO_DEEP": Code("error", "Flatten the row: at most 64 levels of nesting are accepted."),
    "WRONG_FORMAT": Code(
        "error", "The row does not have the format of the dataset: state another format, or convert it."
    ),
    "MIXED_FORMAT": Code(
        "error", "All rows must have one format: convert this row, or move it to a dataset of its own."
    ),
    "DUPLICATE_ID": Code("error", "Give every conversation an id of its own."),
    "BAD_ID": Code("error", "conversation_id must be a non-empty string or an integer."),
    "BAD_SPLIT": Code("error", 'split must be "train" or "validation", or be left out.'),
    # The conversation
    "MISSING_TURNS": Code("error", "Add the list of turns under the key that the format names."),
    "EMPTY_TURNS": Code("error", "Add at least one user turn and one assistant turn, or remove the row."),
    "TURN_NOT_OBJECT": Code("error", "Every turn must be a JSON object, as {…}."),
    "UNKNOWN_ROLE": Code("error", "Use one of the roles that the format knows: system, user, assistant."),
    "TOOLS_UNSUPPORTED": Code(
        "error", "Tool definitions and calls cannot be trained on: remove them, or put them into text."
    ),
    "ROLE_ORDER": Code(
        "error", "After an optional system turn at the start, user and assistant turns must alternate, user first."
    ),
    "NO_ASSISTANT": Code("error", "Add an assistant turn: its text is what the model learns."),
    "LAST_NOT_ASSISTANT": Code("error", "End the conversation with an assistant turn, or remove the last user turn."),
    "EMPTY_CONTENT": Code("error", "Write the turn's text, or remove the turn."),
    "CONTENT_NOT_STRING": Code("error", "The text of a turn must be a JSON string."),
    "BAD_WEIGHT": Code("error", "weight must be 0 or 1, and stand on assistant turns only."),
    # Under the base model's chat template
    "TEMPLATE_REFUSED": Code("error", "The base model's chat template refuses this conversation: see what was found."),
    "TEMPLATE_ALTERED": Code(
        "error", "The base model's chat template rewrites an assistant turn: remove markup that it treats specially."
    ),
    "NOTHING_TO_LEARN": Code(
        "error",
        "No assistant token is left to learn from: give an assistant turn weight 1, or shorten what precedes it.",
    ),
    # Warnings
    "OVER_CONTEXT": Code("warning", "Tokens past the limit are cut from the end: split or shorten the conversation."),
    "EXACT_DUPLICATE": Code("warning", "The same conversation stands earlier in the file: it will count twice."),
    "SPLIT_OVERLAP": Code(
        "warning", "The same conversation is in training and in validation: it will be used for validation only."
    ),
    "FEW_CONVERSATIONS": Code("warning", "Fewer than 10 conversations rarely teach a model anything: add more."),
}


class Finding(msgspec.Struct, frozen=True):
    """One defect. ``line`` is 1-based (0: the whole file); ``pointer`` is a JSON pointer within the row."""

    line: int
    pointer: str
    code: str
    severity: Severity
    found: str
    advice: str


def finding(line: int, pointer: str, code: str, found: object = "") -> Finding:
    """A finding of a known code; ``found`` is what stands there, shown as JSON if it is not text."""
    text = found if isinstance(found, str) else msgspec.json.encode(found).decode()
    text = text if len(text) <= MAX_FOUND else text[: MAX_FOUND - 1] + "…"
    return Finding(line, pointer, code, CODES[code].severity, text, CODES[code].advice)
