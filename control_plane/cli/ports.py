"""Where each part of an embedded installation listens."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from control_plane.settings import Settings

LOOPBACK = "127.0.0.1"
ANY = ("0.0.0.0", "::")
BACKLOG = 1024


class PortTaken(Exception):
    """Names the option to change."""


@dataclass(frozen=True)
class Ports:
    """0: any free one."""

    api: int
    mlflow: int
    ray: int
    dashboard: int

    @classmethod
    def of(cls, settings: Settings, dashboard: int) -> Ports:
        mlflow, ray = urlsplit(settings.mlflow_url).port, urlsplit(f"//{settings.ray_address}").port
        return cls(settings.port, mlflow or 0, ray or 0, dashboard)

    def resolved(self, host: str) -> Ports:
        """With 0 replaced; all are held at once, so that none is given twice. Raises PortTaken."""
        with ExitStack() as held:

            def bind(name: str, address: str, port: int) -> int:
                probe = held.enter_context(socket.socket(_family(address)))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except OSError as error:
                    raise PortTaken(
                        f"{address}:{port}: {error.strerror}; --{name}-port 0 takes any free one"
                    ) from error
                return int(probe.getsockname()[1])

            return Ports(
                bind("api", host, self.api),
                bind("mlflow", LOOPBACK, self.mlflow),
                bind("ray", LOOPBACK, self.ray),
                bind("dashboard", LOOPBACK, self.dashboard),
            )


def listening(host: str, port: int) -> socket.socket:
    """Raises PortTaken."""
    try:
        return socket.create_server((host, port), family=_family(host), backlog=BACKLOG)
    except OSError as error:
        raise PortTaken(f"{host}:{port}: {error.strerror}; --api-port 0 takes any free one") from error


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def placed(settings: Settings, ports: Ports) -> Settings:
    """The settings of a run on these ports. What the operator has set of public URLs and of the time-out stays; without
    nodes from elsewhere there is none to wait for."""
    mlflow = f"http://{LOOPBACK}:{ports.mlflow}"
    named = socket.gethostname() if settings.host in ANY else bracketed(settings.host)
    return replace(
        settings,
        port=ports.api,
        public_url=os.environ.get("BRIGHTRUN_PUBLIC_URL") or f"http://{named}:{ports.api}",
        mlflow_url=mlflow,
        mlflow_public_url=os.environ.get("BRIGHTRUN_MLFLOW_PUBLIC_URL") or mlflow,
        ray_address=f"{LOOPBACK}:{ports.ray}",
        ray_dashboard_url=settings.ray_dashboard_url or f"http://{LOOPBACK}:{ports.dashboard}",
        node_timeout_s=settings.node_timeout_s if "BRIGHTRUN_NODE_TIMEOUT_S" in os.environ else 0.0,
    )


def from_here(settings: Settings) -> str:
    """The API's URL from this very machine."""
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(settings.host, settings.host)
    return f"http://{bracketed(host)}:{settings.port}"


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
