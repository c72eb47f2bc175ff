"""What only the executor on Ray can be asked: processes, folders, files, other drivers, outages."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from control_plane.states import Outcome, StopReason
from scheduler.cluster import executor as ray_executor
from scheduler.cluster.executor import TRAINER, RayExecutor
from scheduler.cluster.head import dashboard_ready
from scheduler.executor import AttemptSpec, Demand, Liveness, ResumePoint, Stage, Unreachable
from tests.contract.harness import CHILD, NEWEST, Follower, RayHarness, until_all_is_free
from tests.tiny_model import make_tiny_model

FOREVER = [{"do": "train", "steps": 100_000}]
SCHEDULER = """
import asyncio, json, sys, msgspec
from pathlib import Path
from scheduler.cluster.executor import RayExecutor
from scheduler.executor import AttemptSpec
from tests.contract.harness import CHILD, Follower

async def main(address, token, work_root, spec):
    executor = RayExecutor(address, token_file=Path(token), work_root=work_root, child_command=CHILD)
    spec = msgspec.json.decode(spec, type=AttemptSpec)
    await executor.start(spec)
    follower = Follower(executor, spec.name)
    await follower.until("metrics", 5)
    sys.stdout.write(f"{follower.cursor}\\n")
    sys.stdout.flush()
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
async def harness(ray_harness: RayHarness) -> AsyncIterator[RayHarness]:
    yield ray_harness
    for name, liveness in (await ray_harness.executor.look()).actors.items():
        if liveness == Liveness.ALIVE:
            await ray_harness.executor.release(name, epoch=NEWEST)
            assert ray_harness.remains(name) == []
    await until_all_is_free(ray_harness.executor)


async def finished(harness: RayHarness, spec: AttemptSpec) -> Follower:
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.to_the_end(timeout_s=120)
    return follower


async def test_the_childs_surroundings(harness: RayHarness) -> None:
    first = await finished(harness, await harness.spec([{"do": "checkpoint", "step": 7}, {"do": "finish"}]))
    (stored,) = first.of("stored")
    await harness.storage.put("models/m/adapter_config.json", b"{}")
    spec = await harness.spec(
        [{"do": "report_surroundings"}, {"do": "finish"}],
        resume_points=(ResumePoint("c", stored["key"], stored["sha256"], 7),),
        threads=2,
    )
    spec = msgspec.structs.replace(spec, stage_in=(*spec.stage_in, Stage("models/m", "parent", prefix=True)))

    (log,) = (await finished(harness, spec)).of("log")

    seen: dict[str, Any] = log["metadata"]
    folder = harness.work_root / f"{spec.work_id}-1-r0"
    env = seen["env"]
    assert not [name for name in env if name.startswith(("RAY_", "BRIGHTRUN_", "AWS_")) or "TOKEN" in name.upper()]
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("2", "2")
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["HOME"] == seen["cwd"] == str(folder / "work")
    assert seen["mode"] == "0o700"
    config = seen["config"]
    assert (config["threads"], config["output_dir"]) == (2, str(folder / "output"))
    assert config["world"] == {"rank": 0, "size": 1, "init_method": None}
    assert config["parent_adapter"] == str(folder / "inputs" / "parent")
    assert seen["resumed"] == ["adapter.bin", "manifest.json", "optimizer.bin"]
    assert not folder.exists()


async def test_outputs_are_in_the_object_store_when_the_ending_is_given(harness: RayHarness) -> None:
    script = [{"do": "checkpoint", "step": 3}, {"do": "adapter", "step": 3}, {"do": "finish"}]
    spec = await harness.spec(script)

    follower = await finished(harness, spec)

    names = [
        key.removeprefix(f"{spec.artifact_prefix}/") for key, _ in await harness.storage.list(spec.artifact_prefix)
    ]
    assert names == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "checkpoints/a1-s3/adapter.bin",
        "checkpoints/a1-s3/manifest.json",
        "checkpoints/a1-s3/optimizer.bin",
    ]
    (adapter,) = follower.of("adapter")
    assert adapter["files"]["adapter_model.safetensors"]["size"] == len(b"weights")


async def test_an_object_store_that_is_away_delays_only_uploads(harness: RayHarness) -> None:
    spec = await harness.spec([{"do": "checkpoint", "step": 1}, {"do": "train", "steps": 50, "first": 2}])
    blocked = harness.folder / "objects" / "mlflow" / "1" / spec.work_id
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("no folder can be made here")
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 20)
    assert follower.of("stored") == []

    blocked.unlink()

    stored = await follower.until("stored")
    assert stored["step"] == 1
    assert stored["usage"]["0"].get("training", 0) == 0


