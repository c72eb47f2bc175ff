"""Everything the scheduler does to Ray, as blocking functions. Import it only after the driver's environment is set."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scheduler.cluster import gcs
from scheduler.cluster.supervisor import Supervisor
from scheduler.executor import AttemptGone, AttemptSpec, StaleEpoch, Unreachable

NAMESPACE = "brightrun"
RELEASE_S = 10.0
SHUTDOWN_S = 5.0
"""How long a supervisor may take to end its gang; then both are ended from here."""
STRAY = re.compile(r"^.+-\d+-(r\d+|s)$")
"""The scratch folder of a rank or a supervisor."""


def connect(address: str) -> None:
    """Become a driver of the cluster. Raises ConnectionError."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")


def disconnect() -> None:
    ray.shutdown()


def create(spec: AttemptSpec, child_command: list[str], grace_s: float) -> None:
    """Register the supervisor, unless one of this name lives or has lived."""
    if find(spec.name) is not None or any(a.name == spec.name for a in gcs.dead_actors()):
        return
    options: dict[str, Any] = {
        "name": spec.name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": 0,
        "num_cpus": 0,
        "num_gpus": 0,
    }
    ray.remote(Supervisor).options(**options).remote(spec, child_command, grace_s)


def find(name: str) -> ActorHandle | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


async def ask(supervisor: ActorHandle, method: str, *arguments: Any) -> Any:
    """A supervisor's answer. Raises what it raised, AttemptGone when it is dead, Unreachable when it may not be."""
    try:
        return await getattr(supervisor, method).remote(*arguments)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, StaleEpoch) else Unreachable(str(error)) from None
    except ActorDiedError as death:
        raise AttemptGone(str(death)) from death
    except RayError as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error


def release(name: str, work_root: str, epoch: int) -> bool:
    """End what is left of an attempt and remove its folders; whether nothing is left of it any more.

    Raises StaleEpoch when the supervisor has heard from a newer scheduler.
    """
    supervisor, tidy = find(name), False
    if supervisor is not None:
        tidy = _shut_down(supervisor, epoch)
        ray.kill(supervisor, no_restart=True)
    gang = [] if tidy else gcs.ranks_of(name)
    for rank in gang:
        handle = find(rank.name)
        if handle is not None:
            ray.kill(handle, no_restart=True)
    deadline = time.monotonic() + RELEASE_S
    while not _is_gone(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return tidy or _sweep_nodes(name, work_root, gang)


def _shut_down(supervisor: ActorHandle, epoch: int) -> bool:
    """Whether it ended its gang by itself. Raises StaleEpoch."""
    try:
        return bool(ray.get(supervisor.shutdown.remote(epoch), timeout=SHUTDOWN_S))
    except RayTaskError as error:
        if isinstance(error.cause, StaleEpoch):
            raise error.cause from None
        return False
    except (RayActorError, GetTimeoutError):
        return False


def _is_gone(name: str) -> bool:
    alive = any(actor.name == name or actor.name.startswith(f"{name}/r") for actor in gcs.live_actors())
    return not alive and not gcs.placements_named(name)


def _sweep_nodes(name: str, work_root: str, gang: list[gcs.Actor]) -> bool:
    """Remove the attempt's folders from the nodes where its ranks were; from all if one of these is not known or gone,
    since it may be back by another id."""
    live = set(gcs.live_nodes())
    nodes = {rank.node_id for rank in gang if rank.node_id}
    if not nodes or not nodes <= live:
        nodes = live
    calls = [
        ray.remote(sweep)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(work_root, name.replace("/", "-") + "-", [rank.pid for rank in gang if rank.node_id == node])
        for node in nodes
    ]
    try:
        return all(ray.get(calls, timeout=RELEASE_S))
    except RayError:
        return False


def sweep(work_root: str, stem: str, pids: list[int]) -> bool:
    """Remove the folders of an attempt that is over, once no process of it is left on this node."""
    prefix = str(Path(work_root) / stem)
    deadline = time.monotonic() + RELEASE_S / 2
    while _processes_of(prefix, pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    for folder in Path(work_root).glob(f"{stem}*"):
        shutil.rmtree(folder, ignore_errors=True)
    return True


def tidy(node: str, work_root: str) -> None:
    """Have a node that has just (re)joined remove what attempts left on it that ended with it. Does not wait."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(sweep_strays).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(work_root)


def sweep_strays(work_root: str) -> None:
    """Remove the folders of attempts that no living actor belongs to. A folder is made after its actor is registered,
    and names are never used again: what was seen before the actors and has none will have none."""
    folders = [folder for folder in Path(work_root).glob("*") if STRAY.match(folder.name)]
    living = {actor.name.partition("/r")[0] for actor in gcs.live_actors()}
    for folder in folders:
        stem = folder.name.rpartition("-")[0]
        if "/".join(stem.rsplit("-", 1)) not in living and not _processes_of(str(folder), []):
            shutil.rmtree(folder, ignore_errors=True)


def _processes_of(prefix: str, pids: list[int]) -> list[int]:
    """Ranks by pid (while they still are Ray workers), children by the folder that their command line names."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if any(part.startswith(prefix) for part in line) or (process.pid in pids and line and line[0][:5] == "ray::"):
            found.append(process.pid)
    return found
