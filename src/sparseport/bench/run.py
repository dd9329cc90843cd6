"""`sparseport.bench()`: measure folders, and say everything that a figure depends on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.bench.engines import missing_engines
from sparseport.bench.peers import make_peers
from sparseport.bench.rounds import Asked, Samples, measure_rounds
from sparseport.bench.subjects import Contender, Subject, contenders, subjects_at
from sparseport.bench.traffic import bytes_per_token
from sparseport.child import Child
from sparseport.errors import EnvironmentProblem, UsageError
from sparseport.figures import paired_ratio, summary
from sparseport.machine import describe, load, processor
from sparseport.progress import Progress
from sparseport.verify.certificate import Certificate

SCHEMA = 1
KIND = "sparseport-bench"

FIGURES = ("decode_ms", "decode_tokens_s", "first_token_ms", "prefill_tokens_s", "load_s", "peak_mib", "energy_j")
"""What is measured of each row; see `sparseport.bench.worker.measure` for units."""


def bench(
    paths: Sequence[Path | str | Subject],
    *,
    engines: Sequence[str] | None = None,
    devices: Sequence[str] | None = None,
    asked: Asked | None = None,
    bandwidth: bool = True,
    peers: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure folders and GGUF files on this machine, side by side.

    Args:
        paths: exported folders, other tools' OpenVINO or onnxruntime-genai folders, checkpoints, GGUF files; a folder
            that holds one folder for each target stands for both. Ratios are against the first.
        engines: engines to run them with; by default the one that applications use for each.
        devices: OpenVINO devices for its two engines; by default all that are found.
        asked: how often and how long.
        bandwidth: whether to measure how fast memory is read, for the fraction of what is possible.
        peers: whether stock ways to INT4 are made from the weights of the first path and measured beside them.
        progress: where to report; quiet by default.

    Returns:
        The result as plain data: see docs/bench.md and `bench.schema.json`.

    Raises:
        BadInput: a path is nothing that can be run.
        UsageError: counts, engines or devices make no sense.
        EnvironmentProblem: an engine that was asked for is not installed, or no row could be measured.
    """
    asked, progress = asked or Asked(), progress or Progress("quiet")
    check_asked(asked)
    rows = contenders(subjects_at(paths), list(engines) if engines else None)
    rows, missing = _installed(rows, asked_for=engines is not None)
    found = find_devices(rows)
    rows = _on_devices(rows, found, devices)
    with tempfile.TemporaryDirectory() as scratch:
        if peers:
            made, absent = with_peers(rows[0], Path(scratch), progress)
            rows, missing = rows + made, missing + absent
        return _measured(rows, asked, found, missing, bandwidth, progress)


def _measured(
    rows: list[Contender],
    asked: Asked,
    found: list[dict[str, Any]],
    missing: list[dict[str, str]],
    bandwidth: bool,
    progress: Progress,
) -> dict[str, Any]:
    before = load()
    speed = measured_bandwidth(progress) if bandwidth else None
    with progress.task("measuring", len(rows) * asked.rounds) as step:
        samples = measure_rounds(rows, asked, step)
    return result_of(samples, asked, found, missing, speed, before)


def result_of(
    samples: Sequence[Samples],
    asked: Asked,
    devices: list[dict[str, Any]],
    missing: list[dict[str, str]],
    bandwidth: dict[str, Any] | None,
    load_before: float | None,
) -> dict[str, Any]:
    """A result from what was measured.

    Raises:
        EnvironmentProblem: nothing could be measured.
    """
    good = [row for row in samples if row.failed is None]
    if not good:
        failed = next(row for row in samples if row.failed)
        raise EnvironmentProblem(
            "nothing could be measured", where=failed.contender.label, found=str(failed.failed), code="E_BENCH"
        ) from failed.failed
    machine = {**describe(), "load_before": load_before, "load_after": load(), "bandwidth_gb_s": bandwidth}
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "sparseport": __version__,
        "machine": machine,
        "asked": asked.as_dict(),
        "devices": devices,
        "missing": missing,
        "failed": [
            {"label": row.contender.label, "engine": row.contender.engine, "why": str(row.failed)}
            for row in samples
            if row.failed
        ],
        "rows": [row_of(row, good[0], bandwidth) for row in good],
    }


