"""The README says what is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from control_plane.settings import Settings

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
