"""Conversations out of datasets: recognises the format, checks every row, names every defect. Torch-free.

>>> with open("chats.jsonl", "rb") as file:
...     reading = read(file, size)
...     for parsed in reading: parsed.findings, parsed.conversation
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from typing import IO, Any, Literal, NamedTuple

import msgspec

from trainer.containers import HEAD_BYTES, Container, Row, Source, Unreadable
from trainer.findings import Finding, finding

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "validation"]
MAX_DEPTH = 64
MAX_MESSAGES = 4096
HEAD_ROWS = 100
PREVIEW_ROWS = 3


class Message(msgspec.Struct, frozen=True):
    """One turn. ``weight`` 0: an assistant turn that is read but not learned."""

    role: Role
    content: str
    weight: int = 1


class Conversation(msgspec.Struct, frozen=True):
    """A sound row in normal form. ``split`` is None when the row names none."""

    line: int
    id: str | None
    split: Split | None
    messages: tuple[Message, ...]

    def digest(self) -> bytes:
        """16 bytes that tell contents apart (roles, texts, weights; not ids or splits)."""
        return blake2b(msgspec.json.encode(self.messages), digest_size=16).digest()


class Parsed(NamedTuple):
    """What became of a row: a conversation, or findings that say why there is none."""

    line: int
    id: str | None
    conversation: Conversation | None
    findings: list[Finding]


class Turn(NamedTuple):
    """A turn as a format spells it, before it is checked. ``content`` may be anything."""

    pointer: str
    role: Any
    content: Any
    weight: Any = 1
    content_pointer: str = ""
    tools: bool = False


class Format(NamedTuple):
    """``key``: where the turns are; ``turns``: how one entry of that list is spelled; ``roles``: the names it has."""

    key: str
    turns: Callable[[str, dict[str, Any]], Iterator[Turn]]
    roles: dict[str, Role]


def _v4(pointer: str, turn: dict[str, Any]) -> Iterator[Turn]:
    yield Turn(pointer, turn.get("role"), turn.get("content"), content_pointer=f"{pointer}/content")


def _v3(pointer: str, turn: dict[str, Any]) -> Iterator[Turn]:
    for role in [*_V3_ROLES, *(key for key in turn if key not in _V3_ROLES)]:
        if role in turn:
            yield Turn(pointer, role, turn[role], content_pointer=f"{pointer}/{role}")
    if not turn:
        yield Turn(pointer, None, "?", content_pointer=pointer)


def _openai(pointer: str, turn: dict[str, Any]) -> Iterator[Turn]:
    tools = turn.get("role") in ("tool", "function") or bool(turn.get("tool_calls") or turn.get("function_call"))
    weight = turn.get("weight", 1)
    yield Turn(pointer, turn.get("role"), turn.get("content"), weight, f"{pointer}/content", tools)


def _sharegpt(pointer: str, turn: dict[str, Any]) -> Iterator[Turn]:
    yield Turn(pointer, turn.get("from"), turn.get("value"), content_pointer=f"{pointer}/value")


_V3_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant"}
_PLAIN: dict[str, Role] = {"system": "system", **_V3_ROLES}
FORMATS: dict[str, Format] = {
    "BRIGHTRUN_LORA_V4": Format("turns", _v4, _PLAIN),
    "BRIGHTRUN_LORA_V3": Format("turns", _v3, _V3_ROLES),
    "OPENAI_MESSAGES": Format("messages", _openai, {**_PLAIN, "developer": "system"}),
    "SHAREGPT": Format(
        "conversations", _sharegpt, {**_PLAIN, "human": "user", "gpt": "assistant", "chatgpt": "assistant"}
    ),
}
UNSUPPORTED = ("ALPACA", "PROMPT_COMPLETION")


def recognise(row: dict[str, Any]) -> str | None:
    """The format that a row's keys speak of; None if they speak of none (or of both BrightRun formats)."""
    if "turns" in row:
        turns = row["turns"]
        keys = turns[0].keys() if isinstance(turns, list) and turns and isinstance(turns[0], dict) else ()
        if "role" in keys or "content" in keys:
            return "BRIGHTRUN_LORA_V4"
        return "BRIGHTRUN_LORA_V3" if "user" in keys or "assistant" in keys else None
    if "messages" in row:
        return "OPENAI_MESSAGES"
    if "conversations" in row:
        return "SHAREGPT"
    if "instruction" in row and "output" in row:
        return "ALPACA"
    return "PROMPT_COMPLETION" if "prompt" in row and "completion" in row else None


