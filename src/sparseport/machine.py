"""What decides on a machine how long a model takes: processor, cores, memory, versions. No host name, no paths."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("openvino", "openvino-genai", "openvino-tokenizers", "onnxruntime", "onnxruntime-genai", "torch", "transformers"),
    *("optimum-intel", "nncf", "onnx", "llama-cpp-python", "peft", "numpy"),
)
"""Distributions whose versions a figure depends on."""

# Instruction sets that decide which kernels a runtime takes, by the names of Linux.
_FLAGS = (
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def processor() -> dict[str, Any]:
    """The processor's name, and how many cores this process may use."""
    usable = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() if usable is None else len(usable(0)),
    }


def describe() -> dict[str, Any]:
    """All of it: processor, cores, `memory_gib`, `flags`, `system`, `niceness` (0 is the usual priority of a process,
    more is less), `python`, `versions` of what is installed."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return {
        **processor(),
        "memory_gib": memory_gib(),
        "flags": [flag for flag in _FLAGS if flag in present],
        "system": platform.system(),
        "niceness": os.nice(0) if hasattr(os, "nice") else None,
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }


def memory_gib() -> float | None:
    """Main memory in GiB, to a tenth; None where the system does not say."""
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return float(f"{pages * size / 2**30:.1f}")


def load() -> float | None:
    """Processes that wanted to run, on average over the last minute; None where the system does not say."""
    return float(f"{os.getloadavg()[0]:.2f}") if hasattr(os, "getloadavg") else None


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo(field: str) -> str | None:
    """A field of Linux' description of the first processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), None)
