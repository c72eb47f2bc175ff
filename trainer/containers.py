"""Rows out of files: JSONL (plain or gzip) and JSON arrays, streamed with bounded memory. Torch-free.

A row that is too large is never held: it is skipped to its end and handed out as too large. A compressed file that
unpacks to very much is bounded by the same limit, and by one on the whole.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Literal, NamedTuple, cast

import msgspec

Container = Literal["JSONL", "JSON_ARRAY"]
MAX_ROW_BYTES = 8 * 2**20
MAX_TOTAL_BYTES = 64 * 2**30
CHUNK_BYTES = 2**20
HEAD_BYTES = 64 * 1024
BOM = b"\xef\xbb\xbf"
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)

_FOREIGN = {b"PAR1": "Parquet", b"PK\x03\x04": "a zip archive or spreadsheet", b"SQLi": "an SQLite database"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Row(NamedTuple):
    """``line`` is where the row begins, 1-based. ``raw`` is None when the row is larger than ``MAX_ROW_BYTES``."""

    line: int
    raw: bytes | None
    size: int


class Unreadable(Exception):
    """The container as a whole cannot be read; ``code`` is a finding's."""

    def __init__(self, code: str, found: str) -> None:
        super().__init__(found)
        self.code = code
        self.found = found


class Source:
    """A file being read: unpacks gzip, skips a byte order mark, knows how far it has come. Raises Unreadable."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size, self._total = file, size, 0
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._stream = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file
        self.head = self._read(HEAD_BYTES)
        self._ahead = self.head.removeprefix(BOM)
        self.container = container_of(self.head)

    @property
    def fraction(self) -> float:
        """How much of the file has been read, 0 to 1."""
        return self._file.tell() / self._size if self._size else 1.0

    def read(self) -> bytes:
        """The next bytes, about ``CHUNK_BYTES``; empty at the end."""
        ahead, self._ahead = self._ahead, b""
        return ahead or self._read(CHUNK_BYTES)

    def rows(self) -> Iterator[Row]:
        """All rows, blank lines left out."""
        return _READERS[self.container](self)

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except DAMAGED as error:
            raise Unreadable("CORRUPT_FILE", str(error)) from error
        self._total += len(data)
        if self._total > MAX_TOTAL_BYTES:
            raise Unreadable("FILE_TOO_LARGE", f"more than {MAX_TOTAL_BYTES >> 30} GiB unpacked")
        return data


def container_of(head: bytes) -> Container:
    """Recognise the container from the first (unpacked) bytes. Raises Unreadable for one that is not read."""
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise Unreadable("UNSUPPORTED_CONTAINER", name)
    if head.startswith(_UTF16):
        raise Unreadable("NOT_UTF8", "UTF-16 byte order mark")
    text = head.removeprefix(BOM).lstrip()
    if not text:
        raise Unreadable("EMPTY_FILE", "no data")
    lines = text.splitlines()
    if text.startswith(b"[") and not (len(lines) > 1 and _is_json(lines[0])):
        return "JSON_ARRAY"
    if b"," in lines[0] and not any(line.lstrip().startswith((b"{", b"[")) for line in lines):
        raise Unreadable("UNSUPPORTED_CONTAINER", "CSV")
    return "JSONL"


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _lines(source: Source) -> Iterator[Row]:
    line, parts, size = 1, [], 0
    while chunk := source.read():
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            parts.append(chunk[start:end])
            yield from _row(line, parts, size + end - start)
            line, parts, size, start = line + 1, [], 0, end + 1
        size += len(chunk) - start
        if size <= MAX_ROW_BYTES:
            parts.append(chunk[start:])
        else:
            parts = []
    yield from _row(line, parts, size)


def _row(line: int, parts: list[bytes], size: int) -> Iterator[Row]:
    if size > MAX_ROW_BYTES:
        yield Row(line, None, size)
    elif raw := b"".join(parts).strip():
        yield Row(line, raw, size)


_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|(?P<open>\\?)\Z)|[\[\]{},]', re.DOTALL)
"""A string (``open``: one that goes on past the end of the buffer), a bracket or a comma."""


class _Cutter:
    """Cuts a JSON array into its elements by brackets and commas; whether an element is JSON is seen by its reader."""

    def __init__(self) -> None:
        self.text = b""
        self.start = self.scan = self.depth = 0
        self.closed = False
        self.line = 1
        """Line of ``start``, where the current element begins."""
        self.dropped = self.dropped_lines = 0
        """Of a current element that is too large to hold."""

    def feed(self, chunk: bytes) -> Iterator[Row]:
        self.text = self.text[self.start :] + chunk
        self.scan, self.start = self.scan - self.start, 0
        match = None
        while not self.closed and (match := _TOKEN.search(self.text, self.scan)) and match["open"] is None:
            self.scan = match.end()
            token = match[0]
            if token in b"[{":
                self.depth += 1
                if self.depth == 1:
                    self._next()
            elif token in b"]}":
                self.depth -= 1
                if self.depth == 0:
                    yield from self._cut(match.start())
                    self.closed, match = True, None
            elif token == b"," and self.depth == 1:
                yield from self._cut(match.start())
        self.scan = match.start() if match else len(self.text)
        if len(self.text) - self.start > MAX_ROW_BYTES:
            self._drop(b'"' + match["open"] if match else b"")

    def finish(self) -> Iterator[Row]:
        """What is left after the last element: nothing, unless the array is cut short or followed by something."""
        self.scan = len(self.text)
        yield from self._cut(self.scan)
        if self.depth == 1:
            yield Row(self.line, b"[", 1)

    def _cut(self, end: int) -> Iterator[Row]:
        raw = self.text[self.start : end]
        lead = raw[: len(raw) - len(raw.lstrip())]
        yield from _row(self.line + lead.count(b"\n"), [raw], len(raw) + self.dropped)
        self._next()

    def _next(self) -> None:
        self.line += self.dropped_lines + self.text.count(b"\n", self.start, self.scan)
        self.start, self.dropped, self.dropped_lines = self.scan, 0, 0

    def _drop(self, tail: bytes) -> None:
        held = self.text[self.start : len(self.text) - len(tail)]
        self.dropped += len(held)
        self.dropped_lines += held.count(b"\n")
        self.text, self.start, self.scan = tail, 0, 0


def _elements(source: Source) -> Iterator[Row]:
    cutter = _Cutter()
    while chunk := source.read():
        yield from cutter.feed(chunk)
    yield from cutter.finish()


_READERS: dict[Container, Callable[[Source], Iterator[Row]]] = {"JSONL": _lines, "JSON_ARRAY": _elements}
