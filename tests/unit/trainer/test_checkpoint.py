from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch

from trainer import checkpoint as saved
from trainer.checkpoint import Checkpoint, State
from trainer.errors import TrainerError
from trainer.protocol import MANIFEST


@pytest.fixture
def content() -> Checkpoint:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}
    state = State(step=7, evaluated=5, training_loss=1.5, best_loss=1.25, best_step=5, before={"loss": 2.0})
    return Checkpoint(state, tensors, {"0.exp_avg": torch.zeros(3)}, {"a": torch.full((2, 3), 0.1)})


def test_what_is_saved_comes_back(content: Checkpoint, tmp_path: Path) -> None:
    written = saved.save(content, tmp_path / "checkpoints" / "a1-s7", epoch=2)
    again = saved.load(written.path)
    assert again.state == content.state
    assert again.best is not None
    for left, right in [(again.adapter, content.adapter), (again.optimizer, content.optimizer)]:
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert written.sha256 == sha256((written.path / MANIFEST).read_bytes()).hexdigest()
    assert written.size == sum(file.stat().st_size for file in written.path.iterdir())
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["a1-s7"]


def test_saving_replaces_what_was_there(content: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a1-s7").mkdir()
    (tmp_path / "a1-s7" / "old").touch()
    (tmp_path / ".a1-s7.part").mkdir()
    saved.save(content._replace(best=None), tmp_path / "a1-s7", epoch=2)
    assert saved.load(tmp_path / "a1-s7").best is None
    assert not (tmp_path / "a1-s7" / "old").exists()


@pytest.mark.parametrize("name", [saved.ADAPTER, saved.OPTIMIZER, saved.STATE, saved.BEST, MANIFEST])
@pytest.mark.parametrize("harm", ["missing", "short", "changed"])
def test_a_torn_checkpoint_is_never_read(content: Checkpoint, tmp_path: Path, name: str, harm: str) -> None:
    folder = saved.save(content, tmp_path / "a1-s7", epoch=2).path
    data = (folder / name).read_bytes()
    if harm == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[:-1] if harm == "short" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(TrainerError) as caught:
        saved.load(folder)
    assert caught.value.code == "CHECKPOINT_TORN"


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": {}}', '{"files": []}', '{"files": {"../x": 1}}'])
def test_a_manifest_that_names_too_little_is_torn(content: Checkpoint, tmp_path: Path, manifest: str) -> None:
    folder = saved.save(content, tmp_path / "a1-s7", epoch=2).path
    (folder / MANIFEST).write_text(manifest)
    with pytest.raises(TrainerError):
        saved.verify(folder)


def test_pruning_keeps_the_newest(content: Checkpoint, tmp_path: Path) -> None:
    for step in (9, 10, 11):
        saved.save(content, tmp_path / f"a1-s{step}", epoch=2)
    saved.prune(tmp_path, 2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["a1-s10", "a1-s11"]


def test_the_optimiser_goes_on_where_it_was() -> None:
    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.ones(4))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = parameter.detach() * torch.arange(4.0)
        optimizer.step()

    one, optimizer = fresh()
    for _ in range(3):
        step(one, optimizer)
    other, resumed = fresh()
    other.data.copy_(one.data)
    saved.restore_optimizer(resumed, saved.optimizer_tensors(optimizer))
    step(one, optimizer)
    step(other, resumed)
    assert torch.equal(one, other)
