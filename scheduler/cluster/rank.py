"""One rank of a gang: a thin actor without torch that holds the GPU and the storage credentials.

It stages inputs, starts the trainer child, meters, passes events up and stop requests down, and uploads outputs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from control_plane.states import Outcome
from control_plane.storage import Storage
from scheduler.cluster.child import Child, exit_reason, scrubbed_env
from scheduler.cluster.meter import Meter
from scheduler.cluster.outputs import Outputs
from scheduler.cluster.staging import Torn, fetch_checkpoint, stage_in
from scheduler.executor import AttemptSpec, Ending, ResumePoint
from trainer.config import Config, TrainConfig, World
from trainer.protocol import (
    USER_FAULTS,
    Adapter,
    Beat,
    Checkpoint,
    ChildEvent,
    Failed,
    Finished,
    Phase,
    StopReason,
)

UNREAD_EVENTS = 5_000
"""With more than these unread the child is no longer listened to: it waits in its next write."""

LAST_WORD_PATIENCE_S = 0.25
"""How long a child may take to exit after its last event; all it has to give is on disk by then."""


class Report(msgspec.Struct):
    """Answer to a poll. ``events``: (number, seconds since the epoch, event), after the cursor."""

    state: str
    """preparing, ready (to be launched), running or ended."""
    events: list[tuple[int, float, dict[str, Any]]]
    last: int
    """Number of the newest event."""
    usage: dict[str, int]
    """Cumulative milliseconds by kind; empty for unmetered work."""
    beats: int = 0
    """Signs of work so far that came with no event."""
    stopping: bool = False
    """A stop request has reached the child."""
    resumed: ResumePoint | None = None
    node: str = ""
    rendezvous: str = ""
    """torch.distributed's init method, were this rank the first."""
    ending: Ending | None = None


