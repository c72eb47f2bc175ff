"""A TCP proxy that can be told to misbehave, between the installation and a server that it depends on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CHUNK = 65_536
SLOW_S = 0.4
"""What a slow server adds to each chunk of an answer."""
CUT_AFTER = 3
"""Every so many connections of a failing server are cut; the others are answered 503."""
ANSWER_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Mood(Enum):
    HONEST = "honest"
    SLOW = "slow"
    FAILING = "failing"
    """Connections that are open are cut; new ones are answered with HTTP 503 or cut in turn."""
    AWAY = "away"
    """Connections that are open are cut; new ones are closed at once."""


class Proxy:
    """Listens on a free port of ``host``, in a thread of its own, until ``close``."""

    def __init__(self, connect: Callable[[], Awaitable[Streams]], host: str = "127.0.0.1") -> None:
        self._connect = connect
        self._mood = Mood.HONEST
        self._open: set[asyncio.StreamWriter] = set()
        self._count = 0
        self.hit = 0
        """Connections that met a bad mood."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, host, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def mood(self) -> Mood:
        return self._mood

    @mood.setter
    def mood(self, mood: Mood) -> None:
        self._mood = mood
        if mood in (Mood.FAILING, Mood.AWAY):
            self._call(self._cut())

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            await self._cut()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _call(self, action: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(action, self._loop).result(20)

    async def _cut(self) -> None:
        self.hit += len(self._open)
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._mood in (Mood.FAILING, Mood.AWAY):
                self.hit += 1
                await self._refuse(reader, writer)
                return
            there, back = await self._connect()
            self._open.add(back)
            try:
                pipes = {asyncio.create_task(self._pipe(reader, back)), asyncio.create_task(self._pipe(there, writer))}
                await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
                for pipe in pipes:
                    pipe.cancel()
                await asyncio.gather(*pipes, return_exceptions=True)
            finally:
                self._open.discard(back)
                back.close()
        except (OSError, asyncio.CancelledError):
            pass  # cut, or closed with all the rest
        finally:
            self._open.discard(writer)
            writer.close()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count += 1
        if self._mood is Mood.AWAY or self._count % CUT_AFTER == 0:
            writer.transport.abort()
            return
        with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.write(ANSWER_503)
        await writer.drain()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if self._mood is Mood.SLOW:
                self.hit += 1
                await asyncio.sleep(SLOW_S)
            writer.write(data)
            await writer.drain()
