"""Write what training makes, in the reference code's own file formats: sparse base, GPTQ base.

The exporter reads these files like anyone else's; nothing else passes between training and export.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import gptq_config_dict, gptq_tensors
from sparseport.checkpoints.json_files import write_json
from sparseport.checkpoints.safetensors import TensorSpec, spec_of, write_safetensors
from sparseport.errors import BadInput
from sparseport.weights.linear import Array, Mask, QuantizedWeight
from sparseport.weights.mask import mask_of
from sparseport.weights.packing import ZeroPointStorage

_WEIGHT_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def write_sparse_base(base: ModelFolder, masks: Mapping[str, Mask], out_dir: Path) -> None:
    """Write the base with every masked weight set to exactly 0, in the base's dtype (a Wanda checkpoint).

    Args:
        base: the dense model.
        masks: bool [out, in] by module name; every one must be a linear layer of the base.
        out_dir: folder to write.

    Raises:
        BadInput: a mask does not belong to this base.
    """
    for module, mask in masks.items():
        if not base.has(f"{module}.weight") or base.info(f"{module}.weight").shape != mask.shape:
            raise BadInput("a mask does not fit the base", where=f"{base.path}, {module}", found=mask.shape)
    _start_folder(base, out_dir)
    specs = []
    for name in _own_tensors(base):
        info = base.info(name)
        produce = _producer(base, name, masks.get(name.removesuffix(".weight")))
        specs.append(TensorSpec(name, info.dtype, info.shape, produce))
    write_safetensors(out_dir / "model.safetensors", specs)
    write_json(out_dir / "config.json", base.config)


def write_gptq_base(
    base: ModelFolder,
    weights: Iterable[tuple[str, QuantizedWeight]],
    out_dir: Path,
    *,
    group_size: int,
    symmetric: bool,
    storage: ZeroPointStorage = ZeroPointStorage.V1,
) -> None:
    """Write a GPTQ checkpoint: quantised linear layers, everything else as in the base.

    Args:
        base: the sparse floating-point model.
        weights: module name and quantised weight.
        out_dir: folder to write.
        group_size: columns per group, for the config.
        symmetric: whether all zero-points are 8, for the config.
        storage: v1 is what AutoGPTQ writes.
    """
    _start_folder(base, out_dir)
    packed: dict[str, Array] = {}
    done = set()
    for module, weight in weights:
        packed |= gptq_tensors(module, weight, storage)
        done.add(f"{module}.weight")
    rest = [
        TensorSpec(name, base.info(name).dtype, base.info(name).shape, _producer(base, name, None))
        for name in _own_tensors(base)
        if name not in done
    ]
    write_safetensors(out_dir / "model.safetensors", [*rest, *(spec_of(name, value) for name, value in packed.items())])
    settings = gptq_config_dict(group_size=group_size, sym=symmetric, storage=storage)
    write_json(out_dir / "config.json", {**base.config, "quantization_config": settings})


def dense_sparsity(folder: Path) -> float:
    """Share of zeros among the linear layers' weights (without the head) of a floating-point checkpoint."""
    zeros = total = 0
    with ModelFolder.open(folder) as model:
        for module in model.linear_names():
            if module != model.head_name:
                mask = mask_of(model.read(f"{module}.weight"))
                zeros += int(np.count_nonzero(~mask))
                total += mask.size
    return zeros / total


def _own_tensors(base: ModelFolder) -> list[str]:
    """Tensor names without a second copy of a tied head."""
    head = f"{base.head_name}.weight"
    return [name for name in base.names() if not (base.tied_head and name == head)]


def _producer(base: ModelFolder, name: str, mask: Mask | None) -> Callable[[], Array]:
    def produce() -> Array:
        values = base.read(name)
        return values if mask is None else np.where(mask, values, np.zeros((), values.dtype))

    return produce


def _start_folder(base: ModelFolder, out_dir: Path) -> None:
    """Make the folder and copy generation config and tokenizer files."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in base.input_files():
        if path.name not in _WEIGHT_FILES and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, out_dir / path.name)
