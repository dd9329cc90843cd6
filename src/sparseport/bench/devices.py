"""Which devices OpenVINO finds, and which it does not."""

from __future__ import annotations

from typing import Any

LOOKED_FOR = ("CPU", "GPU", "NPU")
_WHY = {
    "CPU": "OpenVINO's CPU plugin is not installed",
    "GPU": "no Intel GPU, or its driver (level-zero, OpenCL) is not installed",
    "NPU": "no NPU, or its driver is not installed",
}


def list_devices() -> dict[str, Any]:
    """Under `devices`, one entry for each kind of device: its name, whether it is `present`, `full_name` or `why` not.

    Several devices of a kind (GPU.0, GPU.1) have an entry each. Run as a child process: a driver may crash.
    """
    import openvino as ov

    core = ov.Core()
    found = list(core.available_devices)
    devices: list[dict[str, Any]] = []
    for kind in LOOKED_FOR:
        own = [name for name in found if name.partition(".")[0] == kind]
        for name in own:
            devices.append({"name": name, "present": True, "full_name": core.get_property(name, "FULL_DEVICE_NAME")})
        if not own:
            devices.append({"name": kind, "present": False, "why": _WHY[kind]})
    return {"devices": devices}


if __name__ == "__main__":
    from sparseport.child import serve

    serve(list_devices)
