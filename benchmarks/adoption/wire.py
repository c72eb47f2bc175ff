"""An executor in one process, called from another: so that the fake cluster outlives the scheduler that is killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from scheduler.executor import AttemptSpec, Batch, Executor, Look, RankTimes, Unreachable

LENGTH_BYTES = 8


async def _receive(reader: asyncio.StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
    return pickle.loads(await reader.readexactly(length))


def _send(writer: asyncio.StreamWriter, message: Any) -> None:
    data = pickle.dumps(message)
    writer.write(len(data).to_bytes(LENGTH_BYTES) + data)


@asynccontextmanager
async def served(executor: Executor, socket: Path) -> AsyncIterator[None]:
    """The executor answers on a socket that only this user can open, whoever comes and goes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                number, method, arguments, named = await _receive(reader)
                try:
                    _send(writer, (number, await getattr(executor, method)(*arguments, **named), None))
                except Exception as error:
                    _send(writer, (number, None, error))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_unix_server(answer, socket)
    os.chmod(socket, 0o600)
    try:
        yield
    finally:
        server.close()


class Remote:
    """The executor behind a socket."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._opening = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None]

    async def look(self) -> Look:
        look: Look = await self._call("look")
        return look

    async def start(self, spec: AttemptSpec) -> None:
        await self._call("start", spec)

    async def poll(self, name: str, cursor: int, *, epoch: int, allowance_ms: int | None) -> Batch:
        batch: Batch = await self._call("poll", name, cursor, epoch=epoch, allowance_ms=allowance_ms)
        return batch

    async def stop(self, name: str, reason: str, *, epoch: int) -> None:
        await self._call("stop", name, reason, epoch=epoch)

    async def times(self, name: str) -> list[RankTimes]:
        times: list[RankTimes] = await self._call("times", name)
        return times

    async def release(self, name: str, *, epoch: int) -> None:
        await self._call("release", name, epoch=epoch)

    async def close(self) -> None:
        if self._writer is not None:
            self._listening.cancel()
            self._writer.close()

    async def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        async with self._opening:
            if self._writer is None:
                reader, self._writer = await asyncio.open_unix_connection(self._socket)
                self._listening = asyncio.create_task(self._listen(reader))
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        _send(self._writer, (number, method, arguments, named))
        try:
            return await self._asked[number]
        finally:
            del self._asked[number]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, answer, error = await _receive(reader)
                asked = self._asked.get(number)
                if asked is None or asked.done():
                    continue
                if error is None:
                    asked.set_result(answer)
                else:
                    asked.set_exception(error)
        except (asyncio.IncompleteReadError, ConnectionError):
            for asked in self._asked.values():
                asked.set_exception(Unreachable("the cluster has hung up"))
