"""The same bench on every machine of a Ray cluster: one table.

Folders travel through Ray's object store in pieces and are checked by SHA-256 where they arrive, so machines share no
file system. Machines measure at the same time; nodes that are one machine (one address) measure one after the other.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sparseport import __version__
from sparseport.bench.rounds import Asked
from sparseport.bench.run import bench, check_asked
from sparseport.bench.subjects import Subject, contenders, subjects_at
from sparseport.errors import EnvironmentProblem, FidelityError, SparseportError, UsageError
from sparseport.progress import Progress
from sparseport.ray_cluster import connected

SCHEMA = 1
KIND = "sparseport-fleet"

# One piece of a file in the object store.
_PIECE = 32 << 20
# Room for a few pieces on their way; a cluster's own store is larger.
_STORE = 256 << 20
_TRIES = 2


@dataclass(frozen=True)
class Node:
    """A node of a Ray cluster: what it is called here, Ray's own name of it, and the machine that it runs on."""

    name: str
    identity: str
    address: str


@dataclass(frozen=True)
class Travelling:
    """A file on its way: the path it had below its folder, its bytes as references, and their SHA-256."""

    path: str
    pieces: tuple[Any, ...]
    sha256: str


def bench_fleet(
    paths: Sequence[Path | str],
    *,
    engines: Sequence[str] | None = None,
    asked: Asked | None = None,
    bandwidth: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run one bench on every machine of the Ray cluster that this process can reach; without one, on this machine.

    Args:
        paths, engines, asked, bandwidth: as for `sparseport.bench.run.bench`.
        progress: where to report.

    Returns:
        `schema`, `kind`, `sparseport`, `machines` (each `name` and its bench's `result`) and `lost` (`name`, `why`).

    Raises:
        BadInput, UsageError: as for a bench; said before anything travels.
        EnvironmentProblem: Ray is missing, or no machine could measure.
    """
    asked, progress = asked or Asked(), progress or Progress("quiet")
    check_asked(asked)
    subjects = subjects_at(paths)
    contenders(subjects, list(engines) if engines else None)
    with connected(cpus=1, object_store=_STORE) as ray:
        nodes = alive(ray.nodes())
        with progress.task("sending files"):
            folders = [(one, _sent(ray, one.path)) for one in subjects]
        options = {"engines": engines, "asked": asked, "bandwidth": bandwidth}

        def start(node: Node) -> Any:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            where = NodeAffinitySchedulingStrategy(node_id=node.identity, soft=False)
            task = ray.remote(num_cpus=1, max_retries=0)(_on_machine).options(scheduling_strategy=where)
            return task.remote(folders, options, __version__)

        with progress.task("measuring machines", len(nodes)) as step:
            found, lost = in_turns(nodes, start, lambda tasks: _next(ray, tasks), step)
    if not found:
        raise EnvironmentProblem("no machine could measure", found=lost[0]["why"], code="E_BENCH")
    return {"schema": SCHEMA, "kind": KIND, "sparseport": __version__, "machines": found, "lost": lost}


def alive(nodes: Sequence[dict[str, Any]]) -> list[Node]:
    """The nodes that are there, in a fixed order, called `machine 1` and so on: no host names leave a fleet."""
    there = [(str(one["NodeManagerAddress"]), str(one["NodeID"])) for one in nodes if one["Alive"]]
    return [Node(f"machine {n}", identity, address) for n, (address, identity) in enumerate(sorted(there), 1)]


def in_turns(
    nodes: Sequence[Node],
    start: Callable[[Node], Any],
    wait: Callable[[list[Any]], tuple[Any, dict[str, Any] | str]],
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every node measures once; two of one address never at the same time. A lost measurement is tried once more.

    Args:
        nodes: all of them.
        start: begins a node's measurement and returns a handle.
        wait: the first handle that is done, and its result, or the reason why there is none.
        on_step: called after each node.

    Returns:
        `name` and `result` of each machine in the order of `nodes`, and `name` and `why` of those without one.
    """
    waiting, tries = list(nodes), dict.fromkeys((node.identity for node in nodes), 0)
    running: dict[Any, Node] = {}
    results: dict[str, dict[str, Any]] = {}
    why: dict[str, str] = {}
    while waiting or running:
        busy = {node.address for node in running.values()}
        for node in list(waiting):
            if node.address not in busy:
                waiting.remove(node)
                busy.add(node.address)
                tries[node.identity] += 1
                running[start(node)] = node
        handle, answer = wait(list(running))
        node = running.pop(handle)
        if isinstance(answer, dict):
            results[node.name] = answer
        elif tries[node.identity] < _TRIES:
            waiting.append(node)
            continue
        else:
            why[node.name] = answer
        on_step()
    named = [node.name for node in nodes]
    return (
        [{"name": name, "result": results[name]} for name in named if name in results],
        [{"name": name, "why": why[name]} for name in named if name in why],
    )


def _next(ray: Any, tasks: list[Any]) -> tuple[Any, dict[str, Any] | str]:
    """The first task that is done, and its result or what went wrong."""
    (ready, *_), _ = ray.wait(tasks, num_returns=1)
    try:
        answer = ray.get(ready)
    except ray.exceptions.RayError as error:
        return ready, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ready, answer["result"] if "result" in answer else str(answer["error"])


def _sent(ray: Any, path: Path) -> list[Travelling]:
    """A subject's files in the object store."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found = []
    for file in files:
        digest = hashlib.sha256()
        pieces = []
        for piece in _pieces(file):
            digest.update(piece)
            pieces.append(ray.put(piece))
        inner = file.name if path.is_file() else file.relative_to(path).as_posix()
        found.append(Travelling(inner, tuple(pieces), digest.hexdigest()))
    return found


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as handle:
        while piece := handle.read(_PIECE):
            yield piece


def arrived(folder: Path, label: str, files: Sequence[Travelling], fetch: Callable[[Any], bytes]) -> Path:
    """Write files that travelled, and check each; returns the folder, or the file if the subject is one.

    Raises:
        FidelityError: a file is not what was sent.
        UsageError: a path leads out of the folder.
    """
    target = folder.joinpath(*PurePosixPath(label).parts)
    for part in (label, *(file.path for file in files)):
        if PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
            raise UsageError("a file's path leads out of its folder", found=part)
    single = len(files) == 1 and files[0].path == target.name and target.suffix == ".gguf"
    for file in files:
        place = target if single else target.joinpath(*PurePosixPath(file.path).parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with place.open("wb") as handle:
            for reference in file.pieces:
                piece = fetch(reference)
                digest.update(piece)
                handle.write(piece)
        if digest.hexdigest() != file.sha256:
            raise FidelityError("a file changed on its way", where=f"{label}, {file.path}")
    return target


def _on_machine(
    folders: list[tuple[Subject, list[Travelling]]], options: dict[str, Any], version: str
) -> dict[str, Any]:
    """What runs on a machine: files in, the bench's result or an error out."""
    import ray

    if version != __version__:
        return {"error": f"sparseport {__version__} is installed there, {version} here"}
    with tempfile.TemporaryDirectory() as name:
        try:
            subjects = [
                # A folder each, so that equal names of files cannot meet; the label is the sender's.
                replace(one, path=arrived(Path(name) / str(number), one.path.name, files, ray.get))
                for number, (one, files) in enumerate(folders)
            ]
            return {"result": bench(subjects, **options)}
        except SparseportError as error:
            return {"error": str(error)}
