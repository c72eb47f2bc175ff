"""A trainer child without torch: it plays the script that it finds in place of its dataset.

``python tests/contract/scripted_child.py CONFIG --supervised``; the script's language is ``tests.contract.script``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


class Player:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.events = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.stop: str | None = None
        self.stopped = threading.Event()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in sys.stdin:
            self.stop = json.loads(line)["reason"]
            self.stopped.set()
        os._exit(1)

    def say(self, kind: str, **fields: Any) -> None:
        self.events.write(json.dumps({"type": kind, **fields}) + "\n")

    def play(self, script: list[dict[str, Any]]) -> None:
        for line in script:
            arguments = dict(line)
            getattr(self, "do_" + arguments.pop("do"))(**arguments)

    def do_emit(self, event: dict[str, Any]) -> None:
        self.say(**{"kind" if name == "type" else name: value for name, value in event.items()})

    def do_sleep(self, s: float) -> None:
        time.sleep(s)

    def do_train(self, steps: int, every_s: float = 0.02, first: int = 1, checkpoint_every: int = 0) -> None:
        """Steps until they are done or a stop request comes, which is obeyed with a checkpoint unless there is one."""
        self.say("phase", name="training")
        for step in range(first, first + steps):
            time.sleep(every_s)
            self.say("metrics", step=step, epoch=0, training_loss=1 / step, learning_rate=1e-4)
            due = checkpoint_every and step % checkpoint_every == 0
            if due:
                self.do_checkpoint(step)
            if self.stop:
                if not due:
                    self.say("phase", name="saving")
                    self.do_checkpoint(step)
                self.say("finished", outcome="stopped", step=step, reason=self.stop)
                sys.exit(0)

    def do_checkpoint(self, step: int) -> None:
        folder = Path(self.config["output_dir"]) / "checkpoints" / f"a{self.config['attempt']}-s{step}"
        folder.mkdir(parents=True)
        files = {}
        for name in ("adapter.bin", "optimizer.bin"):
            data = f"{name} of step {step}".encode() * 100
            (folder / name).write_bytes(data)
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = json.dumps({"files": files, "step": step, "epoch": 0}).encode()
        (folder / "manifest.json").write_bytes(manifest)
        size, digest = sum(f["size"] for f in files.values()), hashlib.sha256(manifest).hexdigest()
        self.say("checkpoint", step=step, epoch=0, loss=1 / step, path=str(folder), size=size, sha256=digest)

    def do_adapter(self, step: int) -> None:
        folder = Path(self.config["output_dir"]) / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter_config.json").write_text("{}")
        self.say("adapter", path=str(folder), size=9, best_step=step)

    def do_finish(self, step: int = 0) -> None:
        self.say("finished", outcome="completed", step=step, result={"bestStep": step})
        sys.exit(0)

    def do_fail(self, code: str) -> None:
        self.say("failed", code=code, message="it went wrong", advice="do better", stack="stack")
        sys.exit(1)

    def do_exit(self, code: int, stderr: str = "") -> None:
        sys.stderr.write(stderr + "\n")
        sys.exit(code)

    def do_die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_hang(self) -> None:
        """Deaf to stop requests; only the end of stdin ends it."""
        time.sleep(3600)

    def do_garbage(self, text: str) -> None:
        self.events.write(text + "\n")

    def do_report_surroundings(self) -> None:
        """What it was given: its config, environment, inputs and resumed checkpoint, as a log event."""
        resume = self.config.get("resume_from")
        resumed = sorted(path.name for path in Path(resume).iterdir()) if resume else None
        mode = oct(Path(self.config["work_dir"]).parent.stat().st_mode & 0o777)
        seen = {"config": self.config, "env": dict(os.environ), "resumed": resumed, "mode": mode, "cwd": os.getcwd()}
        self.say("log", level="INFO", message="surroundings", metadata={**seen, "pid": os.getpid()})


if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1]).read_text())
    Player(config).play(json.loads(Path(config["dataset_path"]).read_text()))
