"""Settings, all from ``BRIGHTRUN_*`` environment variables; the README's table of them is tested against this file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

PACKAGE = Path(__file__).resolve().parent


def _configs() -> Path:
    packaged = PACKAGE / "configs"
    return packaged if packaged.is_dir() else PACKAGE.parent / "configs"


def _setting(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Settings:
    """One installation. Empty URLs are filled from ``data_dir`` (embedded default)."""

    data_dir: Path = _setting(Path(".brightrun"), "folder of all state: database, objects, MLflow, logs, secrets")
    database_url: str = _setting("", "SQLAlchemy async URL; default: SQLite in the data folder")
    storage_url: str = _setting("", "object store: file:///… or s3://bucket/prefix; default: in the data folder")
    host: str = _setting("127.0.0.1", "address the API listens on")
    port: int = _setting(8080, "port the API listens on; 0: any free one")
    public_url: str = _setting("", "how clients reach the API; default: http://HOST:PORT")
    mlflow_url: str = _setting("http://127.0.0.1:5500", "MLflow tracking server")
    mlflow_public_url: str = _setting("", "MLflow's URL as people reach it; default: the tracking server's")
    ray_address: str = _setting("127.0.0.1:6399", "Ray head (GCS) address, host:port")
    ray_dashboard_url: str = _setting("", "Ray dashboard's URL as people reach it")
    config_dir: Path = _setting(_configs(), "presets, limits, GPU types, base models")
    base_models_file: str = _setting("", "further base models (YAML, as configs/base_models.yaml)")
    default_base_model: str = _setting("HuggingFaceTB/SmolLM2-135M-Instruct", "base model when a request names none")
    model_cache_dir: str = _setting("", "prepared base models, on each node; default: in the data folder")
    work_dir: str = _setting("", "scratch of attempts, on each node; default: in the data folder")
    signup: str = _setting("open", "who may create an account after the first: open, invitation or closed")
    session_ttl_s: int = _setting(14 * 24 * 3600, "life of a console session, seconds")
    token_ttl_s: int = _setting(3600, "life of the bearer token that sign-in answers, seconds")
    signed_url_ttl_s: int = _setting(300, "life of a signed URL, seconds (at most 300 for downloads)")
    cpu_slots: int = _setting(1, "training slots of the GPU type `cpu` on this machine")
    io_slots: int = _setting(2, "dataset verdicts at once on this machine")
    cpu_threads: int = _setting(0, "threads of a rank on `cpu`; 0: cores / cpu_slots")
    tick_s: float = _setting(0.5, "pause between scheduler ticks, seconds")
    lease_timeout_s: float = _setting(10.0, "a scheduler whose beat stands still this long is superseded, seconds")
    min_free_mib: int = _setting(512, "datasets and jobs are taken only while the disk has more free than this, MiB")
    allowance_s: int = _setting(
        1800,
        "GPU-seconds a rank may go on without hearing from a scheduler. Under a budget only as far as the job's hold "
        "pays: up to its upper estimate, and past that 60 to 120 s ahead of what is used. What stops for this goes on "
        "by itself once a scheduler is back, and is not billed for loading again",
    )
    node_timeout_s: float = _setting(
        90.0,
        "a Ray node surely ends within this time after its head did, seconds; "
        "`brightrun up` ends its own itself and waits for none unless this is set",
    )

    webhook_networks: str = _setting("public", "where webhooks may lead: public addresses only, or any")
    smtp_url: str = _setting("", "server for mail: smtp://user:password@host:587, or smtps://…; empty: no mail")
    mail_from: str = _setting("", "sender of mail; empty: no mail")

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        data = Path(self.data_dir).expanduser().resolve()
        object.__setattr__(self, "data_dir", data)
        fill("database_url", f"sqlite+aiosqlite:///{data}/brightrun.sqlite3")
        fill("storage_url", (data / "objects").as_uri())
        fill("public_url", f"http://{self.host}:{self.port}")
        fill("mlflow_public_url", self.mlflow_url)
        fill("model_cache_dir", str(data / "models"))
        fill("work_dir", str(data / "work"))
        fill("cpu_threads", max(1, (os.cpu_count() or 1) // max(1, self.cpu_slots)))

    @classmethod
    def from_env(cls, **overrides: Any) -> Settings:
        """Environment first, then ``overrides``; a value that does not parse names its variable."""
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for f in fields(cls):
            raw = os.environ.get(f"BRIGHTRUN_{f.name.upper()}")
            if raw is not None:
                values[f.name] = _parse(f"BRIGHTRUN_{f.name.upper()}", raw, hints[f.name])
        return cls(**{**values, **{k: v for k, v in overrides.items() if v is not None}})

    def to_env(self) -> dict[str, str]:
        """The same settings as environment variables, for the parts that ``brightrun up`` starts."""
        return {f"BRIGHTRUN_{f.name.upper()}": str(getattr(self, f.name)) for f in fields(self)}

    @property
    def secret(self) -> bytes:
        """Key of signed URLs; one per installation, made by ``brightrun up`` (or placed there by the operator)."""
        return (self.data_dir / "secret").read_bytes()

    @property
    def mails(self) -> bool:
        """Whether notifications go out by mail too."""
        return bool(self.smtp_url and self.mail_from)

    @property
    def is_sqlite(self) -> bool:
        return self.database_url.startswith("sqlite")


def _parse(name: str, raw: str, hint: Any) -> Any:
    kind = get_args(hint)[0] if isinstance(hint, UnionType) or get_origin(hint) else hint
    try:
        return kind(raw)
    except ValueError as error:
        raise SystemExit(f"{name}={raw!r}: expected {kind.__name__}") from error