class Reading:
    """A dataset being read; iterate over it once. A file that cannot be read is one finding at line 0."""

    def __init__(self, file: IO[bytes], size: int, stated: str | None) -> None:
        self._file, self._size, self._stated = file, size, stated
        self._source: Source | None = None
        self._unreadable: Unreadable | None = None
        self.container: Container | None = None
        self.format = stated
        try:
            head = Source(file, size)
            self.container = head.container
            self.format = stated or _most_common(islice(head.rows(), HEAD_ROWS))
            file.seek(0)
            self._source = Source(file, size)
        except Unreadable as error:
            self._unreadable = error

    @property
    def fraction(self) -> float:
        """How much has been read, 0 to 1."""
        return self._source.fraction if self._source else 1.0

    def __iter__(self) -> Iterator[Parsed]:
        try:
            if self._unreadable or not self._source:
                raise self._unreadable or Unreadable("EMPTY_FILE", "no data")
            for row in self._source.rows():
                yield self._parse(row)
        except Unreadable as error:
            yield Parsed(0, None, None, [finding(0, "", error.code, error.found)])

    def _parse(self, row: Row) -> Parsed:
        value = _decode(row)
        if isinstance(value, Finding):
            return Parsed(row.line, None, None, [value])
        mismatch = self._mismatch(row.line, value)
        if mismatch:
            return Parsed(row.line, None, None, [mismatch])
        return _check(row.line, value, FORMATS[self.format or ""])

    def _mismatch(self, line: int, row: dict[str, Any]) -> Finding | None:
        own = recognise(row)
        if self.format in FORMATS and own in (self.format, None):
            return None
        found = own or "keys " + ", ".join(islice(row, 5))
        if self.format in UNSUPPORTED and own in (self.format, None):
            return finding(line, "", "UNSUPPORTED_FORMAT", found)
        return finding(line, "", "WRONG_FORMAT" if self._stated or own is None else "MIXED_FORMAT", found)


def read(file: IO[bytes], size: int, stated: str | None = None) -> Reading:
    """Read a dataset from a seekable binary file of ``size`` bytes; ``stated``: the format it must have."""
    return Reading(file, size, stated)


class Preview(msgspec.Struct):
    """What a file seems to be, from its first bytes. Structure only: no tokens are counted."""

    format: str | None
    container: str | None
    rows: list[Conversation]
    findings: list[Finding]


def preview(data: bytes) -> Preview:
    """Recognise a file by its head (which may end in mid-row) and show its first rows."""
    data = data[: 16 * HEAD_BYTES]
    if data[:2] == b"\x1f\x8b":
        try:
            data = zlib.decompressobj(31).decompress(data, 16 * HEAD_BYTES)
        except zlib.error as error:
            return Preview(None, None, [], [finding(0, "", "CORRUPT_FILE", str(error))])
    reading = read(io.BytesIO(data), len(data))
    parsed = list(islice(reading, HEAD_ROWS + 1))
    if len(parsed) > 1 and (len(parsed) > HEAD_ROWS or not data.endswith((b"\n", b"]", b"}"))):
        parsed.pop()
    rows = [row.conversation for row in parsed if row.conversation]
    findings = [found for row in parsed for found in row.findings]
    return Preview(reading.format, reading.container, rows[:PREVIEW_ROWS], findings)


def _most_common(rows: Iterator[Row]) -> str | None:
    votes: Counter[str] = Counter()
    for row in rows:
        value = _decode(row)
        if isinstance(value, dict) and (name := recognise(value)):
            votes[name] += 1
    return votes.most_common(1)[0][0] if votes else None


def _decode(row: Row) -> dict[str, Any] | Finding:
    if row.raw is None:
        return finding(row.line, "", "ROW_TOO_LARGE", f"{row.size} bytes")
    try:
        value = msgspec.json.decode(row.raw)
    except UnicodeDecodeError:
        return finding(row.line, "", "NOT_UTF8", _not_utf8(row.raw))
    except msgspec.DecodeError as error:
        bad_bytes = _not_utf8(row.raw)
        return finding(row.line, "", "NOT_UTF8" if bad_bytes else "NOT_JSON", bad_bytes or str(error))
    except RecursionError:
        return finding(row.line, "", "ROW_TOO_DEEP", "more than 1,000 levels")
    if not isinstance(value, dict):
        return finding(row.line, "", "NOT_OBJECT", value)
    if row.raw.count(b"{") + row.raw.count(b"[") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        return finding(row.line, "", "ROW_TOO_DEEP", f"more than {MAX_DEPTH} levels")
    return value


