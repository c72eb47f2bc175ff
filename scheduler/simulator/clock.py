"""Virtual time, and processes that can be killed or stopped at any await.

The loop's selector never blocks: when nothing is ready, the clock jumps to the next timer. A process is a context
variable: every callback knows whose it is, so that a stopped process (SIGSTOP) has its callbacks parked until it goes
on, and a killed one (SIGKILL) touches nothing any more (see ``Process.kill``).
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler.simulator.world import World

MIDNIGHT = datetime(2027, 3, 1, tzinfo=UTC)
"""Some worlds begin shortly before this new month, the others a few hours after."""
BEGIN_S = 1000.0
"""What the monotonic clock shows at the beginning."""


class Stuck(Exception):
    """Nothing is ready, and no timer is set: the simulated world would stand still for ever."""


class Clock:
    """Seconds; one that never jumps, and dates derived from it."""

    def __init__(self, begin: datetime) -> None:
        self.now = BEGIN_S
        self._begin_s = begin.timestamp() - BEGIN_S

    def monotonic(self) -> float:
        return self.now

    def date_s(self) -> float:
        """Seconds since the epoch by a clock that is right."""
        return self.now + self._begin_s


class Process:
    """An operating-system process of the installation: its life, its wall clock, and what it may still touch."""

    def __init__(self, world: World, name: str, wall_offset_s: float = 0.0, host: str = "") -> None:
        self.world = world
        self.name = name
        self.host = host
        self.wall_offset_s = wall_offset_s
        self.alive = True
        self.stopped = False
        self._parked: list[tuple[Callable[..., Any], tuple[Any, ...], Context]] = []
        self._tasks: list[asyncio.Task[Any]] = []

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.world.clock.date_s() + self.wall_offset_s, UTC)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` as this process's."""
        context = copy_context()
        context.run(PROCESS.set, self)
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.append(task)
        return task

    def stop(self) -> None:
        """SIGSTOP: from here on its callbacks are parked."""
        self.stopped = self.alive

    def go_on(self) -> None:
        """SIGCONT."""
        self.stopped = False
        parked, self._parked = self._parked, []
        for callback, arguments, context in parked:
            asyncio.get_running_loop().call_soon(callback, *arguments, context=context)

    def kill(self) -> None:
        """SIGKILL. The database rolls its transactions back and everything refuses it; then its tasks unwind."""
        if not self.alive:
            return
        self.alive = False
        self.world.store.forget(self)
        self.go_on()
        for task in self._tasks:
            task.cancel()

    def park(self, callback: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._parked.append((callback, arguments, copy_context()))

    def check(self) -> None:
        """To be called before anything that the world would see."""
        if not self.alive:
            raise asyncio.CancelledError


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class _Selector(selectors.SelectSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck
        if timeout > 0:
            self._clock.now += timeout
        return []


class _Task(asyncio.Task[Any]):
    """Hashes by number: the order in which a task group (a set) cancels must not depend on addresses."""

    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(_Selector(clock))
        self._clock = clock
        numbers = itertools.count(1)
        self.set_task_factory(lambda loop, work, **kwargs: _Task(next(numbers), work, loop=loop, **kwargs))

    def time(self) -> float:
        return self._clock.now

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return super().call_soon(_step, callback, args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        own: list[asyncio.TimerHandle] = []
        handle = super().call_at(when, _alarm, own, callback, args, context=context)
        own.append(handle)
        return handle


def _step(callback: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    process = PROCESS.get()
    if process is not None and process.stopped:
        process.park(callback, arguments)
    else:
        callback(*arguments)


def _alarm(own: list[asyncio.TimerHandle], callback: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    process = PROCESS.get()
    if process is not None and process.stopped:
        process.park(_alarm, (own, callback, arguments))
    elif not own[0].cancelled():
        callback(*arguments)
