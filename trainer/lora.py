"""The adapter: LoRA by PEFT, its weights in fp32 on a frozen base."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import BaseModel, Hyperparameters
from trainer.errors import TrainerError

WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: nn.Module, base: BaseModel, hyperparameters: Hyperparameters) -> PeftModel:
    """Put a fresh adapter on the base; its start follows from the seed. Raises TrainerError BAD_CONFIG."""
    h = hyperparameters
    config = LoraConfig(
        r=h.lora_rank,
        lora_alpha=h.lora_alpha,
        lora_dropout=h.lora_dropout,
        target_modules=list(h.target_modules),
        use_rslora=h.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    suffixes = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := sorted(set(h.target_modules) - suffixes):
        raise TrainerError(
            "BAD_CONFIG",
            f"The base model has no modules named {', '.join(missing)}.",
            "Choose targetModules among its linear layers: "
            + ", ".join(sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})),
        )
    torch.manual_seed(h.seed)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    if h.lora_dropout > 0 and next(model.parameters()).device.type == "cpu":
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_dropout["default"] = Dropout(h.lora_dropout)
    config.base_model_name_or_path, config.revision = base.id, base.revision
    return adapted


class Dropout(nn.Module):
    """Inverted dropout from 16 random bits an element: on a CPU well over twice as fast as torch's."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        dropped = round(rate * 2**16)
        self.threshold = dropped - 2**15
        self.scale = 2**16 / (2**16 - dropped)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= self.threshold
        return x * kept.to(x.dtype).mul_(self.scale)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's parameters, in a fixed order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, by the names that PEFT's files use."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _tensors(model).items()}


def load_adapter(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Set the adapter's weights. Raises TrainerError BAD_CONFIG when they do not fit."""
    expected = {name: tensor.shape for name, tensor in _tensors(model).items()}
    if expected != {name: tensor.shape for name, tensor in state.items()}:
        raise TrainerError(
            "BAD_CONFIG",
            "The adapter to start from has another shape than the one to train.",
            "Use the loraRank and targetModules that it was trained with, on the same base model.",
        )
    set_peft_model_state_dict(model, state)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def _tensors(model: PeftModel) -> dict[str, Tensor]:
    # "auto" would ask the hub for the base model's vocabulary
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
