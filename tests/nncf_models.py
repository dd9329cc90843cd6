"""Models compressed and tuned (at random) by NNCF itself, and what NNCF strips them to."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparseport.offline import go_offline

BF16 = np.dtype(ml_dtypes.bfloat16)


@contextmanager
def nncf_with_strip() -> Iterator[Any]:
    """NNCF with strip, without compilers: the C++ extension for quantisers without adapter is written in torch below,
    and the others run as Python instead of through torch.compile. Both were compared with the compiled ones."""
    go_offline()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert transformers.LlamaForCausalLM  # imported before torchao is pretended to be there
    nncf = pytest.importorskip("nncf")
    _import_strip()
    functions = importlib.import_module("nncf.torch.quantization.quantize_functions")
    reference = importlib.import_module("nncf.torch.quantization.reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "QuantizedFunctionsCPU", {"Quantize_forward": cpp_forward})
        patch.setattr(reference.torch_forward, "_compiled_func", reference.torch_executor.forward)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield nncf


def _import_strip() -> None:
    """strip.py imports torchao for a format that is not used here."""
    try:
        importlib.import_module("torchao")
        absent = []
    except ModuleNotFoundError:
        absent = ["torchao", "torchao.quantization", "torchao.quantization.pt2e", "torchao.quantization.pt2e.observer"]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    if absent:
        observer: Any = sys.modules[absent[-1]]
        observer.MinMaxObserver = observer.PerChannelMinMaxObserver = None
    importlib.import_module("nncf.torch.function_hook.strip")
    for name in absent:
        del sys.modules[name]


def cpp_forward(values: Any, low: Any, width: Any, levels: int) -> Any:
    """What NNCF's C++ extension does, with the same operations of torch: a true division, and every dtype its own."""
    import torch

    per_unit = torch.full_like(width, levels - 1).div_(width)
    output = torch.max(torch.min(values, low + width), low)
    zero = (-low * per_unit).round_()
    return output.sub_(low).mul_(per_unit).sub_(zero).round_().div_(per_unit)


def tuned(nncf: Any, base: Path, out: Path, *, mode: str, compression: str, dtype: str) -> Any:
    """Compress the model of a folder with adapters of rank 8, move every parameter, and save nncf_checkpoint.pth.

    Returns:
        The NNCF model.
    """
    import torch
    import transformers
    from nncf.torch.function_hook.wrapper import get_hook_storage

    ids = torch.arange(4)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode[mode],
        group_size=32,
        compression_format=nncf.CompressionFormat[compression],
        dataset=nncf.Dataset([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]),
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=8),
    )
    storage = get_hook_storage(model)
    with torch.no_grad():
        for _, hook in storage.named_hooks():
            _tune(hook)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"nncf_state_dict": storage.state_dict(), "nncf_config": nncf.torch.get_config(model)},
        out / "nncf_checkpoint.pth",
    )
    return model


def set_ranks(model: Any, rank: int) -> None:
    """Choose the active rank of every elastic adapter, as NNCF's example does."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    for _, hook in get_hook_storage(model).named_hooks():
        if hasattr(hook, "set_active_rank"):
            hook.set_active_rank(rank)


def stripped_layers(nncf: Any, model: Any) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Module -> levels [out, in], zero-points and scales [out, groups] of nncf.strip, with NNCF's sign convention."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    flat = nncf.strip(model, strip_format=nncf.StripFormat.DQ)
    found = {}
    for name, decompressor in get_hook_storage(flat).named_hooks():
        module = name.split(".")[1].removesuffix(":weight__0").replace(":", ".")
        zero_points, scales = grid_of(decompressor)
        levels = _levels_of(flat.get_submodule(module).weight, decompressor)
        found[module] = (levels.reshape(scales.shape[0], -1), zero_points, scales)
    return found


def grid_of(decompressor: Any) -> tuple[np.ndarray, np.ndarray]:
    """[out, groups] zero-points (0 if symmetric) and scales of a decompressor."""
    from nncf.torch.quantization.layers import unpack_uint4

    scales = numpy_of(decompressor._scale)
    scales = scales.reshape(scales.shape[0], -1)
    if not hasattr(decompressor, "_zero_point"):
        return np.zeros(scales.shape, np.int64), scales
    points = decompressor._zero_point
    packed = hasattr(decompressor, "zero_point_shape")
    return (unpack_uint4(points) if packed else points).numpy().reshape(scales.shape), scales


def numpy_of(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    array: np.ndarray = (
        tensor.view(torch.int16).numpy().view(BF16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )
    return array


def assert_same(weight: Any, levels: np.ndarray, zero_points: np.ndarray, scales: np.ndarray, symmetric: bool) -> None:
    """Our codes, zero-points and scales are NNCF's; symmetric levels are signed in NNCF, with zero in the middle."""
    assert weight.scales.dtype == scales.dtype == np.float16
    assert weight.scales.tobytes() == np.ascontiguousarray(scales).tobytes()
    middle = 2 ** (weight.bits - 1) if symmetric else 0
    assert np.array_equal(weight.zero_points, zero_points.astype(int) + middle)
    assert np.array_equal(weight.codes, levels.astype(int) + middle)


def _tune(hook: Any) -> None:
    """Move a quantiser's parameters as training would; the adapter's sums are exact in float32, so that their order,
    which is the machine's choice, changes nothing."""
    import torch

    for name, value in hook.get_trainable_params().items():
        if name.startswith("lora"):
            value.copy_(torch.randint(-8, 9, value.shape) / 64)
        else:
            value.mul_(1 + 0.1 * torch.randn_like(value))


def _levels_of(weight: Any, decompressor: Any) -> np.ndarray:
    from nncf.torch.quantization.layers import unpack_int4, unpack_uint4

    levels: np.ndarray
    if not hasattr(decompressor, "compressed_weight_shape"):
        levels = weight.detach().numpy()
    else:
        unpack = unpack_uint4 if hasattr(decompressor, "_zero_point") else unpack_int4
        levels = unpack(weight.detach()).numpy()
    return levels