def _not_utf8(raw: bytes) -> str:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{raw[error.start]:02x} at position {error.start}"
    return ""


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _check(line: int, row: dict[str, Any], shape: Format) -> Parsed:
    findings: list[Finding] = []

    def report(pointer: str, code: str, found: object) -> None:
        findings.append(finding(line, pointer, code, found))

    identity, split = row.get("conversation_id"), row.get("split")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int) or identity == ""):
        report("/conversation_id", "BAD_ID", identity)
        identity = None
    if split not in (None, "train", "validation"):
        report("/split", "BAD_SPLIT", split)
    for key in ("tools", "functions"):
        if row.get(key):
            report(f"/{key}", "TOOLS_UNSUPPORTED", row[key])
    turns = list(_turns(row, shape, report))
    messages = [message for turn in turns if (message := _message(turn, shape.roles, report))]
    if turns and not any(found.code == "TURN_NOT_OBJECT" for found in findings):
        _check_order(turns, shape, report)
    name = None if identity is None else str(identity)
    if findings:
        return Parsed(line, name, None, findings)
    return Parsed(line, name, Conversation(line, name, split, tuple(messages)), [])


Report = Callable[[str, str, object], None]


def _turns(row: dict[str, Any], shape: Format, report: Report) -> Iterator[Turn]:
    entries = row.get(shape.key)
    if not isinstance(entries, list):
        report(f"/{shape.key}", "MISSING_TURNS", entries if shape.key in row else "keys " + ", ".join(islice(row, 5)))
    elif not entries:
        report(f"/{shape.key}", "EMPTY_TURNS", entries)
    elif len(entries) > MAX_MESSAGES:
        report(f"/{shape.key}", "ROW_TOO_LARGE", f"{len(entries)} messages")
    else:
        for index, entry in enumerate(entries):
            if isinstance(entry, dict):
                yield from shape.turns(f"/{shape.key}/{index}", entry)
            else:
                report(f"/{shape.key}/{index}", "TURN_NOT_OBJECT", entry)


def _message(turn: Turn, roles: dict[str, Role], report: Report) -> Message | None:
    """The turn in normal form; None, with a report of every defect, if it has any."""
    role = roles.get(turn.role) if isinstance(turn.role, str) else None
    sound = role is not None
    if turn.tools:
        report(turn.pointer, "TOOLS_UNSUPPORTED", turn.role)
        return None
    if role is None:
        report(turn.pointer, "UNKNOWN_ROLE", turn.role if turn.role is not None else "no role")
    if not isinstance(turn.content, str):
        report(turn.content_pointer, "CONTENT_NOT_STRING", turn.content)
        sound = False
    elif not turn.content.strip():
        report(turn.content_pointer, "EMPTY_CONTENT", turn.content)
        sound = False
    if isinstance(turn.weight, bool) or turn.weight not in (0, 1):
        report(f"{turn.pointer}/weight", "BAD_WEIGHT", turn.weight)
        sound = False
    if not sound or role is None:
        return None
    return Message(role, turn.content, int(turn.weight) if role == "assistant" else 1)


def _check_order(turns: list[Turn], shape: Format, report: Report) -> None:
    """Optional system turn, then user and assistant by turns, assistant last. An unknown role is no second defect."""
    roles = [shape.roles.get(turn.role) if isinstance(turn.role, str) else None for turn in turns]
    before: Role | None = "system"
    for index, (turn, role) in enumerate(zip(turns, roles, strict=True)):
        allowed = {None: _ANY, "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
        if role and role not in allowed and not (role == "system" and index == 0):
            report(turn.pointer, "ROLE_ORDER", f"{role} after {before if index else 'the start'}")
        before = role
    if "assistant" not in roles:
        report(f"/{shape.key}", "NO_ASSISTANT", ", ".join(str(turn.role) for turn in turns[:5]))
    elif roles[-1] in ("user", "system"):
        report(turns[-1].pointer, "LAST_NOT_ASSISTANT", roles[-1])
    elif not any(turn.weight for turn, role in zip(turns, roles, strict=True) if role == "assistant"):
        report(f"/{shape.key}", "NOTHING_TO_LEARN", "every assistant turn has weight 0")


_ANY: tuple[Role, ...] = ("system", "user", "assistant")
