"""An HTTP server that takes webhooks as it is told to: with any status, slowly, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import NamedTuple

HANG = "hang"
"""Reads the request and never answers."""
CUT = "cut"
"""Closes the connection instead of answering."""
DRIP = "drip"
"""Answers 200 and then sends a body without end."""
Answer = int | str


class Call(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes
    answer: Answer


class Receiver:
    """``script[path]`` holds the answers to come (a status, one of the above, or where to redirect to); then 204."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.script: dict[str, list[Answer]] = defaultdict(list)
        self.port = 0
        self.open = 0
        """Connections that stand now."""
        self.connections = 0
        """All that were made."""

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def at(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path == path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            path = first.split()[1]
            answer = self.script[path].pop(0) if self.script[path] else 204
            self.calls.append(Call(path, headers, body, answer))
            await self._answer(writer, answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        if answer == HANG:
            await asyncio.sleep(60)
        elif answer == DRIP:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            while True:
                writer.write(b"x" * 1000)
                await writer.drain()
                await asyncio.sleep(0.01)
        elif isinstance(answer, int):
            writer.write(f"HTTP/1.1 {answer} Said\r\nContent-Length: 0\r\n\r\n".encode())
        elif answer != CUT:
            writer.write(f"HTTP/1.1 307 Elsewhere\r\nLocation: {answer}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()


@contextlib.asynccontextmanager
async def receiving(
    tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(receiver.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, host, port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
