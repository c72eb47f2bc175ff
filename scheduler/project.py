"""A batch of events as rows: the job's stream and its projections, in the caller's transaction."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import usd
from control_plane.services import datasets
from control_plane.services.lifecycle import (
    NewEvent,
    append_events,
    iso,
    log_entry,
    log_payload,
    stage_payload,
    transition,
)
from control_plane.services.sql import ROW
from control_plane.states import Stage, Status
from control_plane.tables import Attempt, Checkpoint, MetricsPoint, TrainingJob, Verdict, now
from scheduler import ledger, retention
from scheduler.heard import Adapter, Heard, Pending, Started, Stored
from trainer import protocol
from trainer.protocol import Evaluation, Failed, Finished, Log, Metrics, Phase, Plan, Sample

STAGE_OF_PHASE = {
    "loading": Stage.INITIALIZING,
    "training": Stage.TRAINING,
    "evaluating": Stage.VALIDATING,
    "saving": Stage.SAVING,
}
PENDING_REASONS = {
    "NO_RESOURCES": "Waits for the cluster to free what it needs",
    "INFEASIBLE": "No node of the cluster can hold it",
}
PACE_STEPS = 20
"""Steps over which the time to completion is estimated."""
TORN = "Work that is lost is not billed. Checkpoints that are not whole and were given up, of step"
MIB = 1024 * 1024


class JobProjection:
    """Applies one batch of one attempt to its job; ``apply`` leaves everything flushed.

    ``torn``: storage prefixes of checkpoints that were given up, to delete once the transaction has committed.
    """

    def __init__(self, session: AsyncSession, job: TrainingJob, attempt: Attempt) -> None:
        self._session = session
        self._job = job
        self._attempt = attempt
        self._points: dict[int, MetricsPoint] = {}
        self._out: list[NewEvent] = []
        self.torn: list[str] = []

    async def apply(self, heard: list[Heard]) -> None:
        steps = {h.event.step for h in heard if isinstance(h.event, Metrics | Evaluation)}
        found = await self._session.scalars(
            select(MetricsPoint).where(MetricsPoint.job_id == self._job.id, MetricsPoint.step.in_(steps))
        )
        self._points = {point.step: point for point in found}
        for item in heard:
            await self._hear(item)
        if steps:
            await self._tell_progress(heard[-1].number)
        await self._flush()

    async def _hear(self, heard: Heard) -> None:
        match heard.event:
            case Metrics() as event:
                self._on_metrics(heard, event)
            case Evaluation() as event:
                self._on_evaluation(heard, event)
            case Stored() as event:
                await self._on_stored(heard, event)
            case Started() as event:
                await self._on_started(heard, event)
            case Log() as event:
                self._log(heard, event.level, event.message, event.metadata)
            case _:
                self._gather(heard)

    def _gather(self, heard: Heard) -> None:
        """Events that change nothing but the job's own row."""
        match heard.event:
            case Phase(name=name):
                self._enter(heard, STAGE_OF_PHASE[name])
            case Plan() as event:
                self._on_plan(event)
            case Pending(reason=reason):
                self._wait(heard, PENDING_REASONS.get(reason, reason))
            case Sample() as event:
                self._on_sample(event)
            case Adapter(files=files, best_step=best_step):
                self._keep(adapter={"files": files, "bestStep": best_step})
            case Finished(outcome="completed", result=result):
                self._keep(trained=result)
            case Failed() as event:
                self._job.error_code = event.code[:64]
                self._job.error_message = " ".join(filter(None, (event.message, event.advice)))
                self._job.error_stack = event.stack or None

    def _on_metrics(self, heard: Heard, event: Metrics) -> None:
        point = self._points.get(event.step)
        if point is None:
            point = self._points[event.step] = MetricsPoint(job_id=self._job.id, step=event.step)
            self._session.add(point)
        point.timestamp = heard.at
        point.epoch = event.epoch
        point.training_loss = event.training_loss
        point.learning_rate = event.learning_rate
        point.gradient_norm = event.gradient_norm
        point.throughput = event.throughput
        point.gpu_utilization = event.gpu_utilization
        point.gpu_memory = event.gpu_memory
        self._job.current_step = event.step
        self._job.current_epoch = event.epoch
        self._tell_point(heard, point)

    def _on_evaluation(self, heard: Heard, event: Evaluation) -> None:
        figures = {"step": event.step, "validationLoss": event.validation_loss, "perplexity": event.perplexity}
        if event.step == 0:
            self._keep(before=figures)
            self._log(heard, "INFO", f"Validation loss before training: {event.validation_loss:.4f}", figures)
        elif event.step in self._points:
            self._points[event.step].validation_loss = event.validation_loss
            self._tell_point(heard, self._points[event.step])

    def _tell_point(self, heard: Heard, point: MetricsPoint) -> None:
        self._job.current_metrics = metrics_payload(point)
        self._tell(heard, "metrics", self._job.current_metrics)

    async def _on_stored(self, heard: Heard, event: Stored) -> None:
        if event.best:
            await self._session.execute(
                update(Checkpoint).where(Checkpoint.job_id == self._job.id, Checkpoint.best).values(best=False)
            )
        same = select(Checkpoint).where(Checkpoint.attempt_id == self._attempt.id, Checkpoint.step == event.step)
        checkpoint = await self._session.scalar(same)
        if checkpoint is None:
            checkpoint = Checkpoint(job_id=self._job.id, attempt_id=self._attempt.id, step=event.step)
        checkpoint.epoch = event.epoch
        checkpoint.loss = event.loss or 0.0
        checkpoint.storage_key = event.key
        checkpoint.file_size = event.size
        checkpoint.sha256 = event.sha256
        checkpoint.best = event.best
        checkpoint.usage = event.usage
        checkpoint.deleted_at = None
        self._session.add(checkpoint)
        self._log(heard, "INFO", f"Checkpoint at step {event.step} stored ({event.size / MIB:.1f} MiB)")

    async def _on_started(self, heard: Heard, event: Started) -> None:
        self._attempt.started_at = heard.at
        self._attempt.node = event.node
        self._attempt.resumed_from = event.checkpoint_id
        whence = f", going on from step {event.step}" if event.checkpoint_id else ""
        self._log(heard, "INFO", f"Attempt {self._attempt.number} runs{whence}")
        await self._give_up_torn(heard, event.checkpoint_id)
        await self._flush()
        started = {"started_at": self._job.started_at or heard.at, "queue_reason": None}
        await transition(self._session, self._job, Status.RUNNING, attempt=self._attempt.number, **started)

    async def _give_up_torn(self, heard: Heard, used_id: str | None) -> None:
        """The checkpoints that are newer than the one that was used are not whole: they are not offered again, and what
        was billed for the work that they held is the platform's."""
        offered = [
            point
            for point in await retention.resume_points(self._session, self._job)
            if point.attempt_id != self._attempt.id
        ]
        used = next((point for point in offered if point.id == used_id), None)
        if used is None and used_id is not None:
            return
        torn = offered[: offered.index(used)] if used else offered
        for job_id in dict.fromkeys(point.job_id for point in torn):
            ours = job_id == self._job.id
            job = self._job if ours else await self._session.get_one(TrainingJob, job_id, with_for_update=ROW)
            await ledger.absorb_past(self._session, job, used if used and used.job_id == job_id else None)
        for point in torn:
            point.deleted_at = now()
            self.torn.append(point.storage_key)
        if torn:
            steps = ", ".join(str(point.step) for point in torn)
            entry = log_entry(self._job.id, heard.at, "WARNING", f"{TORN} {steps}", None)
            self._session.add(entry)
            self._out.append(NewEvent("log", log_payload(entry), f"{heard.number}.torn"))
            self._out.append(NewEvent("cost", cost_payload(self._job), f"{heard.number}.cost"))

    def _on_plan(self, event: Plan) -> None:
        self._job.total_steps = event.total_steps
        self._job.total_epochs = event.total_epochs
        self._job.current_step = event.start_step
        self._set_progress()

    def _on_sample(self, event: Sample) -> None:
        samples = dict((self._job.result or {}).get("samples") or {})
        others = [sample for sample in samples.get(event.when, []) if sample["prompt"] != event.prompt]
        told = {"prompt": event.prompt, "answer": event.answer, "reference": event.reference}
        self._keep(samples={**samples, event.when: [*others, told]})

    def _enter(self, heard: Heard, stage: Stage) -> None:
        if stage is not self._job.current_stage:
            self._job.current_stage = stage
            self._tell(heard, "stage", stage_payload(self._job))

    def _wait(self, heard: Heard, reason: str) -> None:
        if reason != self._job.queue_reason:
            self._job.queue_reason = reason[:300]
            self._tell(heard, "stage", stage_payload(self._job))

    def _keep(self, **parts: Any) -> None:
        """Gather what the artifact will be made of."""
        self._job.result = {**(self._job.result or {}), **parts}

    def _log(self, heard: Heard, level: str, message: str, metadata: dict[str, Any] | None = None) -> None:
        entry = log_entry(self._job.id, heard.at, level, message, metadata)
        self._session.add(entry)
        self._tell(heard, "log", log_payload(entry))

    async def _tell_progress(self, number: int) -> None:
        self._set_progress()
        job = self._job
        job.estimated_completion_at = await self._completion()
        self._out.append(NewEvent("progress", progress_payload(job), f"{number}.progress"))

    def _set_progress(self) -> None:
        if self._job.total_steps:
            self._job.progress = round(100 * (self._job.current_step or 0) / self._job.total_steps, 1)

    async def _completion(self) -> datetime | None:
        """When the last step will be done, at the pace of the last ones."""
        job = self._job
        if not job.total_steps or not job.current_step:
            return None
        await self._session.flush()
        recent = (
            await self._session.execute(
                select(MetricsPoint.step, MetricsPoint.timestamp)
                .where(MetricsPoint.job_id == job.id, MetricsPoint.step <= job.current_step)
                .order_by(MetricsPoint.step.desc())
                .limit(PACE_STEPS)
            )
        ).all()
        steps = recent[0].step - recent[-1].step if recent else 0
        if steps <= 0:
            return None
        seconds = max(0.0, (recent[0].timestamp - recent[-1].timestamp).total_seconds()) / steps
        return recent[0].timestamp + timedelta(seconds=seconds * (job.total_steps - job.current_step))

    def _tell(self, heard: Heard, type: str, payload: dict[str, Any]) -> None:
        self._out.append(NewEvent(type, payload, str(heard.number)))

    async def _flush(self) -> None:
        await self._session.flush()
        if self._out:
            await append_events(self._session, self._job.id, self._out, attempt_id=self._attempt.id)
            self._out = []


