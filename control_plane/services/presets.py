"""From a preset and overrides to the full set of hyperparameters, within the installation's limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from control_plane.errors import ValidationFailed
from control_plane.services.catalog import BaseModelEntry, Catalog, Limit
from trainer.config import Hyperparameters

CUSTOM = "custom"
DEFAULT_BASE = "balanced"


class Resolved(NamedTuple):
    preset_id: str
    """``custom`` when an override changed anything."""
    base_preset: str
    hyperparameters: Hyperparameters


def full(catalog: Catalog, preset_id: str) -> Hyperparameters:
    """A preset's full set."""
    return msgspec.convert(catalog.presets[preset_id].hyperparameters, Hyperparameters)


def given(overrides: Any) -> dict[str, Any]:
    """What a request names of the hyperparameters, by wire name."""
    if overrides is None:
        return {}
    fields = msgspec.structs.fields(overrides)
    return {f.encode_name: value for f in fields if (value := getattr(overrides, f.name)) is not UNSET}


def resolve(
    catalog: Catalog,
    preset_id: str,
    base_preset: str | None,
    overrides: Mapping[str, Any],
    model: BaseModelEntry | None,
) -> Resolved:
    """Raises ValidationFailed with a message for every bad field (``presetId``, ``hyperparameters.loraRank`` …)."""
    base = (base_preset or DEFAULT_BASE) if preset_id == CUSTOM else preset_id
    bad = {
        f"hyperparameters.{name}": [message]
        for name, value in overrides.items()
        if (message := broken(catalog.limits[name], value))
    }
    if base not in catalog.presets:
        name = "basePreset" if preset_id == CUSTOM else "presetId"
        bad[name] = [f"Unknown preset. Choose one of: {', '.join([*catalog.presets, CUSTOM])}"]
    elif base_preset is not None and base_preset != base:
        bad["basePreset"] = [f"Only a {CUSTOM} preset starts from another"]
    if bad:
        raise ValidationFailed("Invalid input data", fields=bad)
    plain = full(catalog, base)
    made = msgspec.convert({**msgspec.to_builtins(plain), **overrides}, Hyperparameters)
    if model is not None and made.max_seq_length > model.context_length:
        raise ValidationFailed.field(
            "hyperparameters.maxSeqLength", f"Must be at most {model.context_length}, the base model's context length"
        )
    return Resolved(CUSTOM if preset_id == CUSTOM or made != plain else base, base, made)


def broken(limit: Limit, value: Any) -> str | None:
    """What is wrong with a value by the hard bounds."""
    if value is None:
        return None if limit.default is None and limit.choices is None else "Must not be null"
    if limit.choices is not None:
        chosen = value if isinstance(value, list | tuple) else [value]
        if not chosen or any(c not in limit.choices for c in chosen):
            return f"Choose from: {', '.join(map(str, limit.choices))}"
        return "Must not name anything twice" if len(set(chosen)) < len(chosen) else None
    if limit.min is not None and value < limit.min:
        return f"Must be at least {limit.min:g}"
    if limit.max is not None and value > limit.max:
        return f"Must be at most {limit.max:g}"
    return None


def unusual(catalog: Catalog, hyperparameters: Hyperparameters) -> dict[str, str]:
    """Values outside the range of good practice, by wire name."""
    said = {}
    for name, value in msgspec.to_builtins(hyperparameters).items():
        limit = catalog.limits[name]
        if value is None or limit.warn_min is None or limit.warn_max is None:
            continue
        if not limit.warn_min <= value <= limit.warn_max:
            said[name] = f"{value:g} is outside the usual range of {limit.warn_min:g} to {limit.warn_max:g}"
    return said
