"""AutoRound: rounded to nearest (no tuning, so no calibration data), read back by its own packing classes."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round.schemes import QuantizationScheme
from samples import Dequantised, Paths, finish, modules_with, paths, tensors, write_expected
from transformers import AutoModelForCausalLM, AutoTokenizer

GPTQ_WORDS = (
    "auto_round_extension.torch.qlinear_torch_zp.QuantLinear.forward on a unit matrix: scale * (code - zero) in the "
    "scales' float16, and once more with the scales cast to float32"
)
AWQ_WORDS = (
    "auto_round.export.export_to_awq.utils.dequantize_gemm: (code - zero) * scale in the scales' float16, and once "
    "more with the scales cast to float32"
)
MIXED: dict[str, dict[str, Any]] = {
    "model.layers.0.self_attn.o_proj": {"bits": 4, "group_size": 64},
    "model.layers.0.self_attn.v_proj": {"bits": 16},
    "lm_head": {"bits": 4, "group_size": 32},
}
# name -> (source, export format, symmetric, settings of single layers)
SAMPLES: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "auto-round-gptq-asym-g32": ("two-layers", "auto_gptq", False, {}),
    "auto-round-gptq-asym-g32-mixed": ("one-layer", "auto_gptq", False, MIXED),
    "auto-round-sym-g32": ("one-layer", "auto_round", True, {}),
    "auto-round-asym-g32": ("one-layer", "auto_round", False, {}),
    "auto-round-asym-g32-mixed": ("one-layer", "auto_round", False, MIXED),
    "auto-round-awq-asym-g32": ("one-layer", "auto_awq", False, {}),
}


def main() -> None:
    where = paths()
    for name, (source, form, symmetric, layer_config) in SAMPLES.items():
        folder = where.fresh(name)
        model = AutoModelForCausalLM.from_pretrained(where.sources / source, dtype=torch.float16)
        tuner = AutoRound(
            model,
            AutoTokenizer.from_pretrained(where.sources / source),
            scheme=QuantizationScheme(bits=4, group_size=32, sym=symmetric, data_type="int"),
            iters=0,
            disable_opt_rtn=True,
            device_map="cpu",
            amp=False,  # else the dtype of what stays unquantised depends on the processor
            layer_config={layer: dict(settings) for layer, settings in layer_config.items()},
            # When it saves block by block, the head stays unpacked, whatever the config then says, and what is not
            # quantised becomes float32. When it does not, it cannot write AWQ words. So: one each way.
            low_cpu_mem_usage=form == "auto_round" and not symmetric,
        )
        tuner.quantize_and_save(str(folder), format=form)
        flatten(folder)
        layers, how = dequantised(folder)
        finish(where, name, layers, tool="auto-round", version=version("auto-round"), how=how)
    if where.shared is not None:
        shared_sample(where, where.shared, "gptq-v1-asym-g64-autoround")


def shared_sample(where: Paths, shared: Path, name: str) -> None:
    """Hashes only, for a checkpoint that is not in the repository."""
    folder = shared / "checkpoints" / name
    layers, how = dequantised(folder)
    write_expected(
        where.samples / f"shared-{name}.json",
        where.values / f"shared-{name}",
        tensors(folder),
        layers,
        tool="auto-round",
        version=version("auto-round"),
        how=how,
    )


def flatten(folder: Path) -> None:
    """AutoRound puts the model into a folder of its own; bring it up."""
    for path in folder.glob("*/*"):
        shutil.move(path, folder / path.name)
    for path in folder.iterdir():
        if path.is_dir():
            path.rmdir()


def dequantised(folder: Path) -> tuple[dict[str, Dequantised], str]:
    stored = tensors(folder)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    packing = {"gptq": "auto_round:auto_gptq", "awq": "auto_round:auto_awq"}.get(settings["quant_method"])
    packing = packing or settings["packing_format"]
    # The class that AutoRound itself picks for a packing.
    kind = dynamic_import_quant_linear_for_packing(packing, 4, settings["group_size"], settings["sym"])
    layers = {}
    for module in modules_with(stored, "qweight"):
        parts = {
            leaf: stored[f"{module}.{leaf}"]
            for leaf in ("qweight", "qzeros", "scales", "g_idx")
            if f"{module}.{leaf}" in stored
        }
        read = gemm_words if kind is WQLinear_GEMM else gptq_words
        layers[module] = read(kind, parts)
    return layers, AWQ_WORDS if kind is WQLinear_GEMM else GPTQ_WORDS


def gemm_words(kind: Any, parts: dict[str, torch.Tensor]) -> Dequantised:
    words, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    group_size = words.shape[0] // scales.shape[0]
    return Dequantised(
        dequantize_gemm(words, zeros, scales, 4, group_size).T,
        dequantize_gemm(words, zeros, scales.float(), 4, group_size).T,
    )


def gptq_words(kind: Any, parts: dict[str, torch.Tensor]) -> Dequantised:
    rows, columns = parts["scales"].shape[1], parts["qweight"].shape[0] * 8
    group_size = columns // parts["scales"].shape[0]
    # forward() cuts off outputs where g_idx is set and there are more outputs than inputs; a plain one says nothing.
    if "g_idx" in parts and not torch.equal(parts["g_idx"], torch.arange(columns, dtype=torch.int32) // group_size):
        raise RuntimeError("g_idx is not in order")
    layer = kind(4, group_size, columns, rows, False)
    for leaf in ("qweight", "qzeros", "scales"):
        setattr(layer, leaf, parts[leaf])
    own = layer(torch.eye(columns, dtype=layer.scales.dtype)).T
    layer.scales = layer.scales.float()
    return Dequantised(own, layer(torch.eye(columns)).T)


if __name__ == "__main__":
    main()
