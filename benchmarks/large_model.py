"""Models of more than 2 GB: a random Llama of 1.1 billion weights, exported, loaded and run; peak memory.

    python benchmarks/large_model.py --scratch DIR [--builder]

Weights are random (what is measured does not depend on them); shapes are TinyLlama's. One row exports them in float16
(the data file alone is over 2 GB, beyond what one protobuf can hold), one in INT4 with groups of 64; each is verified,
loaded by its runtime's GenAI library and asked for a few tokens. `--builder` adds onnxruntime-genai's own model builder
from the same float16 folder. Memory is measured as in `export_cost.py`. Needs 12 GB of disk, and 12 GB of memory for
`--builder` and for running the float16 folder in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from export_cost import measure

from sparseport.offline import go_offline

go_offline()

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
KV = HIDDEN // HEADS * KV_HEADS
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for everything it makes; kept")
    parser.add_argument("--builder", action="store_true", help="also measure onnxruntime-genai's model builder")
    options = parser.parse_args()
    machine = common.machine()
    dense, int4 = options.scratch / "float16", options.scratch / "int4"
    if not (int4 / "config.json").is_file():
        _write(dense, int4)
    rows = []
    fast = ["--onnx-accuracy", "fast"]
    for label, base, target, engine, more in (
        ("sparseport, float16, onnx", dense, "onnx", "onnxruntime-genai", []),
        ("sparseport, INT4 g64, onnx, exact", int4, "onnx", "onnxruntime-genai", []),
        ("sparseport, INT4 g64, onnx, fast", int4, "onnx", "onnxruntime-genai", fast),
        ("sparseport, INT4 g64, openvino", int4, "openvino", "openvino-genai", []),
    ):
        output = options.scratch / f"out-{len(rows)}"
        command = [sys.executable, "-m", "sparseport.cli", "export", "--quiet", "--overwrite", "--no-tokenizer"]
        command += ["--no-numerics", "--target", target, "--base", str(base), "--output", str(output), *more]
        rows.append({"label": label, **measure(command), "size_mib": _size(output), **_run(output, engine)})
        print(rows[-1], flush=True)
    if options.builder:
        output = options.scratch / "builder"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(dense), "-o", str(output)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(options.scratch / "cache")]
        rows.append({"label": "model builder, int4 (from float16)", **measure(command), "size_mib": _size(output)})
    result = {"machine": machine, "weights": _weights(), "rows": rows}
    path = common.save("large_model", result)
    print(markdown(result))
    print(f"written to {path.name}")


def markdown(result: dict[str, Any]) -> str:
    """The README's table."""
    return common.table(
        ["export", "wall time (s)", "peak memory (MiB)", "folder (MiB)", "decode (ms/token)", "peak running (MiB)"],
        [
            [
                row["label"],
                f"{row['seconds']:.0f}",
                f"{row['peak_mib']:.0f}",
                f"{row['size_mib']:.0f}",
                f"{row['decode_ms']:.0f}" if "decode_ms" in row else "",
                f"{row['run_peak_mib']:.0f}" if "decode_ms" in row else "",
            ]
            for row in result["rows"]
        ],
    )


def _weights() -> int:
    return LAYERS * sum(rows * columns for rows, columns in SHAPES.values()) + 2 * VOCABULARY * HIDDEN


def _matrix(name: str, shape: tuple[int, int]) -> Any:
    """Random float16 weights, the same for a name every time."""
    random = np.random.default_rng(sum(name.encode()) * 7919 + len(name))
    return (random.standard_normal(shape, np.float32) * 0.02).astype(np.float16)


def _write(dense: Path, int4: Path) -> None:
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.checkpoints.safetensors import TensorSpec, write_safetensors
    from sparseport.nls.artifacts import write_gptq_base
    from sparseport.nls.quantize import quantize_rtn

    dense.mkdir(parents=True, exist_ok=True)
    half = np.dtype(np.float16)

    def matrix(name: str, shape: tuple[int, int]) -> TensorSpec:
        return TensorSpec(name, half, shape, lambda: _matrix(name, shape))

    def norm(name: str) -> TensorSpec:
        return TensorSpec(name, half, (HIDDEN,), lambda: np.ones(HIDDEN, half))

    specs = [matrix(f"{name}.weight", (VOCABULARY, HIDDEN)) for name in ("model.embed_tokens", "lm_head")]
    specs.append(norm("model.norm.weight"))
    modules = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    specs += [matrix(f"{module}.weight", shape) for module, shape in modules.items()]
    for i in range(LAYERS):
        specs += [norm(f"model.layers.{i}.{name}_layernorm.weight") for name in ("input", "post_attention")]
    write_safetensors(dense / "model.safetensors", specs)
    (dense / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")

    def quantised(base: ModelFolder) -> Iterator[tuple[str, Any]]:
        for module in modules:
            yield module, quantize_rtn(base.read(f"{module}.weight"), None, group_size=64)

    with ModelFolder.open(dense) as base:
        write_gptq_base(base, quantised(base), int4, group_size=64, symmetric=False)


def _run(folder: Path, engine: str) -> dict[str, float]:
    """Verify the folder, then load it and generate a few tokens."""
    from sparseport.bench.rounds import Asked
    from sparseport.bench.run import bench
    from sparseport.verify.folder import require, verify

    require(verify(folder))
    asked = Asked(prompt=16, tokens=8, rounds=1)
    (row,) = bench([folder], engines=[engine], devices=["CPU"], asked=asked, bandwidth=False)["rows"]
    return {
        "decode_ms": row["decode_ms"]["median"],
        "run_peak_mib": row["peak_mib"]["median"],
        "load_s": row["load_s"]["median"],
    }


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    main()
