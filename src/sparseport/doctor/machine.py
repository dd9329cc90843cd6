"""The machine: processor, cores, memory, disk, and why devices are missing. `root` is `/`, or a test's copy of it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path("/")


@dataclass(frozen=True)
class Feature:
    """Something that a processor can do.

    flags  what the kernel calls it; one of them is enough
    with_  what its presence means for speed and drift, without what its absence means
    """

    name: str
    flags: frozenset[str]
    present: str
    absent: str


# Drift was measured by this project's own exports and on one more machine with VNNI and bf16; AMX was never run.
X86_FEATURES = (
    Feature(
        "AVX2",
        frozenset({"avx2"}),
        "vector kernels of both runtimes",
        "the runtimes fall back to slow kernels; nothing here was measured so",
    ),
    Feature(
        "VNNI",
        frozenset({"avx512_vnni", "avx_vnni"}),
        "int8 products: OpenVINO rounds activations to int8 by default, which is faster and drifts (KL about 4e-3 in "
        "one model); ONNX Runtime's fast level gains most here",
        "OpenVINO does not round activations by default: little drift at its defaults (KL about 1e-7 in one model)",
    ),
    Feature(
        "BF16",
        frozenset({"avx512_bf16", "amx_bf16"}),
        "OpenVINO computes in bf16 by default: faster prompts, and drift; INFERENCE_PRECISION_HINT=f32 takes it back",
        "OpenVINO computes in float32 by default",
    ),
    Feature(
        "AMX",
        frozenset({"amx_int8", "amx_bf16"}),
        "matrix units: faster prompts; never measured here",
        "long prompts are read at the speed of vector kernels",
    ),
)
ARM_FEATURES = (
    Feature(
        "i8mm",
        frozenset({"i8mm"}),
        "int8 matrix products; never measured here",
        "no int8 matrix products; never measured here",
    ),
    Feature("BF16", frozenset({"bf16"}), "bf16 products; never measured here", "no bf16 products; never measured here"),
)


def describe(root: Path = ROOT) -> dict[str, Any]:
    """Processor and its features, cores, memory, disk, Python; None where the system does not say."""
    model, flags = processor(root)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": model,
        "features": features(flags),
        "cores": cores(root),
        "memory": memory(root),
        "disk": disk(),
    }


def processor(root: Path = ROOT) -> tuple[str, frozenset[str] | None]:
    """The processor's name, and its flags by the names of the Linux kernel; None on other systems."""
    try:
        text = (root / "proc" / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())  # the first core stands for all
    flags = fields.get("flags", fields.get("features"))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, None if flags is None else frozenset(flags.lower().split())


def features(flags: frozenset[str] | None) -> list[dict[str, Any]]:
    """What the flags mean, one entry per feature that matters; empty where flags are not known."""
    if flags is None:
        return []
    table = ARM_FEATURES if "asimd" in flags else X86_FEATURES
    return [
        {"name": one.name, "present": (there := bool(one.flags & flags)), "means": one.present if there else one.absent}
        for one in table
    ]


def cores(root: Path = ROOT) -> dict[str, float | int | None]:
    """Cores of the machine, those that this process may use, and the share of time that its control group allows."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {"all": os.cpu_count(), "usable": usable, "allowed": _cpu_limit(root)}


def _cpu_limit(root: Path) -> float | None:
    """Processors' worth of time, from cgroup v2 or v1."""
    control = root / "sys" / "fs" / "cgroup"
    two = _words(control / "cpu.max")
    one = _words(control / "cpu" / "cpu.cfs_quota_us") + _words(control / "cpu" / "cpu.cfs_period_us")
    quota = two if len(two) == 2 else one
    if len(quota) != 2 or not all(word.isdigit() for word in quota) or quota[1] == "0":  # `max`, -1
        return None
    return int(quota[0]) / int(quota[1])


def memory(root: Path = ROOT) -> dict[str, int | None]:
    """Bytes of memory: all, free to use now, and the limit of this process's control group."""
    lines = _words(root / "proc" / "meminfo")
    kib = {lines[at]: int(lines[at + 1]) << 10 for at in range(len(lines) - 1) if lines[at].endswith(":")}
    total = kib.get("MemTotal:")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    control = root / "sys" / "fs" / "cgroup"
    limits = [_words(control / "memory.max"), _words(control / "memory" / "memory.limit_in_bytes")]
    limit = next((int(words[0]) for words in limits if words and words[0].isdigit()), None)
    if limit is not None and total is not None and limit >= total:
        limit = None  # version 1 says "no limit" with a huge number
    return {"all": total, "free": kib.get("MemAvailable:"), "allowed": limit}


def disk() -> dict[str, dict[str, Any]]:
    """Free bytes where outputs go by default, and where scratch files go."""
    places = {"here": Path.cwd(), "scratch": Path(tempfile.gettempdir())}
    return {name: {"path": str(path), "free": shutil.disk_usage(path).free} for name, path in places.items()}


def has_nvidia_gpu(root: Path = ROOT) -> bool | None:
    """Whether an NVIDIA driver runs a GPU; None on systems where that takes asking the driver."""
    if not sys.platform.startswith("linux"):
        return None
    return any((root / "proc" / "driver" / "nvidia" / "gpus").glob("*")) or (root / "dev" / "nvidia0").exists()


def why_missing(device: str, root: Path = ROOT, may_open: Callable[[Path], bool] | None = None) -> str:
    """Why OpenVINO does not list a device, `GPU` or `NPU`, as far as the system shows; may_open is for tests."""
    if not sys.platform.startswith("linux"):
        return "OpenVINO lists none; look for the device's driver"
    may_open = may_open or (lambda path: os.access(path, os.R_OK | os.W_OK))
    folder, pattern, driver = {
        "GPU": (root / "dev" / "dri", "renderD*", "Intel's compute runtime (OpenCL)"),
        "NPU": (root / "dev" / "accel", "accel*", "Intel's NPU driver (Level Zero)"),
    }[device]
    nodes = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if not nodes:
        return f"the kernel shows none ({Path('/') / folder.relative_to(root)} has no {pattern})"
    closed = [node.name for node in nodes if not may_open(node)]
    if len(closed) == len(nodes):
        return f"this user may not open {', '.join(closed)}; join the group that owns it (often render)"
    return f"the kernel shows {', '.join(node.name for node in nodes)}; {driver} is missing, or it is no Intel device"


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
