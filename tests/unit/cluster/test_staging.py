from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from control_plane.storage import Storage
from scheduler.cluster import staging
from scheduler.cluster.outputs import Outputs
from scheduler.cluster.staging import Torn, fetch_checkpoint, retried, stage_in, upload_folder
from scheduler.executor import ResumePoint, Stage
from trainer.protocol import MANIFEST, Adapter, Checkpoint


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "objects").as_uri())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RETRY_PAUSES_S", (0, 0))


def checkpoint(folder: Path, step: int = 1, *, best: bool = False) -> Checkpoint:
    folder = folder / f"a1-s{step}"
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(b"weights")
    entry = {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    manifest = json.dumps({"files": {"adapter.safetensors": entry}, "step": step, "epoch": 0}).encode()
    (folder / MANIFEST).write_bytes(manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    return Checkpoint(step=step, epoch=0, loss=1.0, path=str(folder), size=7, sha256=digest, best=best)


def point(event: Checkpoint) -> ResumePoint:
    return ResumePoint("id", "checkpoints/c", event.sha256, event.step)


class Flaky(Storage):
    """Fails so many times, then works; notes the order of uploads."""

    def __init__(self, url: str, failures: int) -> None:
        super().__init__(url)
        self.failures = failures
        self.uploaded: list[str] = []

    async def upload(self, path: Any, key: str) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the store is away")
        self.uploaded.append(key)
        await super().upload(path, key)


async def test_a_file_and_a_prefix_are_staged(storage: Storage, tmp_path: Path) -> None:
    await storage.put("datasets/d", b"rows")
    await storage.put("models/m/adapter_config.json", b"{}")
    await storage.put("models/m/deep/weights", b"w")
    await storage.put("models/mother", b"no")

    await stage_in(storage, (Stage("datasets/d", "dataset"), Stage("models/m", "parent", prefix=True)), tmp_path / "in")

    files = {p.relative_to(tmp_path / "in").as_posix() for p in (tmp_path / "in").rglob("*") if p.is_file()}
    assert files == {"dataset", "parent/adapter_config.json", "parent/deep/weights"}


async def test_a_missing_input_is_an_answer_not_an_outage(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await stage_in(storage, (Stage("datasets/none", "dataset"),), tmp_path / "in")
    with pytest.raises(FileNotFoundError):
        await stage_in(storage, (Stage("models/none", "parent", prefix=True),), tmp_path / "in")


async def test_a_whole_checkpoint_comes_back(storage: Storage, tmp_path: Path) -> None:
    event = checkpoint(tmp_path / "out")
    await upload_folder(storage, Path(event.path), "checkpoints/c")

    await fetch_checkpoint(storage, point(event), tmp_path / "back")

    assert (tmp_path / "back" / "adapter.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "back" / MANIFEST).read_bytes() == (Path(event.path) / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("adapter.safetensors", b"others!"),
        ("adapter.safetensors", b"short"),
        ("adapter.safetensors", None),
        (MANIFEST, b"{}"),
        (MANIFEST, None),
    ],
)
async def test_a_torn_checkpoint_is_known(storage: Storage, tmp_path: Path, key: str, content: bytes | None) -> None:
    event = checkpoint(tmp_path / "out")
    await upload_folder(storage, Path(event.path), "checkpoints/c")
    if content is None:
        await storage.delete([f"checkpoints/c/{key}"])
    else:
        await storage.put(f"checkpoints/c/{key}", content)

    with pytest.raises(Torn):
        await fetch_checkpoint(storage, point(event), tmp_path / "back")


async def test_another_checkpoint_in_its_place_is_torn(storage: Storage, tmp_path: Path) -> None:
    await upload_folder(storage, Path(checkpoint(tmp_path / "out", 2).path), "checkpoints/c")

    with pytest.raises(Torn):
        await fetch_checkpoint(storage, point(checkpoint(tmp_path / "out", 1)), tmp_path / "back")


@pytest.mark.parametrize("manifest", [b"no json", b'{"step": 1}', b'{"files": {"../../evil": {}}}', b"[]"])
async def test_a_manifest_that_makes_no_sense_is_torn(storage: Storage, tmp_path: Path, manifest: bytes) -> None:
    await storage.put(f"checkpoints/c/{MANIFEST}", manifest)
    with pytest.raises(Torn):
        await fetch_checkpoint(
            storage, ResumePoint("id", "checkpoints/c", hashlib.sha256(manifest).hexdigest(), 1), tmp_path / "back"
        )
    assert not (tmp_path.parent / "evil").exists()


async def test_an_outage_is_waited_out_and_the_manifest_goes_last(tmp_path: Path) -> None:
    flaky = Flaky((tmp_path / "objects").as_uri(), failures=2)
    event = checkpoint(tmp_path / "out")
    (Path(event.path) / "zzz").write_bytes(b"")

    files = await upload_folder(flaky, Path(event.path), "c")

    assert flaky.uploaded == ["c/adapter.safetensors", "c/zzz", f"c/{MANIFEST}"]
    assert files["adapter.safetensors"] == {
        "key": "c/adapter.safetensors",
        "size": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }


async def test_patience_has_an_end() -> None:
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await retried(fail)
    assert calls == 3


async def test_outputs_keep_their_order_and_their_stamp(storage: Storage, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    outputs = Outputs(storage, "run/artifacts", events.append)
    adapter = tmp_path / "out" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    first, second = checkpoint(tmp_path / "out", 1), checkpoint(tmp_path / "out", 2, best=True)

    outputs.add(first, {"training": 10})
    outputs.add(second, {"training": 20})
    outputs.add(Adapter(path=str(adapter), size=2, best_step=2), {"training": 30})
    await outputs.drain()

    assert [event["type"] for event in events] == ["stored", "stored", "adapter"]
    assert events[1] == {
        "type": "stored",
        "step": 2,
        "epoch": 0,
        "loss": 1.0,
        "key": "run/artifacts/checkpoints/a1-s2",
        "size": 7,
        "sha256": second.sha256,
        "best": True,
        "usage": {"training": 20},
    }
    assert events[0]["best"] is False
    assert await storage.get("run/artifacts/adapter/adapter_config.json") == b"{}"
    assert outputs.failed is None
    assert not any((tmp_path / "out").rglob("*.safetensors"))


async def test_a_slow_store_costs_old_checkpoints_but_not_the_best(storage: Storage, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    outputs = Outputs(storage, "run", events.append)
    for step in range(1, 8):
        outputs.add(checkpoint(tmp_path / "out", step, best=step == 2), {})
    await outputs.drain()

    assert [event["step"] for event in events if event["type"] == "stored"] == [2, 5, 6, 7]
    assert len([event for event in events if event["type"] == "log"]) == 3


async def test_an_adapter_that_cannot_be_stored_is_a_failure(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    outputs = Outputs(Flaky((tmp_path / "objects").as_uri(), failures=99), "run", events.append)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "f").write_text("x")

    outputs.add(checkpoint(tmp_path / "out"), {})
    outputs.add(Adapter(path=str(tmp_path / "adapter"), size=1, best_step=0), {})
    await outputs.drain()

    assert [event["type"] for event in events] == ["log", "log"]
    assert outputs.failed is not None
    assert "the store is away" in outputs.failed


async def test_a_checkpoint_that_is_stored_later_makes_good(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    outputs = Outputs(Flaky((tmp_path / "objects").as_uri(), failures=3), "run", events.append)
    outputs.add(checkpoint(tmp_path / "out", 1), {})
    outputs.add(checkpoint(tmp_path / "out", 2), {})
    await outputs.drain()
    assert [event["type"] for event in events] == ["log", "stored"]
    assert outputs.failed is None


async def test_giving_up_what_is_stored_already_is_nothing(storage: Storage, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    outputs = Outputs(storage, "run", events.append)
    outputs.add(checkpoint(tmp_path / "out", 1), {})
    await outputs.drain()
    outputs.give_up()
    await outputs.drain()
    assert [event["type"] for event in events] == ["stored"]
    assert outputs.failed is None
