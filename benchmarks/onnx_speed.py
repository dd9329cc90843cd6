"""The same weights in both runtimes: decode and prefill, exact and fast settings, in one interleaved run.

    python benchmarks/onnx_speed.py --work-dir demo --rounds 5

Every folder is exported from the demo's checkpoint, so all hold the same INT4 weights bit for bit; they differ in
runtime, settings, and how the embedding (and so the tied head) is stored. Each measurement is a process of its own with
a warm-up run; rounds are interleaved, because machines are noisy. Drift is the export's own logit check: KL divergence
of the runtime's logits at those settings from the dequantised model in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

from sparseport.offline import go_offline
from sparseport.verify.runs import OPENVINO_FULL_PRECISION

go_offline()


@dataclass(frozen=True)
class Variant:
    """One row: what is exported, which engine runs it, and where its drift stands in the certificate."""

    label: str
    export: tuple[str, ...]
    engine: str
    settings: dict[str, str] = field(default_factory=dict)
    drift: str = "default"


OPENVINO, ONNX = "openvino-genai", "onnxruntime-genai"
VARIANTS = [
    Variant("OpenVINO, default settings", (), OPENVINO),
    Variant("OpenVINO, full precision", (), OPENVINO, OPENVINO_FULL_PRECISION, "full_precision"),
    Variant("OpenVINO, default settings, INT8 embedding", ("--embedding", "int8"), OPENVINO),
    Variant("ONNX Runtime, exact", ("--target", "onnx"), ONNX),
    Variant("ONNX Runtime, exact, INT8 embedding", ("--target", "onnx", "--embedding", "int8"), ONNX),
    Variant("ONNX Runtime, fast", ("--target", "onnx", "--onnx-accuracy", "fast"), ONNX),
    Variant(
        "ONNX Runtime, fast, INT8 embedding",
        ("--target", "onnx", "--onnx-accuracy", "fast", "--embedding", "int8"),
        ONNX,
    ),
    Variant("ONNX Runtime, qdq, exact", ("--target", "onnx", "--onnx-format", "qdq"), ONNX),
    Variant("ONNX Runtime, qdq, fast", ("--target", "onnx", "--onnx-format", "qdq", "--onnx-accuracy", "fast"), ONNX),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("demo"), help="a finished demo folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(dir=options.work_dir) as scratch:
        folders = _exports(options.work_dir, Path(scratch))
        machine = common.machine()
        samples: dict[str, list[dict[str, float]]] = {variant.label: [] for variant in VARIANTS}
        for number in range(options.rounds):
            for variant in VARIANTS:
                sample = _measure(variant, folders[variant.export], options.prompt, options.tokens)
                samples[variant.label].append(sample)
                print(f"round {number + 1}: {variant.label}: {sample}", flush=True)
        rows = [_row(variant, folders[variant.export], samples[variant.label]) for variant in VARIANTS]
    result = {
        "machine": machine,
        "rounds": options.rounds,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "rows": rows,
    }
    path = common.save("onnx_speed", result)
    print(markdown(result))
    print(f"written to {path.name}")


def markdown(result: dict[str, Any]) -> str:
    """The README's table; ratios are against the first row."""
    first = result["rows"][0]
    return common.table(
        ["runtime", "decode (ms/token)", "ratio", f"prefill of {result['prompt']} (ms)", "ratio", "MiB", "KL"],
        [
            [
                row["label"],
                _range(row["decode_ms"]),
                f"{row['decode_ms'][0] / first['decode_ms'][0]:.2f}",
                _range(row["first_token_ms"]),
                f"{row['first_token_ms'][0] / first['first_token_ms'][0]:.2f}",
                f"{row['size_mib']:.0f}",
                row["kl"],
            ]
            for row in result["rows"]
        ],
    )


def _range(values: list[float]) -> str:
    return f"{values[0]:.1f} [{values[1]:.1f}-{values[2]:.1f}]"


def _exports(work_dir: Path, scratch: Path) -> dict[tuple[str, ...], Path]:
    """One folder for each way to export that a variant needs."""
    folders: dict[tuple[str, ...], Path] = {}
    for variant in VARIANTS:
        if variant.export in folders:
            continue
        folder = folders[variant.export] = scratch / f"export-{len(folders)}"
        print(f"exporting: {' '.join(variant.export) or '--target openvino'}", flush=True)
        inputs = {"base": "int4", "sparse-base": "sparse", "adapter": "adapter"}
        command = [sys.executable, "-m", "sparseport.cli", "export", "--quiet", "--sub-adapter", "heuristic"]
        for option, name in inputs.items():
            command += [f"--{option}", str(work_dir / name)]
        common.run([*command, *variant.export, "--output", str(folder)])
    return folders


def _measure(variant: Variant, folder: Path, prompt: int, tokens: int) -> dict[str, float]:
    script = str(Path(__file__).with_name("measure.py"))
    command = [sys.executable, script, variant.engine, str(folder), "--prompt", str(prompt), "--tokens", str(tokens)]
    done = subprocess.run(
        [*command, "--settings", json.dumps(variant.settings)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{variant.label} failed:\n{done.stderr[-2000:]}")
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def _row(variant: Variant, folder: Path, runs: list[dict[str, float]]) -> dict[str, Any]:
    from sparseport.verify.certificate import Certificate

    certificate = Certificate.read(folder)
    weights = ("openvino_model.bin", "model.onnx.data")
    row: dict[str, Any] = {
        "label": variant.label,
        "size_mib": sum(facts["size"] for name, facts in certificate.files.items() if name in weights) / 2**20,
        "kl": certificate.body["numerics"][variant.drift]["kl"],
        "top1": certificate.body["numerics"][variant.drift]["top1"],
        "runs": runs,
    }
    for key in ("decode_ms", "first_token_ms", "load_s", "peak_mib"):
        values = [run[key] for run in runs]
        row[key] = [statistics.median(values), min(values), max(values)]
    return row


if __name__ == "__main__":
    main()
