"""``python -m trainer CONFIG.json [--supervised]``: does what the config says and reports it as JSON lines."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import msgspec

from trainer import control
from trainer.config import Config, TrainConfig, load
from trainer.errors import TrainerError, explain
from trainer.protocol import Beat, Failed, Finished
from trainer.report import Pipe, Report, private_stdout

USAGE = """usage: python -m trainer CONFIG.json [--supervised]

Trains an adapter ("kind": "train") or examines a dataset ("kind": "verdict"); see trainer.config for the fields.
Events go to standard output, one JSON object a line; everything else to standard error. Ctrl-C stops in good order.
--supervised  take control messages on standard input, and end at once when it ends
Exit code: 0 after a "finished" event, 1 after a "failed" one, 2 for this text.
"""
MAX_STACK = 8000


def main(arguments: list[str]) -> int:
    paths = [argument for argument in arguments if argument != "--supervised"]
    if len(paths) != 1 or paths[0].startswith("-"):
        sys.stderr.write(USAGE)
        return 2
    report = Pipe(private_stdout())
    supervised = len(paths) < len(arguments)
    stop = control.supervised() if supervised else control.from_shell()
    if supervised:
        stop.beat = lambda: report(Beat())
    try:
        config = _load(Path(paths[0]))
        _environment(config)
        finished = _run(config, report, stop, supervised=supervised)
        stop.exit_code = 0
        report(finished)
    except BrokenPipeError:
        return control.ORPHANED
    except Exception as error:
        traceback.print_exc()
        reason = explain(error)
        stack = traceback.format_exc()[-MAX_STACK:]
        stop.exit_code = 1
        report(Failed(code=reason.code, message=reason.message, advice=reason.advice, stack=stack))
        return 1
    return 0


def _load(path: Path) -> Config:
    try:
        return load(path)
    except (msgspec.DecodeError, OSError) as error:
        raise TrainerError("BAD_CONFIG", f"{path}: {error}", "See trainer.config for the fields.") from error


def _environment(config: Config) -> None:
    """Before numpy, tokenizers and torch are imported: how many threads they use, where their caches are."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[variable] = str(config.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if config.threads > 1 else "false")
    os.environ.setdefault("HF_HOME", str(Path(config.cache_dir) / "huggingface"))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for folder in (config.work_dir, config.cache_dir):
        Path(folder).mkdir(parents=True, exist_ok=True)


def _run(config: Config, report: Report, stop: control.StopRequest, *, supervised: bool) -> Finished:
    if isinstance(config, TrainConfig):
        from trainer.loop import train

        return train(config, report, stop, keep=None if supervised else 2)
    from trainer.verdict import examine

    return examine(config, report, stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
