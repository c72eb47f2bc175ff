"""The embedded Ray head: one foreground process that starts it, says when it is ready, and ends every process of it.

``python -m scheduler.cluster.head --data-dir DIR --json`` prints one JSON line when GCS, raylet and dashboard answer::

    {"address": "127.0.0.1:PORT", "dashboard": "http://127.0.0.1:PORT", "token_file": "…", "pid": …}

Importable without ray. Ray's own output goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from control_plane.settings import Settings

HOST = "127.0.0.1"
OBJECT_STORE_BYTES = 128 * 1024 * 1024
STARTED = b"Ray runtime started."
READY_TIMEOUT_S = 120.0
END_TIMEOUT_S = 8.0
SOCKET_TAIL = len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
SOCKET_LIMIT = 107
"""Longest path of a Unix socket."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Ports:
    gcs: int
    dashboard: int
    client: int
    """Of the Ray Client server, which `ray start` insists on and nothing here uses."""
    autoscaler_metrics: int
    dashboard_metrics: int

    @classmethod
    def free(cls, gcs: int = 0, dashboard: int = 0) -> Ports:
        """The given ports, 0 replaced by ones that are free now."""
        with contextlib.ExitStack() as stack:

            def pick() -> int:
                probe = stack.enter_context(socket.socket())
                probe.bind((HOST, 0))
                return int(probe.getsockname()[1])

            return cls(gcs or pick(), dashboard or pick(), pick(), pick(), pick())


def token_file(data_dir: Path) -> Path:
    """The cluster's shared secret; made (0600) when there is none."""
    path = data_dir / "ray_token"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path


def temp_dir(data_dir: Path) -> Path:
    """Ray's temporary folder: in the data folder, or a short one named from it where socket paths would be too long."""
    inside = data_dir.resolve() / "ray"
    if len(str(inside)) + SOCKET_TAIL <= SOCKET_LIMIT:
        return inside
    name = "brightrun-" + hashlib.sha256(str(inside).encode()).hexdigest()[:10]
    short = Path(tempfile.gettempdir()) / name
    return short if len(str(short)) + SOCKET_TAIL <= SOCKET_LIMIT else Path("/tmp") / name


def head_command(ports: Ports, folder: Path, resources: dict[str, float], *, num_cpus: int | None = None) -> list[str]:
    """``ray start`` of a head that listens on loopback only. ``resources``: custom ones, by name."""
    return [
        sys.executable,
        *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--log-style=record"),
        *("--node-ip-address", HOST, "--port", str(ports.gcs), "--ray-client-server-port", str(ports.client)),
        *("--include-dashboard", "true", "--dashboard-host", HOST, "--dashboard-port", str(ports.dashboard)),
        *("--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"),
        *("--num-cpus", str(num_cpus or os.cpu_count() or 1), "--object-store-memory", str(OBJECT_STORE_BYTES)),
        *("--resources", json.dumps(resources), "--temp-dir", str(folder), "--include-log-monitor", "false"),
    ]


def head_env(token: Path, ports: Ports) -> dict[str, str]:
    """Environment of every Ray process: token authentication, no accelerator visible to actors that asked for none.

    Ranks get the object store's credentials from here (``AWS_*``) and all else with their attempt, so no setting of
    the installation (a database URL, say) is passed.
    """
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BRIGHTRUN_"))},
        **driver_env(token, HOST),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "RAY_worker_niceness": "0",  # Ray's 15 lets training starve beside anything else that computes
        "RAY_memory_monitor_refresh_ms": "0",  # it ends supervisors; the kernel the trainer that is to blame
        "RAY_maximum_gcs_destroyed_actor_cached_count": "5000",
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
    }


def driver_env(token: Path, host: str) -> dict[str, str]:
    """What a driver of the cluster at ``host`` needs; to be set before ``import ray``."""
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's only way to keep 127.0.0.1 as it is given
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        **(loopback if host == HOST else {}),
    }


