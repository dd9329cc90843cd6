"""What an export costs: wall time and peak memory of ours and of the stock path, side by side in one run.

    python benchmarks/export_cost.py --work-dir demo --rounds 3

Ours starts from the INT4 base, the sparse base and the adapter, and merges them; the stock tools start from the merged
model, saved dequantised: in float32, which holds it exactly, and in float16, which does not but is half the size. They
compress the embedding as well, which ours leaves in float16 here. Rounds are interleaved. Memory is the peak
over time of the sum over the process tree of proportional set sizes (shared pages counted once), sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import common
import psutil

from sparseport.offline import go_offline

go_offline()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("demo"), help="a finished demo folder")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    machine = common.machine()
    _, recipe = common.demo_job(options.work_dir)
    with tempfile.TemporaryDirectory(dir=options.work_dir) as scratch_name:
        scratch = Path(scratch_name)
        _save_merged(recipe, scratch)
        ours = [
            sys.executable,
            "-m",
            "sparseport.cli",
            "export",
            "--quiet",
            "--overwrite",
            "--base",
            str(recipe.base),
            "--sparse-base",
            str(recipe.sparse_base),
            "--adapter",
            str(recipe.adapter),
            "--sub-adapter",
            "heuristic",
            "--output",
            str(scratch / "ours"),
        ]
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(scratch / "merged")]
        builder += ["-o", str(scratch / "stock"), "-c", str(scratch / "cache"), "-p", "int4", "-e", "cpu"]
        onnx = ["--target", "onnx"]
        commands = {
            "sparseport export --no-numerics": [*ours, "--no-numerics"],
            "sparseport export (with logit check)": ours,
            "sparseport export --target onnx --no-numerics": [*ours, *onnx, "--no-numerics"],
            "sparseport export --target openvino --target onnx --no-numerics": [
                *ours,
                *onnx,
                "--target",
                "openvino",
                "--no-numerics",
            ],
            "onnxruntime-genai model builder int4, from float32": builder,
            "optimum-cli int4 g64, from float16": common.optimum_export(scratch / "merged16", scratch / "stock"),
            "optimum-cli int4 g64, from float32": common.optimum_export(scratch / "merged", scratch / "stock"),
        }
        samples: dict[str, list[dict[str, float]]] = {label: [] for label in commands}
        for number in range(options.rounds):
            for label, command in commands.items():
                shutil.rmtree(scratch / "stock", ignore_errors=True)
                samples[label].append(measure(command))
                print(f"round {number + 1}: {label}: {samples[label][-1]}", flush=True)
    result = {
        "machine": machine,
        "rounds": options.rounds,
        "rows": [_summary(label, runs) for label, runs in samples.items()],
    }
    path = common.save("export_cost", result)
    print(markdown(result))
    print(f"written to {path.name}")


def markdown(result: dict[str, Any]) -> str:
    """The README's table; ratios are against the last row."""
    stock = result["rows"][-1]
    return common.table(
        ["command", "wall time (s)", "peak memory (MiB)", "time ratio", "memory ratio"],
        [
            [
                row["command"],
                f"{row['seconds']:.1f} [{row['seconds_min']:.1f}-{row['seconds_max']:.1f}]",
                f"{row['peak_mib']:.0f}",
                f"{row['seconds'] / stock['seconds']:.2f}",
                f"{row['peak_mib'] / stock['peak_mib']:.2f}",
            ]
            for row in result["rows"]
        ],
    )


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; its wall time in seconds and the peak memory of its process tree in MiB."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_memory(root))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command[:3]} failed: {log.read()[-2000:].decode(errors='replace')}")
    return {"seconds": seconds, "peak_mib": peak / 2**20}


def _tree_memory(root: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if os.name == "posix" and sys.platform == "linux":
                    total += _pss(process.pid)
                else:
                    total += process.memory_info().rss
    return total


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _summary(label: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    return {
        "command": label,
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "runs": runs,
    }


def _save_merged(recipe: Any, scratch: Path) -> None:
    from transformers import AutoTokenizer

    from sparseport.nls.reference import load_merged

    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    model: Any = load_merged(recipe)
    for name in ("merged", "merged16"):
        (model if name == "merged" else model.half()).save_pretrained(scratch / name)
        tokenizer.save_pretrained(scratch / name)


if __name__ == "__main__":
    main()
