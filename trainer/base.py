"""Base models on local disk: fetched or converted once into a cache that attempts share, checked before use.

Only safetensors and data files are accepted: a repository with Python code or ``auto_map`` is refused. Torch is
imported for the one-off conversion of a GGUF file and for nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from trainer.chat import TOKENIZER_FILES
from trainer.config import BaseModel, BaseModelSource
from trainer.errors import TrainerError

CONFIG_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")
NO_SUCH_MODEL = (401, 403, 404)
"""The hub's answers (HTTP) that will be the same tomorrow; any other may be its trouble, and passes."""


def prepare_base(base: BaseModel, cache_dir: Path | str, *, weights: bool = True) -> Path:
    """A folder with the base model in transformers' layout; without ``weights``, perhaps only what tokenising needs.

    Safe to call from several processes at once, and to be killed anywhere. Raises TrainerError MODEL_UNAVAILABLE
    (there is none, or none for us), MODEL_REFUSED (not accepted) or MODEL_NOT_FETCHED (another try may help).
    """
    source, cache = base.source, Path(cache_dir)
    if source.kind == "folder":
        return _checked(Path(source.location), weights)
    whole = cache / f"base-{_digest(source)}"
    if whole.is_dir():
        return whole
    if source.kind == "gguf":
        return _once(whole, lambda folder: _convert(_gguf_file(source.location), folder))
    if not weights:
        return _once(cache / f"tokenizer-{_digest(source)}", lambda folder: _download(source, folder, False))
    return _once(whole, lambda folder: _download(source, folder, True))


def context_length(folder: Path, wanted: int) -> int:
    """``wanted`` tokens, or as many as the model has positions for."""
    config = json.loads((folder / "config.json").read_bytes())
    positions = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return min(wanted, positions) if isinstance(positions, int) else wanted


def stop_ids(folder: Path) -> set[int]:
    """The tokens that end an answer, as the model's own settings name them."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_bytes()).get("eos_token_id")
            ids |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return ids


def _digest(source: BaseModelSource) -> str:
    stamp = ""
    if source.kind == "gguf":
        file = _gguf_file(source.location).stat()
        stamp = f"{file.st_size} {file.st_mtime_ns}"
    return sha256(msgspec.json.encode(source) + stamp.encode()).hexdigest()[:24]


def _once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """Make ``folder`` under a lock, beside it first; it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            for left in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
            try:
                make(temporary)
                _checked(temporary, weights=folder.name.startswith("base-"))
                temporary.chmod(0o755)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        flock(handle, LOCK_EX)
        yield
    finally:
        os.close(handle)


def _checked(folder: Path, weights: bool) -> Path:
    if not (folder / "config.json").is_file():
        raise _unavailable(f"{folder} holds no model: config.json is missing")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and "auto_map" in json.loads(file.read_bytes()):
            raise _refused(f"{name} names code to run (auto_map)")
    if code := next(folder.rglob("*.py"), None):
        raise _refused(f"it contains Python code ({code.name})")
    if weights and not any(folder.glob("*.safetensors")):
        raise _refused("it has no safetensors weights")
    return folder


def _download(source: BaseModelSource, folder: Path, weights: bool) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(source.location, revision=source.revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if code := next((name for name in names if name.endswith(".py")), None):
            raise _refused(f"it contains Python code ({code})")
        snapshot_download(
            source.location,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=[*CONFIG_FILES, *(WEIGHT_FILES if weights else ())],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        lasting = isinstance(error, HFValidationError | OfflineModeIsEnabled) or (
            isinstance(error, HfHubHTTPError) and error.response.status_code in NO_SUCH_MODEL
        )
        why = f"{source.location} at {source.revision} cannot be fetched: {error}"
        raise (_unavailable if lasting else _not_fetched)(why) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _gguf_file(location: str) -> Path:
    """``package:NAME/FILE`` or a path. Raises TrainerError MODEL_UNAVAILABLE."""
    if location.startswith("package:"):
        package, _, name = location.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise _unavailable(f"the Python package {package} is not installed")
        file = Path(spec.origin).parent / name
    else:
        file = Path(location)
    if not file.is_file():
        raise _unavailable(f"there is no file {file.name} at {location}")
    return file


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unavailable(why: str) -> TrainerError:
    return TrainerError(
        "MODEL_UNAVAILABLE",
        f"The base model is not available: {why}.",
        "Check the model's entry in the list of base models, and that its source can be reached from the workers.",
    )


def _not_fetched(why: str) -> TrainerError:
    return TrainerError(
        "MODEL_NOT_FETCHED",
        f"The base model could not be fetched: {why}.",
        "It is tried again by itself; if that does not help, check the workers' free disk space and their network.",
    )


def _refused(why: str) -> TrainerError:
    return TrainerError(
        "MODEL_REFUSED",
        f"The base model is refused: {why}.",
        "Choose a model with safetensors weights and without code of its own.",
    )
