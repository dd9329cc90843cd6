"""GPTQModel: quantised on random tokens by its own loop, read back by its own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from samples import Dequantised, calibration, finish, paths

HOW = (
    "GPTQModel.load(backend=GPTQ_TORCH), then TorchLinear.dequantize_weight(): scale * (code - zero) in the scales' "
    "float16, and once more with the scales cast to float32"
)
SAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptqmodel-v1-asym-g32-actorder": ("two-layers", {"sym": False, "group_size": 32, "desc_act": True}),
    "gptqmodel-v1-asym-channel": ("one-layer", {"sym": False, "group_size": -1, "desc_act": False}),
    "gptqmodel-v2-sym-g32": ("one-layer", {"sym": True, "group_size": 32, "desc_act": False, "format": "gptq_v2"}),
    "gptqmodel-v2-asym-g32": ("one-layer", {"sym": False, "group_size": 32, "desc_act": False, "format": "gptq_v2"}),
}


def main() -> None:
    where = paths()
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration()]
    for name, (source, options) in SAMPLES.items():
        folder = where.fresh(name)
        # Without group-aware reordering: it asks for a group size, and stores nothing that other files do not.
        config = QuantizeConfig(bits=4, device="cpu", offload_to_disk=False, act_group_aware=False, **options)
        model = GPTQModel.load(str(where.sources / source), config, dtype=torch.float16)
        model.quantize(data, batch_size=1)
        model.save(str(folder))
        finish(where, name, dequantised(folder), tool="gptqmodel", version=gptqmodel.__version__, how=HOW)


def dequantised(folder: Path) -> dict[str, Dequantised]:
    model = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            own = module.dequantize_weight().T
            module.scales = module.scales.float()
            layers[name] = Dequantised(own, module.dequantize_weight().T)
    return layers


if __name__ == "__main__":
    main()
