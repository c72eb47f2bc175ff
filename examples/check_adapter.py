"""Does an adapter work in plain transformers and peft? ``python -m examples.check_adapter GGUF_FILE ADAPTER_FOLDER``

Prints one JSON line: by how much the adapter changes the base model's logits, and by how much with ``lora_B`` zeroed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


@torch.no_grad()
def main(gguf: Path, adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    tokens = AutoTokenizer.from_pretrained(adapter)("Hello! How was your day?", return_tensors="pt").input_ids
    plain = base(tokens).logits

    model = PeftModel.from_pretrained(base, adapter).eval()
    changed = model(tokens).logits
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.zero_()
    zeroed = model(tokens).logits

    difference = {"adapter": (changed - plain).abs().max().item(), "zeroed": (zeroed - plain).abs().max().item()}
    sys.stdout.write(json.dumps({"tokens": tokens.shape[1], "logitChange": difference}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