class VerdictProjection:
    def __init__(self, session: AsyncSession, verdict: Verdict, attempt: Attempt) -> None:
        self._session = session
        self._verdict = verdict
        self._attempt = attempt

    async def apply(self, heard: list[Heard]) -> None:
        for _, at, event in heard:
            match event:
                case Started(node=node):
                    self._attempt.started_at, self._attempt.node = at, node
                    await transition(
                        self._session, self._verdict, Status.RUNNING, attempt=self._attempt.number, started_at=at
                    )
                case protocol.Progress(percent=percent):
                    self._verdict.progress = min(100.0, max(0.0, percent))
                case protocol.Verdict(report=report):
                    await datasets.apply_verdict(self._session, self._verdict, report)
                case Failed() as event:
                    self._verdict.error_code = event.code[:64]
                    self._verdict.error_message = " ".join(filter(None, (event.message, event.advice)))
                    self._verdict.error_stack = event.stack or None
        await self._session.flush()


def cost_payload(job: TrainingJob) -> dict[str, Any]:
    return {
        "currentCost": usd(job.current_cost_microusd),
        "estimatedTotalCost": usd(job.estimated_total_cost_microusd),
    }


def progress_payload(job: TrainingJob) -> dict[str, Any]:
    return {
        "progress": job.progress,
        "step": job.current_step,
        "totalSteps": job.total_steps,
        "epoch": job.current_epoch,
    }


def metrics_payload(point: MetricsPoint) -> dict[str, Any]:
    payload = {
        "timestamp": iso(point.timestamp),
        "epoch": point.epoch,
        "step": point.step,
        "trainingLoss": point.training_loss,
        "validationLoss": point.validation_loss,
        "learningRate": point.learning_rate,
        "gradientNorm": point.gradient_norm,
        "throughput": point.throughput,
        "gpuUtilization": point.gpu_utilization,
        "gpuMemory": point.gpu_memory,
    }
    return {key: value for key, value in payload.items() if value is not None}
