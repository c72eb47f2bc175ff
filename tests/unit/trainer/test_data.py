from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.unit.trainer.conftest import v4_rows, write_jsonl
from trainer.chat import Chat
from trainer.config import TrainConfig
from trainer.control import StopRequest
from trainer.data import Corpus, pack, prepare
from trainer.errors import Stopped, TrainerError
from trainer.lora import add_adapter, trainable
from trainer.model import document_attention, load, negative_log_likelihood


@pytest.fixture
def corpus(train_config: TrainConfig, tiny: Path) -> Corpus:
    return prepare(train_config, Chat(tiny, 256), StopRequest())


def test_the_corpus_holds_every_conversation_once_and_its_prompts_come_from_validation(
    corpus: Corpus, train_config: TrainConfig
) -> None:
    assert sorted([*corpus.train, *corpus.validation]) == list(range(27))
    assert 1 <= len(corpus.validation) <= 9
    row = v4_rows(27)[corpus.validation[0]]
    (prompt,) = corpus.prompts
    assert [message.content for message in prompt.messages] == [row["turns"][0]["content"]]
    assert prompt.reference == row["turns"][1]["content"]
    assert [file.name for file in Path(train_config.work_dir).iterdir()] == ["documents.arrow"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"turns": []}, "BAD_DATA"),
        (
            {"turns": [{"role": "user", "content": "w " * 400}, {"role": "assistant", "content": "x"}]},
            "NOTHING_TO_LEARN",
        ),
    ],
)
def test_a_dataset_that_a_verdict_would_refuse_is_refused(
    train_config: TrainConfig, tiny: Path, change: dict[str, Any], code: str
) -> None:
    rows = v4_rows(5)
    rows[2].update(change)
    write_jsonl(Path(train_config.dataset_path), rows)
    with pytest.raises(TrainerError, match="line 3") as caught:
        prepare(train_config, Chat(tiny, 256), StopRequest())
    assert caught.value.code == code


def test_all_rows_for_validation_leave_nothing_to_train_on(train_config: TrainConfig, tiny: Path) -> None:
    write_jsonl(Path(train_config.dataset_path), [{**row, "split": "validation"} for row in v4_rows(3)])
    with pytest.raises(TrainerError, match="No conversation is left"):
        prepare(train_config, Chat(tiny, 256), StopRequest())


def test_reading_can_be_stopped(train_config: TrainConfig, tiny: Path) -> None:
    stop = StopRequest()
    stop.ask("PAUSE")
    with pytest.raises(Stopped):
        prepare(train_config, Chat(tiny, 256), stop)


@pytest.mark.parametrize("budget", [1, 90, 10_000])
def test_packing_keeps_every_token_and_label(corpus: Corpus, budget: int) -> None:
    rows = corpus.train[:9]
    packs = pack(corpus.documents, rows, budget)
    entries = {tuple(corpus.documents[int(row)]["ids"].tolist()): corpus.documents[int(row)] for row in rows}
    seen = []
    for packed in packs:
        assert packed.tokens == sum(packed.lengths) == packed.position_ids.shape[1]
        assert packed.tokens <= budget or len(packed.lengths) == 1
        start = 0
        for length in packed.lengths:
            ids = tuple(packed.ids[0, start : start + length].tolist())
            assert packed.position_ids[0, start : start + length].tolist() == list(range(length))
            inside = [p - start for p in packed.positions.tolist() if start <= p < start + length]
            assert inside == (np.flatnonzero(entries[ids]["learned"]) - 1).tolist()
            seen.append(ids)
            start += length
        assert packed.targets.tolist() == packed.ids[0, packed.positions + 1].tolist()
    assert sorted(seen) == sorted(entries)
    assert len(packs) == {1: 9, 10_000: 1}.get(budget, len(packs))


def test_packed_documents_give_the_loss_and_gradients_of_each_alone(
    corpus: Corpus, tiny: Path, train_config: TrainConfig
) -> None:
    h = msgspec.structs.replace(train_config.hyperparameters, lora_dropout=0.0)
    adapted = add_adapter(load(tiny, torch.device("cpu"), "fp32"), train_config.base_model, h)
    model = adapted.get_base_model().train()
    parameters = [parameter for _, parameter in trainable(adapted)]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)

    def gradients(budget: int) -> tuple[list[float], list[torch.Tensor]]:
        adapted.zero_grad()
        losses = [negative_log_likelihood(model, packed) for packed in pack(corpus.documents, corpus.train[:7], budget)]
        torch.stack(losses).sum().backward()
        return [loss.item() for loss in losses], [p.grad.clone() for p in parameters if p.grad is not None]

    (together,), packed = gradients(10_000)
    apart, single = gradients(1)
    assert len(apart) == 7
    assert together == pytest.approx(sum(apart), rel=1e-5)
    assert len(packed) == len(single) == len(parameters)
    for left, right in zip(packed, single, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_the_loss_is_that_of_the_plain_model_on_each_document(corpus: Corpus, tiny: Path) -> None:
    from transformers import LlamaForCausalLM

    ours = load(tiny, torch.device("cpu"), "fp32")
    plain = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")
    expected = 0.0
    for row in corpus.train[:5]:
        document = corpus.documents[int(row)]
        ids = torch.from_numpy(document["ids"].astype(np.int64))
        labels = torch.where(torch.from_numpy(document["learned"].copy()), ids, -100)
        with torch.no_grad():
            logits = plain(input_ids=ids[None]).logits[0]
        expected += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
    (packed,) = pack(corpus.documents, corpus.train[:5], 10_000)
    with torch.no_grad():
        assert negative_log_likelihood(ours, packed).item() == pytest.approx(expected, rel=1e-5)


def test_attention_within_a_sliding_window() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    module = torch.nn.Identity()
    whole, _ = document_attention(module, query, key, value, None, lengths=[3, 9], sliding_window=4)
    for place in (2, 5, 11):
        start = max(0 if place < 3 else 3, place - 3)
        k, v = (tensor[:, :, start : place + 1].repeat_interleave(2, dim=1) for tensor in (key, value))
        alone = torch.nn.functional.scaled_dot_product_attention(query[:, :, place : place + 1], k, v)
        torch.testing.assert_close(whole[:, place], alone[:, :, 0])
    with pytest.raises(TrainerError, match="soft cap"):
        document_attention(module, query, key, value, None, softcap=30.0)
