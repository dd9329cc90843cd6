"""The machine, read from files like those of a Linux kernel."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sparseport.doctor import machine
from sparseport.doctor.telemetry import telemetry

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="these files are Linux'")

SERVER = "avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"


def write(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_processor_and_what_its_flags_mean(tmp_path: Path) -> None:
    write(
        tmp_path, "proc/cpuinfo", f"processor\t: 0\nmodel name\t: A Server\nflags\t\t: fpu {SERVER}\n\nflags\t: none\n"
    )
    name, flags = machine.processor(tmp_path)
    assert name == "A Server" and flags is not None and "amx_int8" in flags
    assert {one["name"]: one["present"] for one in machine.features(flags)} == dict.fromkeys(
        ("AVX2", "VNNI", "BF16", "AMX"), True
    )
    desktop = machine.features(frozenset(["avx2", "avx_vnni"]))
    assert [one["name"] for one in desktop if one["present"]] == ["AVX2", "VNNI"]
    drifts = {one["name"]: one["means"] for one in desktop}
    assert "drifts" in drifts["VNNI"] and "float32" in drifts["BF16"]
    old = {one["name"]: one["means"] for one in machine.features(frozenset(("sse2",)))}
    assert "slow" in old["AVX2"] and "little drift" in old["VNNI"]
    arm = machine.features(frozenset(("asimd", "i8mm")))
    assert {one["name"]: one["present"] for one in arm} == {"i8mm": True, "BF16": False}


def test_a_system_without_these_files(tmp_path: Path) -> None:
    name, flags = machine.processor(tmp_path)
    assert name and flags is None and machine.features(flags) == []
    assert machine.cores(tmp_path)["allowed"] is None and machine.memory(tmp_path)["free"] is None


def test_memory_and_limits(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n")
    assert machine.memory(tmp_path) == {"all": 2 << 20, "free": 1 << 20, "allowed": None}
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert machine.memory(tmp_path)["allowed"] is None and machine.cores(tmp_path)["allowed"] is None
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000\n")
    assert machine.cores(tmp_path)["allowed"] == 1.5
    write(tmp_path, "sys/fs/cgroup/memory.max", "1048576\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert machine.memory(tmp_path)["allowed"] == 1 << 20 and machine.cores(tmp_path)["allowed"] is None
    write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000\n")
    assert machine.cores(tmp_path)["allowed"] == 0.5


def test_this_machine_is_described() -> None:
    found = machine.describe()
    assert found["cores"]["all"] == os.cpu_count() and found["disk"]["here"]["free"] > 0
    assert found["python"] == sys.version.split()[0]


@linux
def test_why_a_device_is_missing(tmp_path: Path) -> None:
    assert machine.why_missing("GPU", tmp_path) == "the kernel shows none (/dev/dri has no renderD*)"
    write(tmp_path, "dev/dri/card0")
    assert "the kernel shows none" in machine.why_missing("GPU", tmp_path)
    write(tmp_path, "dev/dri/renderD128")
    assert "renderD128; join the group" in machine.why_missing("GPU", tmp_path, lambda path: False)
    assert "compute runtime" in machine.why_missing("GPU", tmp_path, lambda path: True)
    assert "/dev/accel" in machine.why_missing("NPU", tmp_path)
    write(tmp_path, "dev/accel/accel0")
    assert "NPU driver" in machine.why_missing("NPU", tmp_path, lambda path: True)


@linux
def test_an_nvidia_gpu(tmp_path: Path) -> None:
    assert machine.has_nvidia_gpu(tmp_path) is False
    write(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information")
    assert machine.has_nvidia_gpu(tmp_path) is True


@pytest.mark.skipif(sys.platform == "win32", reason="the file lies elsewhere")
def test_telemetry(tmp_path: Path) -> None:
    both = {"openvino-telemetry": "2025.2.0", "huggingface-hub": "1.21.0"}

    def state(environment: dict[str, str]) -> tuple[str, str]:
        found = telemetry(both, environment, tmp_path)
        return found["openvino"].partition(" ")[0], found["huggingface_hub"].partition(" ")[0].rstrip(";")

    assert state({}) == ("sends", "sends") and state({"CI": "true", "DO_NOT_TRACK": "1"}) == ("silent", "silent")
    for text, expected in (("0", "silent"), ("1\n", "sends"), ("", "silent"), ("maybe", "silent")):
        write(tmp_path, "intel/openvino_telemetry", text)
        assert state({"HF_HUB_DISABLE_TELEMETRY": "0"}) == (expected, "sends"), text
    assert set(telemetry({}, {}, tmp_path)) == {"sparseport"}
