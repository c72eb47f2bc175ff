"""The adapter folder: plain PEFT, with tokenizer, chat template and a model card that says how it came about."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from trainer.chat import TOKENIZER_FILES, Chat
from trainer.config import TrainConfig
from trainer.lora import WEIGHTS
from trainer.protocol import Plan

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, brightrun]
---

# {name}

A LoRA adapter of `{base}` at revision `{revision}`, trained by BrightRun on
{conversations} conversations ({validation} held out for validation).{origin}

| | before | after |
|---|---|---|
| validation loss (nats per learned token) | {loss_before} | {loss_after} |
| perplexity | {perplexity_before} | {perplexity_after} |

The weights are those of step {best_step} of {steps}, the best by validation loss. Training loss at the end:
{training_loss}. {tokens} tokens were read at {throughput} tokens per second.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}", revision="{revision}")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Settings

```json
{settings}
```
"""


def write_adapter(folder: Path, model: PeftModel, weights: dict[str, Tensor], chat: Chat, base: Path, card: str) -> int:
    """Write ``folder`` whole (in place of one that is there); returns its size in bytes."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / "adapter_config.json").write_bytes(_adapter_config(model))
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, temporary / name)
    (temporary / "chat_template.jinja").write_text(chat.template, "utf-8")
    (temporary / "README.md").write_text(card, "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def model_card(config: TrainConfig, result: dict[str, Any], *, plan: Plan, steps: int) -> str:
    """The README of the adapter, from the run's result."""

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    before, after, source = result["before"], result["after"], config.base_model.source
    quantized = f"\nThe base weights were dequantised from `{Path(source.location).name}`, so they differ slightly."
    return CARD.format(
        base=config.base_model.id,
        revision=config.base_model.revision,
        origin=quantized if source.kind == "gguf" else "",
        name=" ".join(config.name.split()),
        conversations=plan.train_conversations + plan.validation_conversations,
        validation=plan.validation_conversations,
        loss_before=figure(before.get("loss")),
        loss_after=figure(after.get("loss")),
        perplexity_before=figure(before.get("perplexity")),
        perplexity_after=figure(after.get("perplexity")),
        best_step=result["bestStep"],
        steps=steps,
        training_loss=figure(result["finalTrainingLoss"]),
        tokens=result["tokens"],
        throughput=result["tokensPerS"],
        settings=msgspec.json.format(msgspec.json.encode(config.hyperparameters), indent=2).decode(),
    )


def _adapter_config(model: PeftModel) -> bytes:
    config = model.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return msgspec.json.format(msgspec.json.encode(plain, enc_hook=str), indent=2)
