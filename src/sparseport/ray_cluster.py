"""A connection to Ray: to the cluster that there is, or to one of this process' own on this machine alone."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from sparseport.errors import EnvironmentProblem
from sparseport.extras import require_packages

# The smallest object store that Ray starts with is 75 MiB.
OBJECT_STORE_BYTES = 80 << 20


@contextlib.contextmanager
def connected(cpus: int, object_store: int = OBJECT_STORE_BYTES) -> Iterator[Any]:
    """The module `ray`, connected: to the Ray that this process uses already, that runs on this machine, or that
    RAY_ADDRESS names; otherwise one is started.

    What is started listens on the loopback interface only, without dashboard and usage statistics, and ends with the
    block.

    Args:
        cpus: processors of a Ray that is started.
        object_store: bytes of its object store.

    Raises:
        EnvironmentProblem: Ray is not installed, cannot be reached, or does not start.
    """
    require_packages(["distributed"])
    # Ray reads it when it is imported, and its processes inherit it.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if ray.is_initialized():
        yield ray
        return
    with contextlib.ExitStack() as undo:
        try:
            _start(ray, undo, cpus, object_store)
            yield ray
        finally:
            ray.shutdown()


def _start(ray: Any, undo: contextlib.ExitStack, cpus: int, object_store: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray tells on standard output of workers that died, whatever log_to_driver says; that is ours for results.
    undo.enter_context(_switched("ray._private.worker", "_worker_logs_enabled", False))
    try:
        ray.init(address="auto", **quiet)
        return
    except ConnectionError as error:
        if "RAY_ADDRESS" in os.environ:
            raise EnvironmentProblem(
                "cannot reach the Ray cluster that RAY_ADDRESS names",
                where=os.environ["RAY_ADDRESS"],
                found=str(error).splitlines()[0][:120],
                fix="start it, or unset RAY_ADDRESS to use this machine",
            ) from error
    # A folder of its own, so that no other process takes this Ray for one that is there for all. Sockets lie in
    # it, whose paths may have some 100 characters: a user's own temporary folder can be too deep.
    folder = tempfile.mkdtemp(prefix="sparseport-ray-", dir="/tmp" if os.name == "posix" else None)
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    try:
        # On Linux, Ray has no public way to listen on 127.0.0.1 only, as it does on macOS and Windows.
        with _switched("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", False):
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=object_store,
                include_dashboard=False,
                _temp_dir=folder,
                **quiet,
            )
    except Exception as error:
        raise EnvironmentProblem(
            "Ray does not start on this machine",
            found=(str(error).splitlines() or [type(error).__name__])[0][:120],
            fix="a search runs without it with backend processes",
        ) from error


@contextlib.contextmanager
def _switched(module: str, name: str, value: object) -> Iterator[None]:
    """Give a variable of a module another value for the length of the block; one that is not there stays away."""
    holder = importlib.import_module(module)
    if not hasattr(holder, name):
        yield
        return
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
