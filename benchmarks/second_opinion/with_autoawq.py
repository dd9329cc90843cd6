"""AutoAWQ: quantised on random tokens by its own loop, dequantised by its own unpacking code."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from awq.utils.packing_utils import dequantize_gemm
from awq.utils.quant_utils import dequantize, unpack
from samples import Dequantised, calibration, finish, modules_with, paths, tensors

GEMM = (
    "awq.utils.packing_utils.dequantize_gemm: (code - zero) * scale in the scales' float16, and once more with the "
    "scales cast to float32"
)
GEMV = (
    "awq.utils.quant_utils.unpack and .dequantize on the words of WQLinear_GEMV, without its padding: (code - zero) * "
    "scale in float16"
)


def main() -> None:
    where = paths()
    # Two layers or one, and a group size whose padding of the scales stays small.
    for kind, source, group_size in (("gemm", "two-layers", 32), ("gemv", "one-layer", 64)):
        name = f"autoawq-{kind}-asym-g{group_size}"
        folder = where.fresh(name)
        model = AutoAWQForCausalLM.from_pretrained(
            str(where.sources / source), device_map="cpu", torch_dtype=torch.float16
        )
        config = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": kind.upper()}
        # Clipping wants 64 output features, which k_proj does not have.
        model.quantize(None, quant_config=config, calib_data=calibration(), max_calib_seq_len=64, apply_clip=False)
        model.save_quantized(str(folder))
        layers = dequantised_gemm(folder, group_size) if kind == "gemm" else dequantised_gemv(folder, group_size)
        how = GEMM if kind == "gemm" else GEMV
        finish(where, name, layers, tool="autoawq", version=version("autoawq"), how=how)


def dequantised_gemm(folder: Path, group_size: int) -> dict[str, Dequantised]:
    stored = tensors(folder)
    layers = {}
    for module in modules_with(stored, "qweight"):
        words, zeros, scales = (stored[f"{module}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
        layers[module] = Dequantised(
            dequantize_gemm(words, zeros, scales, 4, group_size).T,
            dequantize_gemm(words, zeros, scales.float(), 4, group_size).T,
        )
    return layers


def dequantised_gemv(folder: Path, group_size: int) -> dict[str, Dequantised]:
    stored = tensors(folder)
    layers = {}
    for module in modules_with(stored, "qweight"):
        codes = unpack(stored[f"{module}.qweight"])
        groups = codes.shape[1] // group_size
        zeros = unpack(stored[f"{module}.qzeros"])[:, :groups]
        scales = stored[f"{module}.scales"][:, :groups]
        layers[module] = Dequantised(dequantize(codes.T, scales.T, zeros.T, group_size).T)
    return layers


if __name__ == "__main__":
    main()
