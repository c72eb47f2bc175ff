"""SIGKILL at every write, rename, sync and unlink of a checkpoint: the next start finds a whole one."""

from __future__ import annotations

import asyncio
import shutil
from hashlib import sha256
from pathlib import Path

import torch

from control_plane.storage import Storage
from scheduler.cluster.staging import Torn, fetch_checkpoint
from scheduler.executor import ResumePoint
from tests.integration.kills import victim
from tests.integration.kills.syscalls import Scene, Victim
from trainer import checkpoint
from trainer.protocol import MANIFEST


def test_a_checkpoint_is_written_whole_or_not_at_all(the_victim: Victim, tmp_path: Path) -> None:
    template = tmp_path / "template"
    victim.save(template, 1)

    def look(folder: Path, acknowledged: bool) -> None:
        output = folder / "output"
        checkpoint.load(output / "a1-s1")
        if acknowledged or (output / "a1-s2").exists():
            assert torch.equal(checkpoint.load(output / "a1-s2").adapter["a"], victim.content(2).adapter["a"])
        victim.save(folder)
        checkpoint.load(output / "a1-s2")
        assert sorted(path.name for path in output.iterdir()) == ["a1-s1", "a1-s2"]

    scene = Scene(the_victim, "save", template)
    scene.kill_everywhere(look)
    assert scene.kills["write"] >= 5
    assert scene.kills["rename"] >= 4
    assert scene.kills["sync"] >= 6


def test_a_stored_checkpoint_is_whole_or_the_one_before_is_used(the_victim: Victim, tmp_path: Path) -> None:
    template = tmp_path / "template"
    points = []
    for step in (1, 2):
        victim.save(template, step)
        manifest = (template / "output" / f"a1-s{step}" / MANIFEST).read_bytes()
        key = f"{victim.PREFIX}/a1-s{step}"
        points.insert(0, ResumePoint(str(step), key, sha256(manifest).hexdigest(), step))
    victim.upload(template, 1)

    def look(folder: Path, acknowledged: bool) -> None:
        used = asyncio.run(resume(folder))
        assert used in ((2,) if acknowledged else (1, 2))
        victim.upload(folder)
        assert asyncio.run(resume(folder)) == 2

    async def resume(folder: Path) -> int:
        """As a rank does: the step of the first that is whole."""
        storage = Storage((folder / "objects").as_uri())
        for point in points:
            inputs = folder / "inputs" / point.checkpoint_id
            shutil.rmtree(inputs, ignore_errors=True)
            inputs.mkdir(parents=True)
            try:
                await fetch_checkpoint(storage, point, inputs)
            except Torn:
                continue
            loaded = checkpoint.load(inputs)
            assert torch.equal(loaded.adapter["a"], victim.content(point.step).adapter["a"])
            return loaded.state.step
        raise AssertionError("no checkpoint is whole")

    scene = Scene(the_victim, "upload", template)
    scene.kill_everywhere(look)
    assert scene.kills["write"] >= 5
    assert scene.kills["rename"] >= 5
    assert scene.kills["sync"] >= 10