class Rank:
    """The actor. Every method may be called twice."""

    def __init__(self, spec: AttemptSpec, rank: int, child_command: list[str]) -> None:
        self._meter = Meter()
        self._called = False
        self._spec, self._rank, self._child_command = spec, rank, child_command
        self._folder = Path(spec.work_root) / f"{spec.work_id}-{spec.number}-r{rank}"
        self._node = socket.gethostname()
        self._state = "preparing"
        self._events: list[tuple[int, float, dict[str, Any]]] = []
        self._last_event = 0
        self._room = asyncio.Event()
        self._resumed: ResumePoint | None = None
        self._resume_folder: Path | None = None
        self._rendezvous = ""
        self._launched: asyncio.Future[World] = asyncio.get_running_loop().create_future()
        self._child: Child | None = None
        self._outputs: Outputs | None = None
        self._beats = 0
        self._last_word: Finished | Failed | None = None
        self._stopping: StopReason | None = None
        self._killed_for: tuple[str, str] | None = None
        self._ending: Ending | None = None
        self._task = asyncio.create_task(self._run())

    # What the supervisor calls.

    async def poll(self, cursor: int) -> Report:
        """Events after ``cursor``; those up to it are forgotten.

        Time counts from the first call on: by then the actor stands in Ray's table, so never more is reported than
        Ray's own times say was held.
        """
        if not self._called:
            self._called, self._meter = True, Meter()
        self._events = [event for event in self._events if event[0] > cursor]
        if len(self._events) < UNREAD_EVENTS:
            self._room.set()
        return Report(
            state=self._state,
            events=self._events[:1000],
            last=self._last_event,
            usage=self._usage(),
            beats=self._beats,
            stopping=self._stopping is not None,
            resumed=self._resumed,
            node=self._node,
            rendezvous=self._rendezvous,
            ending=self._ending,
        )

    async def launch(self, world: World) -> None:
        """All ranks are ready: start the child."""
        if not self._launched.done():
            self._launched.set_result(world)

    async def stop(self, reason: StopReason) -> None:
        """Pass a stop request to the child."""
        if self._child and not self._stopping:
            self._stopping = reason
            await self._child.stop(reason)

    async def give_up(self, code: str, message: str) -> None:
        """End the child and its uploads by force; what is lost by it is the platform's fault, under this code."""
        if self._child and not self._killed_for:
            self._killed_for = (code, message)
            if self._child.running:
                self._child.kill()
            elif self._outputs:
                self._outputs.give_up()

    # What it does by itself.

    async def _run(self) -> None:
        try:
            self._ending = await self._work()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            self._ending = Ending(Outcome.FAULT, "RANK_ERROR", message, traceback.format_exc())
        finally:
            if self._child:
                self._child.kill()
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._state = "ended"

    async def _work(self) -> Ending:
        storage = Storage(self._spec.storage_url)
        try:
            await self._prepare(storage)
        except FileNotFoundError as error:
            return Ending(Outcome.FAULT, "INPUT_MISSING", f"an input is not in the object store: {error}")
        self._rendezvous = f"tcp://{_node_address()}:{_free_port()}"
        self._state = "ready"
        world = await self._launched
        try:
            config = self._complete_config(world)
        except msgspec.ValidationError as error:
            return Ending(Outcome.FAILED, "BAD_CONFIG", str(error))
        self._state = "running"
        self._outputs = outputs = Outputs(storage, self._spec.artifact_prefix or "", self._emit)
        try:
            code = await self._run_child(config, outputs)
            self._meter.switch("saving")
            if outputs.busy:
                self._emit(msgspec.to_builtins(Phase(name="saving")))
            await outputs.drain()
        finally:
            await outputs.cancel()
        return self._conclude(code, outputs)

    async def _prepare(self, storage: Storage) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("inputs", "work", "output"):
            (self._folder / name).mkdir(parents=True)
        self._folder.chmod(0o700)
        await stage_in(storage, self._spec.stage_in, self._folder / "inputs")
        for point in self._spec.resume_points:
            folder = self._folder / "inputs" / "resume" / Path(point.key).name
            try:
                await fetch_checkpoint(storage, point, folder)
            except Torn as torn:
                self._emit(
                    {
                        "type": "log",
                        "level": "WARNING",
                        "message": f"the checkpoint of step {point.step} is not whole and was passed over: {torn}",
                        "metadata": {"checkpoint_id": point.checkpoint_id},
                    }
                )
                continue
            self._resumed, self._resume_folder = point, folder
            return

    def _complete_config(self, world: World) -> Config:
        """The scheduler's part of the config with this rank's own. Raises msgspec.ValidationError."""
        inputs = self._folder / "inputs"
        own: dict[str, Any] = {"work_dir": str(self._folder / "work"), "threads": self._spec.threads}
        own["dataset_path"] = str(inputs / self._spec.stage_in[0].path) if self._spec.stage_in else ""
        if self._spec.config.get("kind") == TrainConfig.__struct_config__.tag:
            parent = next((stage.path for stage in self._spec.stage_in if stage.path == "parent"), None)
            own["output_dir"] = str(self._folder / "output")
            own["resume_from"] = str(self._resume_folder) if self._resume_folder else None
            own["parent_adapter"] = str(inputs / parent) if parent else None
            own["world"] = msgspec.to_builtins(world)
        return msgspec.convert({**self._spec.config, **own}, Config)

    async def _run_child(self, config: Config, outputs: Outputs) -> int:
        """Start the child, take its events until it ends, answer its exit code."""
        path = self._folder / "config.json"
        path.write_bytes(msgspec.json.encode(config))
        home = self._folder / "work"
        env = scrubbed_env(os.environ, home=home, cache_dir=Path(config.cache_dir), threads=self._spec.threads)
        self._child = await Child.start([*self._child_command, str(path), "--supervised"], env=env, cwd=home)
        async for event in self._child.events():
            self._take(event, outputs)
            if len(self._events) >= UNREAD_EVENTS:
                self._room.clear()
                await self._room.wait()
        return await self._child.wait()

    def _take(self, event: ChildEvent, outputs: Outputs) -> None:
        match event:
            case Finished() | Failed():
                self._last_word = event
                if self._child:
                    asyncio.get_running_loop().call_later(LAST_WORD_PATIENCE_S, self._child.kill)
                return
            case Checkpoint() | Adapter():
                if self._rank == 0:
                    outputs.add(event, self._usage())
                return
            case Phase():
                self._meter.switch(event.name)
            case Beat():
                self._beats += 1
                return
        self._emit(msgspec.to_builtins(event))

    def _conclude(self, code: int, outputs: Outputs) -> Ending:
        word = self._last_word
        if self._killed_for and not word:
            return Ending(Outcome.FAULT, *self._killed_for, self._stderr(), stop_reason=self._stopping)
        if word is None:
            why, message = exit_reason(code, out_of_memory=self._child is not None and self._child.out_of_memory)
            return Ending(_outcome(why), why, message, self._stderr(), stop_reason=self._stopping)
        self._emit(msgspec.to_builtins(word))
        if isinstance(word, Failed):
            message = f"{word.message} {word.advice}".strip()
            stack = word.stack or self._stderr()
            return Ending(_outcome(word.code), word.code, message, stack, stop_reason=self._stopping)
        if outputs.failed:
            return Ending(Outcome.FAULT, "NOT_STORED", outputs.failed, stop_reason=self._stopping)
        if word.outcome == "stopped":
            return Ending(Outcome.STOPPED, stop_reason=word.reason or self._stopping)
        return Ending(Outcome.COMPLETED)

    def _stderr(self) -> str:
        return self._child.stderr_tail() if self._child else ""

    def _usage(self) -> dict[str, int]:
        return self._meter.read() if self._spec.demand.metered else {}

    def _emit(self, event: dict[str, Any]) -> None:
        if self._rank == 0:
            self._last_event += 1
            self._events.append((self._last_event, time.time(), event))


def _outcome(code: str) -> Outcome:
    """Of a child that did not get through."""
    return Outcome.FAILED if code in USER_FAULTS else Outcome.FAULT


def _node_address() -> str:
    import ray  # here alone: what a rank does needs no Ray

    return str(ray.util.get_node_ip_address())


def _free_port() -> int:
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
    return 0
