"""The training loop, top to bottom: read, prepare, evaluate, step, checkpoint, keep the best, export.

Whatever decides the result (order, packing, dropout, learning rate) follows from (seed, step), so a run that is resumed
from a checkpoint repeats the unbroken one, bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch

from trainer import checkpoint as saved
from trainer.base import context_length, prepare_base, stop_ids
from trainer.chat import Chat
from trainer.checkpoint import Checkpoint, State
from trainer.config import TrainConfig
from trainer.control import StopRequest
from trainer.data import Corpus, pack, prepare
from trainer.errors import Stopped, TrainerError
from trainer.evaluate import Score, samples, validation_loss
from trainer.export import model_card, write_adapter
from trainer.lora import adapter_state, add_adapter, load_adapter, read_adapter, trainable
from trainer.model import TOKEN_BUDGET, load, negative_log_likelihood
from trainer.protocol import (
    Adapter,
    Evaluation,
    Finished,
    Log,
    Metrics,
    Phase,
    PhaseName,
    Plan,
    Sample,
    checkpoint_name,
)
from trainer.protocol import Checkpoint as CheckpointEvent
from trainer.report import Report
from trainer.schedule import Schedule

ADAM_BETAS = (0.9, 0.999)


def train(config: TrainConfig, report: Report, stop: StopRequest, *, keep: int | None = None) -> Finished:
    """Run ``config`` to its end or to a stop request. ``keep``: delete all but so many local checkpoints.

    Raises TrainerError (see its codes in ``trainer.protocol.USER_FAULTS``).
    """
    _check(config)
    report(Phase(name="loading"))
    try:
        run = Run(config, report, stop, keep)
    except Stopped:
        return Finished(outcome="stopped", reason=stop.reason)
    report(run.plan())
    if run.corpus.cut:
        report(Log(level="WARNING", message=run.what_was_cut()))
    while True:
        step = run.state.step
        try:
            if run.schedule.evaluates(step) and run.state.evaluated < step:
                run.evaluate()
            if run.schedule.saves(step) and run.saved < step:
                run.checkpoint()
            if step == run.schedule.total_steps or run.has_converged():
                break
            stop.check()
            run.step()
        except Stopped:
            if run.saved < run.state.step:
                run.checkpoint()
            return Finished(outcome="stopped", step=run.state.step, reason=stop.reason)
    return run.finish()


class Run:
    """One attempt: the model, its data, and how far it has come."""

    def __init__(self, config: TrainConfig, report: Report, stop: StopRequest, keep: int | None) -> None:
        self.config, self.report, self.stop, self.keep = config, report, stop, keep
        self.hyperparameters = h = config.hyperparameters
        torch.set_num_threads(config.threads)
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.budget = TOKEN_BUDGET[self.device.type]
        self.base = prepare_base(config.base_model, config.cache_dir)
        self.chat = Chat(self.base, context_length(self.base, h.max_seq_length))
        self.corpus: Corpus = prepare(config, self.chat, stop)
        self.schedule = Schedule(self.corpus.train, h)
        stop.check()
        self.peft = add_adapter(load(self.base, self.device, h.precision), config.base_model, h)
        self.model = self.peft.get_base_model()
        self.parameters = [parameter for _, parameter in trainable(self.peft)]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=h.learning_rate, betas=ADAM_BETAS, weight_decay=h.weight_decay, fused=True
        )
        self.state = State()
        self.best: dict[str, torch.Tensor] | None = None
        self.saved = -1
        self.phase: PhaseName = "loading"
        if config.parent_adapter:
            load_adapter(self.peft, read_adapter(Path(config.parent_adapter)))
        if config.resume_from:
            self._resume(Path(config.resume_from))
        self.start = self.state.step

    def plan(self) -> Plan:
        adapter = sum(parameter.numel() for parameter in self.parameters)
        return Plan(
            total_steps=self.schedule.total_steps,
            total_epochs=self.schedule.epoch(self.schedule.total_steps),
            train_conversations=len(self.corpus.train),
            validation_conversations=len(self.corpus.validation),
            start_step=self.start,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()) - adapter,
            trainable_parameters=adapter,
        )

    def what_was_cut(self) -> str:
        corpus, limit = self.corpus, self.chat.limit
        return f"{corpus.cut} conversations are longer than {limit} tokens: {corpus.cut_tokens} tokens were cut off"

    def has_converged(self) -> bool:
        patience = self.hyperparameters.early_stopping
        return patience is not None and self.state.stale >= patience

    def step(self) -> None:
        """One optimiser step on ``batch_size`` conversations; nothing of it remains if it is stopped half-way."""
        step, began = self.state.step, time.monotonic()
        self._phase("training")
        self.model.train()
        batch = pack(self.corpus.documents, self.schedule.batch(step), self.budget)
        learned = sum(packed.learned for packed in batch)
        loss = torch.zeros((), device=self.device)
        for index, packed in enumerate(batch):
            self.stop.check()
            torch.manual_seed(self.schedule.dropout_seed(step, index))
            part = negative_log_likelihood(self.model, packed.to(self.device)) / learned
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.hyperparameters.max_grad_norm)
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        training_loss, gradient_norm = loss.item(), norm.item()
        if not math.isfinite(training_loss) or not math.isfinite(gradient_norm):
            raise TrainerError(
                "NAN_LOSS",
                f"The loss became {training_loss} (gradient norm {gradient_norm}) at step {step + 1}.",
                "Lower learningRate, or raise warmupRatio; precision fp32 helps with unusual base models.",
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens, elapsed = sum(packed.tokens for packed in batch), time.monotonic() - began
        self.state.step, self.state.training_loss = step + 1, training_loss
        self.state.tokens, self.state.training_s = self.state.tokens + tokens, self.state.training_s + elapsed
        self.report(
            Metrics(
                step=step + 1,
                epoch=self.schedule.epoch(step + 1),
                training_loss=training_loss,
                learning_rate=rate,
                gradient_norm=gradient_norm,
                throughput=round(tokens / elapsed, 2),
                tokens=tokens,
                gpu_memory=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
            )
        )

    def evaluate(self) -> None:
        """Validation loss here; at step 0 also the answers of the model as it came. The best weights are kept."""
        state, step = self.state, self.state.step
        if len(self.corpus.validation):
            self._phase("evaluating")
            score = validation_loss(self.model, self.corpus, self.budget, self.device, self.stop)
            if step == 0:
                answers = self._answers("before", self.stop)
                state.before = {"loss": score.loss, "perplexity": score.perplexity, "samples": answers}
            state.validation_loss = score.loss
            best = step > 0 and (state.best_loss is None or score.loss < state.best_loss)
            if best:
                state.best_loss, state.best_step, self.best = score.loss, step, adapter_state(self.peft)
            state.stale = 0 if best or step == 0 else state.stale + 1
            self.report(
                Evaluation(
                    step=step,
                    epoch=self.schedule.epoch(step),
                    validation_loss=score.loss,
                    perplexity=score.perplexity,
                    tokens=score.tokens,
                    best=best,
                )
            )
        state.evaluated = step

    def checkpoint(self) -> None:
        """Everything to go on from here, on disk."""
        self._phase("saving")
        state, epoch = self.state, self.schedule.epoch(self.state.step)
        folder = Path(self.config.output_dir) / "checkpoints"
        content = Checkpoint(state, adapter_state(self.peft), saved.optimizer_tensors(self.optimizer), self.best)
        written = saved.save(content, folder / checkpoint_name(self.config.attempt, state.step), epoch)
        self.saved = state.step
        loss = state.validation_loss if state.evaluated == state.step else state.training_loss
        self.report(
            CheckpointEvent(
                step=state.step,
                epoch=epoch,
                loss=loss or 0.0,
                path=str(written.path),
                size=written.size,
                sha256=written.sha256,
                best=state.best_step == state.step > 0,
            )
        )
        if self.keep:
            saved.prune(folder, self.keep)

    def finish(self) -> Finished:
        """Take the best weights, let them answer, write the adapter. A stop request comes too late for this."""
        state = self.state
        weights = self.best or adapter_state(self.peft)
        load_adapter(self.peft, weights)
        self._phase("evaluating")
        score = Score(state.best_loss, 0) if state.best_loss is not None else None
        after = {"loss": score.loss, "perplexity": score.perplexity} if score else {}
        result: dict[str, Any] = {
            "finalTrainingLoss": state.training_loss,
            "finalValidationLoss": score.loss if score else None,
            "perplexity": score.perplexity if score else None,
            "bestStep": state.best_step if self.best else state.step,
            "tokens": state.tokens,
            "tokensPerS": round(state.tokens / state.training_s, 2) if state.training_s else 0.0,
            "before": state.before,
            "after": {**after, "samples": self._answers("after", self.stop.deaf())},
        }
        self._phase("saving")
        card = model_card(self.config, result, plan=self.plan(), steps=state.step)
        folder = Path(self.config.output_dir) / "adapter"
        size = write_adapter(folder, self.peft, weights, self.chat, self.base, card)
        self.report(Adapter(path=str(folder), size=size, best_step=result["bestStep"]))
        return Finished(outcome="completed", step=state.step, result=result)

    def _answers(self, when: Literal["before", "after"], stop: StopRequest) -> list[dict[str, Any]]:
        answers = samples(self.model, self.chat, self.corpus, stop_ids(self.base), self.device, stop)
        for given in answers:
            self.report(Sample(when=when, **given))
        return answers

    def _phase(self, name: PhaseName) -> None:
        if self.phase != name:
            self.phase = name
            self.report(Phase(name=name))

    def _resume(self, folder: Path) -> None:
        checkpoint = saved.load(folder)
        load_adapter(self.peft, checkpoint.adapter)
        saved.restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.state, self.best, self.saved = checkpoint.state, checkpoint.best, checkpoint.state.step


def _check(config: TrainConfig) -> None:
    if config.world.size != 1 or config.hyperparameters.quantization != "none":
        raise TrainerError("BAD_CONFIG", "One rank and no quantization is what this trainer does.", "Change the job.")
