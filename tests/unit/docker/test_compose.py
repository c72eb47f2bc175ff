"""What the images and the compose file name does exist: commands, options, settings, files."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from control_plane.cli import main
from control_plane.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
SETTINGS = {f"BRIGHTRUN_{field.name.upper()}" for field in fields(Settings)}


def parse(group: click.Group, arguments: list[str]) -> None:
    """Raises if the subcommand or one of its options does not exist."""
    name, *options = arguments
    command = group.get_command(click.Context(group), name)
    assert command is not None, name
    command.make_context(name, options)


@pytest.mark.parametrize("service", [name for name, s in SERVICES.items() if s.get("command", [""])[0] == "brightrun"])
def test_our_commands_exist(service: str) -> None:
    parse(main, SERVICES[service]["command"][1:])


@pytest.mark.parametrize("service", [name for name, s in SERVICES.items() if s.get("command", [""])[0] == "ray"])
@pytest.mark.filterwarnings("ignore")
def test_rays_commands_exist(service: str) -> None:
    from ray.scripts.scripts import cli

    parse(cli, SERVICES[service]["command"][1:])
    if "healthcheck" in SERVICES[service]:
        parse(cli, SERVICES[service]["healthcheck"]["test"][2:])


def test_every_part_of_the_house_is_there() -> None:
    commands = {tuple(s["command"][:2]) for s in SERVICES.values() if "command" in s}
    assert {("brightrun", name) for name in ("migrate", "serve", "scheduler", "mlflow")} <= commands
    assert {"postgres", "ray", "worker"} <= set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_names_only_what_there_is(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("depends_on", {})) <= set(SERVICES)
    assert {s["source"] for s in service.get("secrets", [])} <= set(COMPOSE["secrets"])
    assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"])
    assert {v for v in service.get("environment", {}) if v.startswith("BRIGHTRUN_")} <= SETTINGS
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "published beyond loopback"
    if "build" in service:
        assert (ROOT / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix)
def test_an_image_copies_what_there_is_and_is_not_root(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["brightrun"]
    assert set(re.findall(r"BRIGHTRUN_\w+(?==)", text)) <= SETTINGS
    command = re.search(r'^CMD \["brightrun", "(\w+)"\]$', text, re.MULTILINE)
    assert command is not None
    parse(main, [command[1]])


def test_there_are_two_images() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".control-plane", ".worker"]
