from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trainer import base
from trainer.base import context_length, prepare_base, stop_ids
from trainer.config import BaseModel, BaseModelSource
from trainer.errors import TrainerError
from trainer.protocol import USER_FAULTS


def model(kind: str, location: Path | str) -> BaseModel:
    return BaseModel(id="m", revision="r", source=BaseModelSource(kind=kind, location=str(location), revision="r"))  # type: ignore[arg-type]


def code_of(source: BaseModel, cache: Path, *, weights: bool = True) -> str:
    with pytest.raises(TrainerError) as caught:
        prepare_base(source, cache, weights=weights)
    assert caught.value.advice
    return caught.value.code


def test_a_local_folder_is_used_where_it_is(tiny: Path, tmp_path: Path) -> None:
    assert prepare_base(model("folder", tiny), tmp_path) == tiny
    assert list(tmp_path.iterdir()) == []
    assert context_length(tiny, 99999) == 2048
    assert context_length(tiny, 128) == 128
    assert stop_ids(tiny) == {2}


def test_code_foreign_weights_and_absence_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "modeling.py").touch()
    assert code_of(model("folder", folder), tmp_path) == "MODEL_REFUSED"
    (folder / "modeling.py").unlink()
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    assert code_of(model("folder", folder), tmp_path) == "MODEL_REFUSED"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert code_of(model("folder", folder), tmp_path) == "MODEL_REFUSED"
    assert prepare_base(model("folder", folder), tmp_path, weights=False) == folder
    assert code_of(model("folder", tmp_path / "nowhere"), tmp_path) == "MODEL_UNAVAILABLE"


@pytest.mark.parametrize("location", ["package:no_such_package/x.gguf", "package:json/x.gguf", "nowhere/x.gguf"])
def test_a_gguf_that_is_not_there(tmp_path: Path, location: str) -> None:
    assert code_of(model("gguf", location), tmp_path) == "MODEL_UNAVAILABLE"


def test_a_packaged_gguf_is_converted_once_and_again_when_the_file_changes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "w.gguf").write_bytes(b"GGUF1")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        seen.append(file)
        shutil.copytree(tiny, folder, dirs_exist_ok=True)

    monkeypatch.setattr(base, "_convert", convert)
    source, cache = model("gguf", "package:some_weights/w.gguf"), tmp_path / "cache"
    first = prepare_base(source, cache)
    assert prepare_base(source, cache, weights=False) == first
    assert seen == [package / "w.gguf"]
    (package / "w.gguf").write_bytes(b"GGUF22")
    assert prepare_base(source, cache) != first
    assert len(seen) == 2


class Hub:
    """The two calls of the hub that are used, answering from a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *extra: str) -> None:
        self.folder, self.calls, self.names = folder, 0, [*(f.name for f in folder.iterdir()), *extra]
        self.failure: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def model_info(self, name: str, revision: str) -> SimpleNamespace:
        if self.failure:
            raise self.failure
        assert revision == "r"
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def download(self, name: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert revision == "abc"
        self.calls += 1
        time.sleep(0.05)
        for file in self.folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(file, local_dir / file.name)
        (local_dir / ".cache").mkdir()


def test_a_hub_model_is_fetched_once_even_by_two_at_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tiny, monkeypatch)
    (tmp_path / f"base-{base._digest(model('hub', 'a/b').source)}.part-dead").mkdir()
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare_base(model("hub", "a/b"), tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.calls == 1
    assert len(set(found)) == 1
    assert {file.name for file in found[0].iterdir()} == {file.name for file in tiny.iterdir()}
    assert not list(tmp_path.glob("*.part-*"))
    hub.failure = OSError("offline")
    assert prepare_base(model("hub", "a/b"), tmp_path) == found[0]


def test_a_verdict_fetches_no_weights(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(tiny, monkeypatch)
    folder = prepare_base(model("hub", "a/b"), tmp_path, weights=False)
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("*.safetensors"))
    whole = prepare_base(model("hub", "a/b"), tmp_path)
    assert prepare_base(model("hub", "a/b"), tmp_path, weights=False) == whole != folder


def test_a_hub_model_with_code_leaves_nothing_behind(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(tiny, monkeypatch, "modeling_x.py")
    assert code_of(model("hub", "a/b"), tmp_path) == "MODEL_REFUSED"
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    request: Any = SimpleNamespace(url="https://hub/api/models/a/b")
    response: Any = SimpleNamespace(status_code=status, headers={}, request=request)
    return kind(f"{status}", response=response)


@pytest.mark.parametrize(
    ("failure", "code", "tried_again"),
    [
        (answered(404, RepositoryNotFoundError), "MODEL_UNAVAILABLE", False),
        (answered(404, RevisionNotFoundError), "MODEL_UNAVAILABLE", False),
        (answered(401), "MODEL_UNAVAILABLE", False),
        (answered(403, GatedRepoError), "MODEL_UNAVAILABLE", False),
        (HFValidationError("a//b"), "MODEL_UNAVAILABLE", False),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), "MODEL_UNAVAILABLE", False),
        (answered(429), "MODEL_NOT_FETCHED", True),
        (answered(500), "MODEL_NOT_FETCHED", True),
        (answered(503), "MODEL_NOT_FETCHED", True),
        (LocalEntryNotFoundError("the network went away"), "MODEL_NOT_FETCHED", True),
        (OSError(errno.ENOSPC, "No space left on device"), "MODEL_NOT_FETCHED", True),
    ],
    ids=str,
)
def test_only_a_model_that_is_not_there_is_the_users_fault(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: str, tried_again: bool
) -> None:
    hub = Hub(tiny, monkeypatch)
    hub.failure = failure
    assert code_of(model("hub", "a/b"), tmp_path) == code
    assert (code not in USER_FAULTS) is tried_again
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