async def test_a_dead_rank_takes_its_child_along(harness: RayHarness) -> None:
    spec = await harness.spec([{"do": "emit", "event": {"type": "phase", "name": "training"}}, {"do": "hang"}])
    await harness.executor.start(spec)
    await Follower(harness.executor, spec.name).until("phase")
    child = harness.child(spec.name)

    harness.kill_rank(spec.name)

    await asyncio.to_thread(child.wait, 2)


async def test_a_killed_scheduler_is_followed_by_another(harness: RayHarness) -> None:
    spec = await harness.spec([{"do": "train", "steps": 150}, {"do": "finish"}])
    settings = [harness.cluster.address, str(harness.cluster.token_file), str(harness.work_root)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCHEDULER, *settings, msgspec.json.encode(spec).decode()),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    cursor = int(await process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    await process.wait()

    assert (await harness.executor.look()).actors[spec.name] == Liveness.ALIVE
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name, epoch=2)
    batch = await harness.executor.poll(spec.name, cursor, epoch=2, allowance_ms=None)
    assert all(event.number > cursor for event in batch.events)
    follower.events = batch.events
    assert (await follower.to_the_end()).outcome == Outcome.COMPLETED
    steps = [event["step"] for event in follower.of("metrics")]
    assert steps == list(range(steps[0], 151))


async def test_unavailable_is_not_dead(harness: RayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "CALL_S", 0.5)
    frozen, other = await harness.spec(FOREVER), await harness.spec([{"do": "hang"}], demand=Demand({"slot_io": 1}))
    await harness.executor.start(frozen)
    await harness.executor.start(other)
    follower = Follower(harness.executor, frozen.name)
    await follower.until("metrics", 3)
    await Follower(harness.executor, other.name).until("started")

    supervisor = harness.freeze_supervisor(frozen.name)
    with pytest.raises(Unreachable):
        await harness.executor.poll(frozen.name, follower.cursor, epoch=1, allowance_ms=None)
    assert (await harness.executor.look()).actors[frozen.name] == Liveness.ALIVE
    await harness.executor.poll(other.name, 0, epoch=1, allowance_ms=None)
    supervisor.resume()

    before = len(follower.of("metrics"))
    await follower.until("metrics", before + 20)
    assert [event.number for event in follower.events] == list(range(1, len(follower.events) + 1))


async def test_a_config_that_does_not_fit_is_refused_before_the_child_starts(harness: RayHarness) -> None:
    spec = await harness.spec([{"do": "finish"}])
    spec.config["hyperparameters"]["loraRank"] = "many"

    follower = await finished(harness, spec)

    assert follower.batch is not None
    assert follower.batch.ending is not None
    assert (follower.batch.ending.outcome, follower.batch.ending.code) == (Outcome.FAILED, "BAD_CONFIG")
    assert "loraRank" in follower.batch.ending.message


async def test_a_missing_input_is_named(harness: RayHarness) -> None:
    spec = await harness.spec([{"do": "finish"}], stage_in=(Stage("datasets/none", "dataset"),))

    follower = await finished(harness, spec)

    assert follower.batch is not None
    assert follower.batch.ending is not None
    assert (follower.batch.ending.outcome, follower.batch.ending.code) == (Outcome.FAULT, "INPUT_MISSING")
    assert "datasets/none" in follower.batch.ending.message


async def test_a_stop_does_not_wait_for_a_store_that_hangs(harness: RayHarness) -> None:
    """The dataset is a pipe that nobody writes to: staging it in never ends."""
    spec = await harness.spec([{"do": "finish"}], stage_in=(Stage("datasets/pipe", "dataset"),))
    pipe = harness.folder / "objects" / "datasets" / "pipe"
    os.mkfifo(pipe)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    async with asyncio.timeout(20):
        while (await follower.poll()).state != "starting" or not list(harness.work_root.glob(f"{spec.work_id}-*")):
            await asyncio.sleep(0.1)

    asked_at = time.monotonic()
    await harness.executor.stop(spec.name, StopReason.PAUSE, epoch=1)
    ending = await follower.to_the_end()
    await until_all_is_free(harness.executor)

    assert time.monotonic() - asked_at < 10
    assert (ending.outcome, ending.stop_reason) == (Outcome.STOPPED, StopReason.PAUSE)


