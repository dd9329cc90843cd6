"""compressed-tensors 0.12, the last release with sparse bitmasks and with group indices in pack-quantized folders."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from samples import Dequantised, Paths, finish, modules_with, paths, tensors
from transformers import AutoModelForCausalLM

SPARSE = "compressed_tensors ModelCompressor.sparsity_compressor.decompress, in the dtype of the kept values"
GROUPED = (
    "compressed_tensors unpack_from_int32 and dequantize(g_idx=...): (code - zero) * scale in the scales' float16, and "
    "once more with the scales cast to float32"
)
GROUP_SIZE = 32


def main() -> None:
    where = paths()
    for name, source, config in (
        ("compressed-tensors-sparse-bitmask", "pruned", BitmaskConfig),
        ("compressed-tensors-sparse-24-bitmask", "pruned-24", Sparse24BitMaskConfig),
        ("compressed-tensors-sparse-bitmask-odd", "odd-pruned", BitmaskConfig),
    ):
        folder = where.fresh(name)
        model = AutoModelForCausalLM.from_pretrained(where.sources / source, dtype=torch.float16)
        compressor = ModelCompressor(
            sparsity_config=config(targets=["Linear"], ignore=["lm_head"], global_sparsity=sparsity(model))
        )
        save(compressor, model, folder)
        layers = {
            tensor.removesuffix(".weight"): Dequantised(values)
            for tensor, values in compressor.sparsity_compressor.decompress(str(folder))
            if tensor.endswith("_proj.weight")
        }
        finish(where, name, layers, tool="compressed-tensors", version=version("compressed-tensors"), how=SPARSE)
    group_indices(where)


def sparsity(model: Any) -> float:
    linear = [parameter for name, parameter in model.named_parameters() if "_proj." in name]
    return sum(int((each == 0).sum()) for each in linear) / sum(each.numel() for each in linear)


def save(compressor: ModelCompressor, model: Any, folder: Path) -> None:
    state = compressor.compress(model)
    model.save_pretrained(folder, state_dict=state)
    compressor.update_config(str(folder))


def group_indices(where: Paths) -> None:
    """actorder "group": columns of one group need not stand together."""
    name = "compressed-tensors-pack-asym-g32-actorder-group"
    folder = where.fresh(name)
    model = AutoModelForCausalLM.from_pretrained(where.sources / "one-layer", dtype=torch.float16)
    arguments = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=GROUP_SIZE, symmetric=False, actorder="group"
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)},
        ignore=["lm_head"],
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if hasattr(module, "weight_g_idx"):
            choose(module, arguments, generator)
    compressor = ModelCompressor(quantization_config=config)
    save(compressor, model, folder)
    stored = tensors(folder)
    layers = {module: dequantised(stored, module) for module in modules_with(stored, "weight_packed")}
    finish(where, name, layers, tool="compressed-tensors", version=version("compressed-tensors"), how=GROUPED)


def choose(module: Any, arguments: QuantizationArgs, generator: torch.Generator) -> None:
    """Random group indices, and scales and zero-points of the columns that share one."""
    columns = module.weight.shape[1]
    order = torch.randperm(columns, generator=generator)
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[order] = torch.arange(columns, dtype=torch.int32) // GROUP_SIZE
    module.weight_g_idx.data = g_idx
    grouped = module.weight.data[:, g_idx.argsort(stable=True)].reshape(module.weight.shape[0], -1, GROUP_SIZE)
    scales, zeros = calculate_qparams(grouped.amin(2), grouped.amax(2), arguments)
    module.weight_scale.data, module.weight_zero_point.data = scales.to(module.weight.dtype), zeros.to(torch.int8)


def dequantised(stored: dict[str, torch.Tensor], module: str) -> Dequantised:
    leaves = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    packed, scales, zeros, shape, g_idx = (stored[f"{module}.{leaf}"] for leaf in leaves)
    size = torch.Size(shape.tolist())
    codes = unpack_from_int32(packed, 4, size)
    zeros = unpack_from_int32(zeros, 4, torch.Size((size[0], scales.shape[1])), packed_dim=0)
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP_SIZE, symmetric=False, actorder="group")
    own, wide = (dequantize(codes, each, zeros, arguments, g_idx=g_idx) for each in (scales, scales.float()))
    return Dequantised(own, wide)


if __name__ == "__main__":
    main()
