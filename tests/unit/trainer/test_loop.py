from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.unit.trainer.conftest import Recorder, v4_rows, write_jsonl
from trainer import loop
from trainer.chat import Chat, Document
from trainer.config import BaseModelSource, TrainConfig, World, dump
from trainer.control import StopRequest
from trainer.errors import TrainerError
from trainer.export import model_card
from trainer.formats import Conversation, Message
from trainer.protocol import (
    USER_FAULTS,
    Adapter,
    Checkpoint,
    ChildEvent,
    Evaluation,
    Event,
    Failed,
    Finished,
    Log,
    Metrics,
    Phase,
    Plan,
    Sample,
)

replace = msgspec.structs.replace


def configured(config: TrainConfig, **hyperparameters: Any) -> TrainConfig:
    return replace(config, hyperparameters=replace(config.hyperparameters, **hyperparameters))


def run(config: TrainConfig, stop_at: Callable[[Event], bool] | None = None) -> tuple[Finished, Recorder]:
    stop = StopRequest()

    def react(event: Event) -> None:
        if stop_at and stop_at(event):
            stop.ask("PAUSE")

    record = Recorder(react)
    finished = loop.train(config, record, stop)
    record(finished)
    return finished, record


def weights(config: TrainConfig) -> bytes:
    return (Path(config.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_from_start_to_end(train_config: TrainConfig, tiny: Path) -> None:
    finished, record = run(configured(train_config, eval_steps=3, checkpoint_steps=4))
    (plan,) = record.of(Plan)
    total = plan.total_steps
    assert total == 2 * -(-plan.train_conversations // 4) >= 10
    assert plan.train_conversations + plan.validation_conversations == 27
    assert plan.parameters == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny).parameters())
    metrics, evaluations = record.of(Metrics), record.of(Evaluation)
    assert [event.step for event in metrics] == list(range(1, total + 1))
    assert [event.step for event in evaluations] == sorted({*range(0, total, 3), total})
    assert [event.step for event in record.of(Checkpoint)] == sorted({*range(4, total, 4), total})
    assert evaluations[-1].validation_loss < evaluations[0].validation_loss - 0.1
    assert metrics[-1].epoch == plan.total_epochs == 2
    assert all(event.throughput > 0 and event.tokens > 0 for event in metrics)
    assert [event.name for event in record.of(Phase)][:3] == ["loading", "evaluating", "training"]
    assert [event.when for event in record.of(Sample)] == ["before", "after"]

    best = min(evaluations[1:], key=lambda event: event.validation_loss)
    assert best.best
    assert finished.outcome == "completed"
    result = finished.result
    assert result["bestStep"] == best.step == record.of(Adapter)[0].best_step
    assert result["finalValidationLoss"] == result["after"]["loss"] == best.validation_loss
    assert result["before"]["loss"] == evaluations[0].validation_loss
    assert result["perplexity"] == pytest.approx(best.perplexity)
    assert result["finalTrainingLoss"] == metrics[-1].training_loss
    assert result["tokens"] == sum(event.tokens for event in metrics)
    assert result["tokensPerS"] > 0
    assert [len(result[when]["samples"]) for when in ("before", "after")] == [1, 1]


def test_the_adapter_is_plain_peft_and_does_what_was_measured(train_config: TrainConfig, tiny: Path) -> None:
    finished, record = run(configured(train_config, max_steps=3, use_rslora=True))
    folder = Path(record.of(Adapter)[0].path)
    assert record.of(Adapter)[0].size == sum(file.stat().st_size for file in folder.iterdir())
    settings = json.loads((folder / "adapter_config.json").read_bytes())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("tests/tiny", "r1")
    assert settings["target_modules"] == sorted(train_config.hyperparameters.target_modules)
    assert settings["use_rslora"] is True
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    assert (folder / "chat_template.jinja").read_text() == (tiny / "chat_template.jinja").read_text()
    card = (folder / "README.md").read_text()
    assert f"{finished.result['finalValidationLoss']:.4f}" in card
    assert '"useRslora": true' in card
    assert str(tiny) not in card
    assert "dequantised" not in card

    ids = torch.arange(100, 120)[None]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            answer: torch.Tensor = model(input_ids=ids).logits
            return answer

    base = LlamaForCausalLM.from_pretrained(tiny)
    plain = logits(base)
    adapted = PeftModel.from_pretrained(base, folder)
    assert not torch.allclose(logits(adapted), plain, atol=1e-3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(logits(adapted), plain)


_whole: dict[str, tuple[bytes, Finished]] = {}


@pytest.fixture
def unbroken(train_config: TrainConfig, tmp_path: Path) -> tuple[TrainConfig, bytes, Finished]:
    """Seven steps with dropout, an evaluation at every third, never interrupted (run once for all tests)."""
    config = configured(train_config, max_steps=7, eval_steps=3, checkpoint_steps=3)
    if not _whole:
        elsewhere = replace(config, output_dir=str(tmp_path / "whole"))
        finished, _ = run(elsewhere)
        _whole["run"] = weights(elsewhere), finished
    return config, *_whole["run"]


STOPS: dict[str, Callable[[Event], bool]] = {
    "before the first step": lambda event: isinstance(event, Sample),
    "after step 2": lambda event: isinstance(event, Metrics) and event.step == 2,
    "before the evaluation of step 3": lambda event: isinstance(event, Metrics) and event.step == 3,
    "after the checkpoint of step 6": lambda event: isinstance(event, Checkpoint) and event.step == 6,
}


@pytest.mark.parametrize("where", STOPS)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    unbroken: tuple[TrainConfig, bytes, Finished], where: str
) -> None:
    config, expected, whole = unbroken
    stopped, record = run(config, STOPS[where])
    assert stopped.outcome == "stopped"
    assert stopped.reason == "PAUSE"
    last = record.of(Checkpoint)[-1]
    assert last.step == stopped.step
    assert not (Path(config.output_dir) / "adapter").exists()
    resumed, record = run(replace(config, attempt=2, resume_from=last.path))
    assert record.of(Plan)[0].start_step == stopped.step
    assert weights(config) == expected
    for name in ("finalTrainingLoss", "finalValidationLoss", "bestStep", "tokens", "before", "after"):
        assert resumed.result[name] == whole.result[name], name


def test_a_stop_after_the_last_step_comes_too_late(unbroken: tuple[TrainConfig, bytes, Finished]) -> None:
    config, expected, _ = unbroken
    finished, _ = run(config, lambda event: isinstance(event, Checkpoint) and event.step == 7)
    assert finished.outcome == "completed"
    assert weights(config) == expected


def test_a_stop_within_a_step_drops_that_step(
    train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loop.TOKEN_BUDGET, "cpu", 64)
    config = configured(train_config, max_steps=3)
    run(replace(config, output_dir=str(tmp_path / "whole")))
    stop, passes = StopRequest(), 0

    def count(*arguments: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == 3:
            stop.ask("BUDGET")
        return likelihood(*arguments)

    likelihood = loop.negative_log_likelihood
    monkeypatch.setattr(loop, "negative_log_likelihood", count)
    record = Recorder()
    stopped = loop.train(config, record, stop)
    assert (stopped.reason, stopped.step, passes) == ("BUDGET", 0 if len(record.of(Metrics)) == 0 else 1, 3)
    run(replace(config, attempt=2, resume_from=record.of(Checkpoint)[-1].path))
    assert weights(config) == weights(replace(config, output_dir=str(tmp_path / "whole")))


def test_a_child_killed_in_mid_run_is_resumed_bit_for_bit(
    unbroken: tuple[TrainConfig, bytes, Finished], tmp_path: Path
) -> None:
    config, expected, _ = unbroken
    (tmp_path / "config.json").write_bytes(dump(config))
    environment = {"PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "trainer", str(tmp_path / "config.json"), "--supervised"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as child:
        assert child.stdout
        for line in child.stdout:
            event = msgspec.json.decode(line, type=ChildEvent)
            assert not isinstance(event, Failed), event
            if isinstance(event, Metrics) and event.step == 5:
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    run(replace(config, attempt=2, resume_from=str(Path(config.output_dir) / "checkpoints" / "a1-s3")))
    assert weights(config) == expected


def test_the_best_weights_are_kept_and_training_stops_when_it_gets_worse(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([9.0, 5.0, 4.0, 6.0, 7.0, 1.0])
    monkeypatch.setattr(loop, "validation_loss", lambda *_: loop.Score(next(scores), 1))
    config = configured(train_config, eval_steps=1, early_stopping=2, num_epochs=9, lr_scheduler="constant")
    finished, record = run(config)
    assert [event.step for event in record.of(Metrics)] == [1, 2, 3, 4]
    assert [event.best for event in record.of(Evaluation)] == [False, True, True, False, False]
    assert (finished.step, finished.result["bestStep"], finished.result["finalValidationLoss"]) == (4, 2, 4.0)


def test_without_validation_the_last_weights_are_shipped(train_config: TrainConfig) -> None:
    finished, record = run(configured(train_config, validation_fraction=0.0, max_steps=2))
    assert record.of(Evaluation) == record.of(Sample) == []
    assert finished.result["finalValidationLoss"] is None
    assert finished.result["bestStep"] == 2
    assert (
        "| validation loss (nats per learned token) | – | – |"
        in (Path(train_config.output_dir) / "adapter" / "README.md").read_text()
    )


def test_old_checkpoints_are_pruned_only_when_asked(train_config: TrainConfig) -> None:
    config = configured(train_config, checkpoint_steps=1, max_steps=4, validation_fraction=0.0)
    loop.train(config, Recorder(), StopRequest(), keep=2)
    assert sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir()) == ["a1-s3", "a1-s4"]


def test_training_goes_on_from_a_parent_adapter(train_config: TrainConfig, tmp_path: Path) -> None:
    config = configured(train_config, max_steps=3)
    first, record = run(config)
    child = replace(config, parent_adapter=record.of(Adapter)[0].path, output_dir=str(tmp_path / "child"))
    _, record = run(child)
    assert record.of(Evaluation)[0].validation_loss == pytest.approx(first.result["finalValidationLoss"], rel=1e-3)
    with pytest.raises(TrainerError, match="another shape") as caught:
        run(configured(child, lora_rank=2))
    assert caught.value.code == "BAD_CONFIG"


def test_a_loss_that_is_not_a_number_ends_the_run(train_config: TrainConfig, tmp_path: Path, tiny: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    source = replace(train_config.base_model.source, location=str(broken))
    config = replace(
        configured(train_config, validation_fraction=0.0), base_model=replace(train_config.base_model, source=source)
    )
    with pytest.raises(TrainerError, match="became nan") as caught:
        run(config)
    assert caught.value.code == "NAN_LOSS"
    assert caught.value.advice


@pytest.mark.parametrize(
    "change",
    [
        lambda config: configured(config, target_modules=("q_proj", "nothing")),
        lambda config: configured(config, quantization="4bit"),
        lambda config: replace(config, world=World(size=2)),
    ],
    ids=["modules", "quantization", "ranks"],
)
def test_what_cannot_be_done_is_refused(
    train_config: TrainConfig, change: Callable[[TrainConfig], TrainConfig]
) -> None:
    with pytest.raises(TrainerError) as caught:
        run(change(train_config))
    assert caught.value.code == "BAD_CONFIG"
    assert caught.value.code in USER_FAULTS


def test_what_is_cut_off_is_reported(train_config: TrainConfig, tiny: Path) -> None:
    rows = v4_rows(6)
    rows[2]["turns"][1]["content"] = "word " * 200
    write_jsonl(Path(train_config.dataset_path), rows)
    conversation = Conversation(3, None, None, tuple(Message(**turn) for turn in rows[2]["turns"]))
    document = Chat(tiny, 192).encode([conversation])[0]
    assert isinstance(document, Document)
    _, record = run(configured(train_config, max_seq_length=192, max_steps=1, validation_fraction=0.0))
    (log,) = record.of(Log)
    assert log.level == "WARNING"
    lost = document.length - 192
    assert log.message == f"1 conversations are longer than 192 tokens: {lost} tokens were cut off"


def test_a_stop_while_loading_leaves_nothing(train_config: TrainConfig) -> None:
    stopped, record = run(train_config, lambda event: isinstance(event, Phase))
    assert (stopped.outcome, stopped.step) == ("stopped", 0)
    assert record.of(Checkpoint) == []


def test_the_dataset_is_checked_again(train_config: TrainConfig) -> None:
    write_jsonl(Path(train_config.dataset_path), [*v4_rows(5), "{"])
    with pytest.raises(TrainerError, match="line 6: NOT_JSON"):
        run(train_config)


def test_the_card_says_when_the_base_was_dequantised(train_config: TrainConfig) -> None:
    source = BaseModelSource("gguf", "package:some_model/Some-Model.Q4_1.gguf", "Q4_1")
    packaged = msgspec.structs.replace(
        train_config, base_model=msgspec.structs.replace(train_config.base_model, source=source)
    )
    result = {"before": {}, "after": {}, "bestStep": 1, "finalTrainingLoss": 1.0, "tokens": 1, "tokensPerS": 1.0}
    plan = Plan(total_steps=1, total_epochs=1, train_conversations=1, validation_conversations=0)

    card = model_card(packaged, result, plan=plan, steps=1)

    assert "dequantised from `Some-Model.Q4_1.gguf`" in card