async def test_a_stopped_rank_does_not_keep_the_gpu(harness: RayHarness) -> None:
    """Neither the rank nor, through it, the child can be asked any more."""
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 3)
    psutil.Process(harness._pid(f"{spec.name}/r0")).suspend()

    await harness.executor.stop(spec.name, StopReason.CANCEL, epoch=1)
    ending = await follower.to_the_end(timeout_s=30)
    await until_all_is_free(harness.executor)

    assert (ending.outcome, ending.stop_reason) == (Outcome.FAULT, StopReason.CANCEL)
    assert ending.code in ("UNRESPONSIVE", "RANK_DIED")


async def test_a_gang_lives_and_dies_together(harness: RayHarness) -> None:
    spec = await harness.spec([{"do": "report_surroundings"}, *FOREVER], demand=Demand({"slot_io": 1}, ranks=2))
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 5)

    (started,) = follower.of("started")
    (log,) = follower.of("log")
    world = log["metadata"]["config"]["world"]
    assert started["ranks"] == world["size"] == 2
    assert world["init_method"].startswith("tcp://127.0.0.1:")
    harness.kill_rank(spec.name, rank=1)
    ending = await follower.to_the_end()

    assert (ending.outcome, ending.code) == (Outcome.FAULT, "RANK_DIED")
    assert [(times.rank, times.end_ms > times.start_ms) for times in ending.times] == [(0, True), (1, True)]
    assert follower.batch is not None
    assert set(follower.batch.usage) == {"0", "1"}


async def test_no_cluster_is_unreachable_at_once(tmp_path: Path) -> None:
    executor = RayExecutor("127.0.0.1:1", token_file=tmp_path / "token", work_root=str(tmp_path))
    began = time.monotonic()

    assert not (await executor.look()).reachable
    with pytest.raises(Unreachable):
        await executor.poll("a/1", 0, epoch=1, allowance_ms=None)

    assert time.monotonic() - began < 5
    await executor.close()


async def test_the_cluster_answers_nobody_without_its_token(harness: RayHarness) -> None:
    program = (
        "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_get(b'x', b'y')"
    )
    secret = harness.cluster.token_file.read_text()
    for token, accepted in ((secret, True), ("0" * 64, False)):
        asked = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, harness.cluster.address),
            env={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            stderr=subprocess.DEVNULL,
        )
        assert (await asked.wait() == 0) is accepted
        assert await asyncio.to_thread(dashboard_ready, harness.cluster.dashboard, token) is accepted


async def test_a_real_training_run(harness: RayHarness, tmp_path: Path) -> None:
    await harness.new_scheduler(TRAINER)
    model = await asyncio.to_thread(make_tiny_model, tmp_path / "tiny")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word * 3}]}
        for word in ("red", "green", "blue", "black", "white", "grey", "brown", "pink", "gold", "lime", "navy", "teal")
    ]
    spec = await harness.spec([], threads=1)
    await harness.storage.put(spec.stage_in[0].key, "\n".join(json.dumps(row) for row in rows).encode())
    spec.config["base_model"] = {"id": "tiny", "revision": "1", "source": {"kind": "folder", "location": str(model)}}
    spec.config["hyperparameters"] |= {"batchSize": 4, "numEpochs": 3, "checkpointSteps": 3, "validationFraction": 0.2}

    began = time.time()
    follower = await finished(harness, spec)
    await harness.new_scheduler(CHILD)

    assert follower.batch is not None
    ending = follower.batch.ending
    assert ending is not None
    assert ending.outcome == Outcome.COMPLETED, ending
    (plan,) = follower.of("plan")
    assert [event["step"] for event in follower.of("metrics")] == list(range(1, plan["total_steps"] + 1))
    assert follower.of("stored")
    (adapter,) = follower.of("adapter")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= adapter["files"].keys()
    (times,) = ending.times
    assert abs(times.end_ms - times.start_ms - follower.used_ms()) <= 250
    assert follower.events[1].at - began < 30


async def test_what_a_released_attempt_was_made_of_is_gone(harness: RayHarness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    await Follower(harness.executor, spec.name).until("metrics", 3)
    child = harness.child(spec.name)
    rank = child.parent()
    assert rank is not None

    began = time.monotonic()
    await harness.executor.release(spec.name, epoch=1)

    assert time.monotonic() - began < 5
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert harness.remains(spec.name) == []
