"""The README says what is there."""

from __future__ import annotations

import base64
import hmac
import re
import time
from dataclasses import fields
from pathlib import Path

import pytest

from control_plane.services.webhooks import derive, sign
from control_plane.settings import Settings
from control_plane.tables.notices import PING, Event
from scheduler.deliver import RETRY_PAUSES_S

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def settings_rows() -> list[str]:
    rows = []
    for field in fields(Settings):
        default = "configs" if field.name == "config_dir" else field.default
        shown = "" if default == "" else f"`{default}`"
        rows.append(f"| `BRIGHTRUN_{field.name.upper()}` | {shown} | {field.metadata['doc']} |")
    return rows


def test_the_table_of_settings_is_the_settings() -> None:
    assert re.findall(r"^\| `BRIGHTRUN_.*$", README, re.MULTILINE) == settings_rows()


def test_every_event_of_a_webhook_is_named() -> None:
    section = README.partition("## Being told")[2].partition("## ")[0]
    named = re.findall(r"`([a-z.]+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    assert sorted(named) == sorted([*Event, PING])


def test_the_pauses_between_tries_are_named() -> None:
    seconds = [f"{pause} s" for pause in RETRY_PAUSES_S if pause < 60]
    minutes = [f"{pause // 60} min" for pause in RETRY_PAUSES_S if 60 <= pause < 3600]
    hours = [str(pause // 3600) for pause in RETRY_PAUSES_S if pause >= 3600]
    assert f"after {', '.join([*seconds, *minutes, *hours[:-1]])} and {hours[-1]} h;" in README.replace("\n", " ")


def test_the_readme_verifies_a_signature() -> None:
    secret, body, at = derive(b"an installation", "nonce"), b'{"type": "ping"}', int(time.time())
    headers = {"webhook-id": "m", "webhook-timestamp": str(at), "webhook-signature": sign([secret], "m", at, body)}
    for given, genuine in ((body, True), (body + b" ", False)):
        names = {"base64": base64, "hmac": hmac, "time": time, "secret": secret, "headers": headers, "body": given}
        exec(README.partition("```python\n")[2].partition("```")[0], names)
        assert (names["genuine"], names["recent"]) == (genuine, True)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make (\w+)", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_linked_files_and_named_folders_exist() -> None:
    named = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named += re.findall(r"`((?:control_plane|scheduler|trainer|configs|docker)/[\w./]*)`", README)
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_it_is_a_page() -> None:
    prose = re.sub(r"^\|.*$|```.*?```", "", README, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) < 700
