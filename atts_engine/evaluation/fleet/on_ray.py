"""Workers as Ray actors. The one place that imports ray, an extra: `pip install 'atts-engine[ray]'`."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from atts_engine.config import EngineConfig
from atts_engine.errors import InputError
from atts_engine.evaluation.fleet.messages import Answer, Identity, Message, Order, Snapshot, WorkerLost
from atts_engine.evaluation.fleet.worker import Worker
from atts_engine.pipeline import ATTSParams

T = TypeVar("T")

LISTENING_S = 10.0
FREE_S = 10.0
"""What a run that has just ended held is free a little later."""

LOCAL = "atts_local"
"""A resource that marks a cluster as `local`: the newest cluster of a host is what Ray takes for its own."""

STORE_BYTES = 100_000_000
"""Object store of a local cluster. What workers say is small, and the default is a third of the memory."""


def demand(config: EngineConfig) -> dict[str, float]:
    """What Ray sets aside for one worker: a CPU for each torch thread, and the GPUs that its devices name.

    Ray shows a worker its own GPUs only, numbered from 0. `InputError` where a number below the highest is not used.
    """
    indices = {int(index or 0) for kind, _, index in _devices(config) if kind == "cuda"}
    if indices and indices != set(range(len(indices))):
        raise InputError(
            "on Ray a worker's GPUs are numbered from 0, whichever they are: use --draft-device cuda:0, and "
            "--target-device cuda:0 (shared) or cuda:1 (its own)"
        )
    return {"CPU": float(config.threads or 1), **({"GPU": float(len(indices))} if indices else {})}


def _devices(config: EngineConfig) -> Iterator[tuple[str, str, str]]:
    for device in (config.draft_device, config.target_device):
        yield device.partition(":")


@contextlib.contextmanager
def cluster(address: str) -> Iterator[str]:
    """Be connected; which cluster it is. address: `local` (made here, gone afterwards), `auto`, `HOST:PORT` or
    `ray://HOST:PORT`; a process that is connected already stays as it is. `InputError` where ray is missing or nobody
    answers, and where `auto` finds the `local` one of another process, which would end with that."""
    ray = _ray()
    if ray.is_initialized():
        yield address
        return
    check_listening(address)
    local: dict[str, Any] = {
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "resources": {LOCAL: 1.0},
    }
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **(local if address == "local" else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"no Ray cluster at {address} ({reason}): start one with `ray start --head`, or use --ray local"
        ) from error
    try:
        yield _joined(address) if address == "auto" else address
    finally:
        ray.shutdown()


def _joined(address: str) -> str:
    """Where the cluster is that `auto` found."""
    ray = _ray()
    found = str(ray.get_runtime_context().gcs_address)
    if LOCAL in ray.cluster_resources():
        raise InputError(
            f"the Ray cluster that --ray {address} finds on this host ({found}) belongs to another command's "
            "--ray local and ends with it: start one with `ray start --head`, or use --ray local"
        )
    return found


def check_listening(address: str) -> None:
    """Ray itself goes on trying for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENING_S).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Ray cluster at {address} ({error}): start one with `ray start --head`, or use --ray local"
        ) from error


def worker_count(wanted: int | None, need: Mapping[str, float]) -> int:
    """How many workers to start: as many as `wanted`, or as the cluster has room for. `InputError` where it has not, or
    others have taken it: an actor without room waits for ever, and says nothing."""
    ray = _ray()
    hosts = [host["Resources"] for host in ray.nodes() if host["Alive"]]
    room = sum(_room(host, need) for host in hosts)
    if room < (wanted or 1):
        text = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
        has = ", ".join(f"{sum(host.get(name, 0.0) for host in hosts):g} {name}" for name in need)
        raise InputError(
            f"the Ray cluster has {has} in all, and each worker needs {text} on one host: there is room for {room} "
            f"workers, not for {wanted or 1}; add hosts, or lower --ray-workers or --threads"
        )
    until = time.monotonic() + FREE_S
    while (free := _room(ray.available_resources(), need)) < (wanted or room) and time.monotonic() < until:
        time.sleep(0.2)
    if free < (wanted or 1):
        raise InputError(
            f"others use the Ray cluster: of {room} workers {free} have room now, {wanted or 1} are asked for; wait "
            "for the others to end, or lower --ray-workers"
        )
    return wanted or min(room, free)


def _room(has: Mapping[str, float], need: Mapping[str, float]) -> int:
    return min(int(has.get(name, 0.0) // amount) for name, amount in need.items())


def launcher(need: Mapping[str, float]) -> Callable[[], RayWorker]:
    """Makes a worker on whichever host has room for it."""
    options: dict[str, Any] = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0.0), "max_restarts": 0}
    actor = _ray().remote(Worker)
    return lambda: RayWorker(actor.options(**options).remote())


class RayWorker:
    """A `Remote` that is an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def open(self, config: EngineConfig, params: ATTSParams) -> Identity:
        return await _answer(self._actor.open.remote(config, params))

    async def hold(self, snapshot: Snapshot) -> None:
        await _answer(self._actor.hold.remote(snapshot))

    async def start(self, number: int, order: Order) -> None:
        await _answer(self._actor.start.remote(number, order))

    async def exchange(self, number: int, answers: Sequence[Answer]) -> list[Message]:
        return await _answer(self._actor.exchange.remote(number, answers))

    async def stop(self, number: int) -> None:
        await _answer(self._actor.stop.remote(number))

    async def close(self) -> None:
        # The engine's threads and memory go with the process.
        _ray().kill(self._actor)


async def _answer(asked: Awaitable[T]) -> T:
    """What the actor answers, or the error that it raised, as itself."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return await asked
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise WorkerLost(str(error).strip().partition("\n")[0]) from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'atts-engine[ray]'") from error
    return ray
