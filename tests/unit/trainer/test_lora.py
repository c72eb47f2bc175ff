from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config import TrainConfig
from trainer.lora import Dropout, adapter_state, add_adapter, load_adapter, trainable
from trainer.model import load


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    dropout, x = Dropout(rate), torch.ones(1, 1001, 333, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x)
    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=0.005)
    assert y.mean().item() == pytest.approx(1, abs=0.005)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), y)
    assert not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


def test_the_adapter_is_fp32_on_a_frozen_bf16_base_and_starts_from_the_seed(
    tiny: Path, train_config: TrainConfig
) -> None:
    def fresh() -> torch.nn.Module:
        model = load(tiny, torch.device("cpu"), "bf16")
        return add_adapter(model, train_config.base_model, train_config.hyperparameters)

    one, other = fresh(), fresh()
    names = [name for name, _ in trainable(one)]
    assert len(names) == 2 * 7 * 2
    assert all("lora_" in name for name in names)
    assert {parameter.dtype for _, parameter in trainable(one)} == {torch.float32}
    assert {parameter.dtype for parameter in one.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    assert sum(isinstance(module, Dropout) for module in one.modules()) == 14
    left, right = adapter_state(one), adapter_state(other)
    assert all(torch.equal(left[name], right[name]) for name in left)
    load_adapter(other, {name: tensor + 1 for name, tensor in left.items()})
    assert all(torch.equal(tensor, left[name] + 1) for name, tensor in adapter_state(other).items())