def dashboard_ready(url: str, token: str) -> bool:
    """Whether the dashboard answers to this token."""
    request = urllib.request.Request(url + "/api/version", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


class Head:
    """A Ray head with all its processes. ``end`` leaves none of them, and no temporary folder."""

    def __init__(
        self, data_dir: Path, *, resources: dict[str, float], port: int = 0, dashboard_port: int = 0,
        num_cpus: int | None = None,
    ) -> None:  # fmt: skip
        self.ports = Ports.free(port, dashboard_port)
        self.token = token_file(data_dir)
        self.folder = temp_dir(data_dir)
        self._command = head_command(self.ports, self.folder, resources, num_cpus=num_cpus)
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{HOST}:{self.ports.gcs}"

    @property
    def dashboard(self) -> str:
        return f"http://{HOST}:{self.ports.dashboard}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, after ending what an earlier one with this folder may have left behind."""
        end_processes(leftovers(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700, parents=True)
        self._process = subprocess.Popen(
            self._command,
            env=head_env(self.token, self.ports),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        threading.Thread(target=self._forward_output, daemon=True).start()

    def _forward_output(self) -> None:
        assert self._process
        assert self._process.stdout
        for line in self._process.stdout:
            if STARTED in line:
                self._started.set()
            with contextlib.suppress(OSError, ValueError):
                os.write(2, line)

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until GCS, raylet and dashboard answer. Raises RuntimeError when it dies or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not (self._started.is_set() and dashboard_ready(self.dashboard, self.token.read_text())):
            if self.exit_code() is not None:
                raise RuntimeError(f"Ray's head exited with code {self.exit_code()}; its output says why")
            if time.monotonic() > deadline:
                raise RuntimeError(f"Ray's head was not ready within {timeout_s:.0f} s")
            time.sleep(0.1)

    def exit_code(self) -> int | None:
        """None while it runs. Orphans that have died are reaped on the way."""
        assert self._process is not None
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid != self.pid:
                os.waitpid(dead.si_pid, 0)
        return self._process.poll()

    def end(self) -> None:
        if self._process is not None:
            gang = _tree(self._process.pid)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
            orphans = psutil.Process().children(recursive=True)
            end_processes([*gang, *orphans, *leftovers(self.folder)])
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def leftovers(folder: Path) -> list[psutil.Process]:
    """Processes of a Ray session in ``folder``, wherever they hang in the process tree, with their children."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(f"{folder}/session_" in part for part in process.cmdline()):
                found.update((p.pid, p) for p in _tree(process.pid))
    found.pop(os.getpid(), None)
    return list(found.values())


def end_processes(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_TIMEOUT_S)


def _adopt_orphans() -> None:
    """Become the parent of whatever a dying Ray process leaves behind, so that it can be found and ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class _Asked(BaseException):
    """SIGTERM or SIGINT came."""


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    raise _Asked


def _head_of(argv: list[str] | None) -> tuple[Head, bool]:
    parser = argparse.ArgumentParser(prog="python -m scheduler.cluster.head", description="the embedded Ray head")
    parser.add_argument("--data-dir", type=Path, help="default: BRIGHTRUN_DATA_DIR")
    parser.add_argument("--port", type=int, default=0, help="GCS port; 0: any free one")
    parser.add_argument("--dashboard-port", type=int, default=0, help="0: any free one")
    parser.add_argument("--num-cpus", type=int, help="default: the machine's")
    parser.add_argument("--json", action="store_true", help="say that it is ready as one line of JSON")
    given = parser.parse_args(argv)
    settings = Settings.from_env(data_dir=given.data_dir)
    slots: dict[str, float] = {"slot_cpu": settings.cpu_slots, "slot_io": settings.io_slots}
    head = Head(
        settings.data_dir,
        resources={name: count for name, count in slots.items() if count > 0},
        port=given.port,
        dashboard_port=given.dashboard_port,
        num_cpus=given.num_cpus,
    )
    return head, given.json


def _announce(head: Head, as_json: bool) -> None:
    ready = {
        "address": head.address,
        "dashboard": head.dashboard,
        "token_file": str(head.token),
        "pid": os.getpid(),
    }
    text = json.dumps(ready) if as_json else f"Ray is ready at {head.address}, its dashboard at {head.dashboard}"
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """0 when asked to end, 1 when the head died or never became ready."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    _adopt_orphans()
    head, as_json = _head_of(argv)
    try:
        head.start()
        head.wait_ready()
        _announce(head, as_json)
        while head.exit_code() is None:
            time.sleep(0.2)
        sys.stderr.write(f"Ray's head exited with code {head.exit_code()}\n")
        return 1
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except _Asked:
        return 0
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        head.end()


if __name__ == "__main__":
    sys.exit(main())