def row_of(row: Samples, first: Samples, bandwidth: dict[str, Any] | None) -> dict[str, Any]:
    """A row of a result; `first` is the one that ratios are against."""
    subject = row.contender.subject
    traffic, counted = bytes_per_token(subject)
    figures = {name: _figure([run[name] for run in row.runs]) for name in FIGURES}
    limit, decode = None, figures["decode_tokens_s"]
    if bandwidth is not None and traffic and decode is not None:
        possible = bandwidth["median"] * 1e9 / traffic
        limit = {"tokens_s": possible, "reached": decode["median"] / possible}
    pairs = {"decode": "decode_ms", "first_token": "first_token_ms"}
    return {
        "label": row.contender.label,
        "model": subject.label,
        "engine": row.contender.engine,
        "device": row.contender.device,
        "settings": dict(row.contender.settings),
        "size_bytes": subject.size,
        "bytes_per_token": traffic,
        "bytes_counted": counted,
        **figures,
        "ratio": {
            key: paired_ratio([run[name] for run in row.runs], [run[name] for run in first.runs])
            for key, name in pairs.items()
        },
        "limit": limit,
        "drift": None,
        "certificate_sha256": Certificate.read(subject.path).seal() if subject.certified else None,
    }


def check_asked(asked: Asked) -> None:
    """Refuse counts that measure nothing.

    Raises:
        UsageError: a count is too small, or a core does not exist.
    """
    if min(asked.prompt, asked.rounds) < 1 or asked.tokens < 2 or min(asked.warm_up, asked.threads) < 0:
        raise UsageError(
            "nothing to measure",
            expected="prompt and rounds of 1 or more, tokens of 2 or more",
            found=f"prompt {asked.prompt}, rounds {asked.rounds}, tokens {asked.tokens}",
        )
    if asked.pinned is not None:
        _check_cores(asked.pinned)


def find_devices(rows: Sequence[Contender]) -> list[dict[str, Any]]:
    """OpenVINO's devices if it runs a row, else the processor alone; see `sparseport.bench.devices`."""
    if not any(row.engine.startswith("openvino") for row in rows):
        return [{"name": "CPU", "present": True, "full_name": processor()["processor"]}]
    with Child("sparseport.bench.devices", {}) as child:
        devices: list[dict[str, Any]] = child.result()["devices"]
    return devices


def with_peers(first: Contender, scratch: Path, progress: Progress) -> tuple[list[Contender], list[dict[str, str]]]:
    """Rows of the peers that could be made from a folder's weights, and what is missing of the others."""
    with progress.task("making peers") as step:
        made, missing = make_peers(first.subject, scratch, step)
    return [Contender(folder, peer.engine, name=peer.name) for peer, folder in made], missing


def measured_bandwidth(progress: Progress) -> dict[str, Any]:
    """How fast memory is read, measured in a process of its own; see `sparseport.bench.bandwidth`."""
    with progress.task("memory bandwidth"), Child("sparseport.bench.bandwidth", {}) as child:
        return child.result()


def _figure(values: list[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    return summary(known) if len(known) == len(values) else None


def _installed(rows: list[Contender], asked_for: bool) -> tuple[list[Contender], list[dict[str, str]]]:
    """The rows whose engine is installed, and what is missing.

    Raises:
        EnvironmentProblem: a missing engine was asked for, or nothing is left.
    """
    absent = missing_engines()
    wanted = [row for row in rows if row.engine in absent]
    if wanted and (asked_for or len(wanted) == len(rows)):
        engine = wanted[0].engine
        raise EnvironmentProblem("the engine is not installed", where=engine, fix=absent[engine])
    missing = [{"engine": name, "why": "not installed", "fix": fix} for name, fix in sorted(absent.items())]
    return [row for row in rows if row.engine not in absent], missing


def _on_devices(rows: list[Contender], devices: list[dict[str, Any]], wanted: Sequence[str] | None) -> list[Contender]:
    """Every row on each device that its engine knows.

    Raises:
        UsageError: a device was asked for that is not there.
    """
    present = [device["name"] for device in devices if device["present"]]
    for name in wanted or ():
        if name not in present:
            raise UsageError("no such device", found=name, expected=", ".join(present))
    chosen = list(wanted or present)
    found = []
    for row in rows:
        for device in chosen if row.engine.startswith("openvino") else ["CPU"]:
            found.append(Contender(row.subject, row.engine, device, row.settings, row.name))
    return found


def _check_cores(cores: Sequence[int]) -> None:
    usable = getattr(os, "sched_getaffinity", None)
    if usable is None:
        raise UsageError("this system cannot pin a process to cores", found="--pin")
    allowed = usable(0)
    if not cores or not set(cores) <= allowed:
        raise UsageError("no such core", expected=", ".join(map(str, sorted(allowed))), found=cores)
