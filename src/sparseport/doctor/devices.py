"""What the installed runtimes can compute on. Each is asked in a process of its own, in limited time: drivers crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseport.child import Child
from sparseport.doctor.machine import ROOT, why_missing
from sparseport.errors import SparseportError

# Distributions that bring each runtime.
BROUGHT_BY: dict[str, tuple[str, ...]] = {
    "openvino": ("openvino",),
    "onnxruntime": (
        *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn"),
    ),
    "onnxruntime_genai": ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
    "torch": ("torch",),
}


def ask(runtime: str, timeout: float) -> dict[str, Any]:
    """What a runtime says of itself, or `error`: why it could not be asked.

    Args:
        runtime: one of `BROUGHT_BY`.
        timeout: seconds to wait for it.
    """
    with Child("sparseport.doctor.devices", {"runtime": runtime}) as child:
        try:
            return child.result(timeout)
        except SparseportError as error:
            return {"error": ": ".join(part for part in (error.what, error.where, error.found) if part)}


def with_missing(openvino: dict[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """OpenVINO's answer, and of the devices that it knows in general those that it did not list, each with why."""
    if "devices" not in openvino:
        return openvino
    listed = {device["name"].partition(".")[0] for device in openvino["devices"]}
    return openvino | {"missing": {name: why_missing(name, root) for name in ("GPU", "NPU") if name not in listed}}


def query(runtime: str) -> dict[str, Any]:
    """Import a runtime and ask it; run in the child."""
    return _QUERIES[runtime]()


def _openvino() -> dict[str, Any]:
    import openvino

    core = openvino.Core()
    devices = []
    for name in core.available_devices:
        capabilities = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
        full = str(core.get_property(name, "FULL_DEVICE_NAME")).strip()
        devices.append({"name": name, "full_name": full, "capabilities": sorted(map(str, capabilities))})
    return {"version": openvino.get_version(), "devices": devices}


def _onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {"version": onnxruntime.__version__, "providers": list(onnxruntime.get_available_providers())}


def _onnxruntime_genai() -> dict[str, Any]:
    import onnxruntime_genai

    kinds = ("cuda", "dml", "openvino", "qnn", "webgpu")
    found = {kind: getattr(onnxruntime_genai, f"is_{kind}_available", None) for kind in kinds}
    devices = ["cpu", *(kind for kind, there in found.items() if there is not None and there())]
    return {"version": onnxruntime_genai.__version__, "devices": devices}


def _torch() -> dict[str, Any]:
    import torch

    devices = ["cpu", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))]
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        devices.append("mps")
    if getattr(torch, "xpu", None) is not None and torch.xpu.is_available():
        devices.append("xpu")
    return {"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}


_QUERIES: dict[str, Callable[[], dict[str, Any]]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "onnxruntime_genai": _onnxruntime_genai,
    "torch": _torch,
}


if __name__ == "__main__":
    from sparseport.child import serve

    serve(query)
