"""Folders in every dialect, written naively: one value at a time, sharing no packing code with the package.

What the real tools write is imitated: names, dtypes, bit order, and the quantization_config. The safetensors file comes
from the `safetensors` package. The readers under test must give back what went in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sparseport.checkpoints.folder import ModelFolder
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.rounding import choose_qparams_minmax, quantize_to_grid

Weight = QuantizedWeight | DenseWeight
Tensors = dict[str, np.ndarray]

GPTQ = ("gptq-v1", "gptq-v2", "gptq-act-order", "gptq-channel")
AUTO_ROUND_GPTQ = ("auto-round-gptq", "auto-round")
AWQ = ("auto-round-awq", "awq-gemm", "awq-gemv")
PACK_QUANTIZED = ("ct-pack-asym", "ct-pack-sym", "ct-pack-channel", "ct-pack-group-order", "ct-pack-int8-zeros")
BITMASK = ("sparse-bitmask", "sparse-24-bitmask")
QUANTIZED = (*GPTQ, *AUTO_ROUND_GPTQ, *AWQ, *PACK_QUANTIZED)
DIALECTS = (*QUANTIZED, *BITMASK, "dense")

ACT_ORDER = ("gptq-act-order", "ct-pack-group-order")
ONE_GROUP = ("gptq-channel", "ct-pack-channel")
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_AWQ_ELEMENTS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a gemm word, counted from the low end, holds this element


# --- folders ---------------------------------------------------------------------------------------------------------


def write_folder(
    path: Path, dialect: str, weights: Mapping[str, Weight], others: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> Path:
    """A model folder whose linear layers are stored in a dialect.

    weights  module -> weight; a DenseWeight without a mask is stored as plain `.weight` beside packed layers
    others   every other tensor by its name
    config   config.json; the quantization_config is added, unless the key is there already (None leaves it out)
    """
    tensors = dict(others)
    for module, weight in weights.items():
        tensors.update(layer_tensors(dialect, module, weight))
    config = dict(config)
    settings = config.pop("quantization_config", quantization_config(dialect, weights))
    if settings is not None:
        config["quantization_config"] = settings
    return save(path, config, tensors)


def save(path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """config.json and model.safetensors as given."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    return path


def quantised_llama(
    base_folder: Path, out: Path, dialect: str, *, group_size: int = 32, seed: int = 0
) -> dict[str, Weight]:
    """The model of `base_folder` with all its decoder layers in a dialect, written to `out`.

    Quantised by each group's minimum and maximum; bitmask dialects are pruned by magnitude, and a few kept weights set
    to zero. Embedding, norms and head stay as they are, and so does every other file of the folder (tokenizer).

    seed  of the random column order of act-order dialects

    Returns:
        module -> weight, as a reader has to give it back.
    """
    random = np.random.default_rng(seed)
    weights: dict[str, Weight] = {}
    with ModelFolder.open(base_folder) as base:
        modules = [module for module in base.linear_names() if module != base.head_name]
        for module in modules:
            weights[module] = stored_as(base.read(f"{module}.weight"), dialect, group_size, random)
        linear = {f"{module}.weight" for module in modules}
        others = {name: np.array(base.read(name)) for name in base.names() if name not in linear}
        config = dict(base.config)
    write_folder(out, dialect, weights, others, config)
    for file in base_folder.iterdir():
        if file.name != "config.json" and not file.name.startswith("model.safetensors"):
            shutil.copyfile(file, out / file.name)
    return weights


def stored_as(values: np.ndarray, dialect: str, group_size: int, random: np.random.Generator) -> Weight:
    if dialect == "dense":
        return DenseWeight(np.array(values))
    if dialect in BITMASK:
        mask = _two_of_four(values) if dialect == "sparse-24-bitmask" else _larger_half(values)
        kept = np.where(mask, values, 0).astype(values.dtype)
        for row, column in np.argwhere(mask)[:: max(1, mask.size // 8)]:
            kept[row, column] = 0
        return DenseWeight(kept, mask)
    real = values.astype(np.float32)
    group_size = real.shape[1] if dialect in ONE_GROUP else group_size
    order = random_order(real.shape[1], group_size, random) if dialect in ACT_ORDER else None
    real = real if order is None else real[:, order]
    wide = dialect in ("ct-pack-asym", "ct-pack-group-order")
    scale_dtype = np.float32 if wide else np.float16
    scales, zero_points = choose_qparams_minmax(real, group_size, dialect == "ct-pack-sym", scale_dtype)
    codes = quantize_to_grid(real, scales, zero_points, group_size)
    return QuantizedWeight(codes, scales, zero_points, group_size, input_order=order)


def _larger_half(values: np.ndarray) -> np.ndarray:
    mask = np.ones(values.shape, bool)
    for row, keep in zip(values.astype(np.float32), mask, strict=True):
        for column in sorted(range(row.size), key=lambda c: abs(float(row[c])))[: row.size // 2]:
            keep[column] = False
    return mask


def _two_of_four(values: np.ndarray) -> np.ndarray:
    blocks = values.astype(np.float32).reshape(-1, 4)
    return _larger_half(blocks).reshape(values.shape)


def random_order(columns: int, group_size: int, random: np.random.Generator) -> np.ndarray:
    """A permutation as `QuantizedWeight.input_order` has it: random groups, columns ascending within each."""
    shuffled = [int(column) for column in random.permutation(columns)]
    groups = [sorted(shuffled[start : start + group_size]) for start in range(0, columns, group_size)]
    return np.array([column for group in groups for column in group], np.int32)


# --- layers ----------------------------------------------------------------------------------------------------------


def layer_tensors(dialect: str, module: str, weight: Weight) -> Tensors:
    """The tensors of one layer, as the dialect's tool stores them."""
    if isinstance(weight, DenseWeight):
        if dialect in BITMASK and weight.mask is not None:
            parts = _bitmask(weight.values, weight.mask, two_of_four=dialect == "sparse-24-bitmask")
        else:
            parts = {"weight": weight.values}
    elif dialect in GPTQ or dialect in AUTO_ROUND_GPTQ:
        one_less = {"gptq-v2": "no", "auto-round": "no", "auto-round-gptq": "nibbles"}.get(dialect, "words")
        parts = _gptq(weight, one_less)
        if dialect in AUTO_ROUND_GPTQ:
            del parts["g_idx"]
    elif dialect == "awq-gemv":
        parts = _awq_gemv(weight)
    elif dialect in AWQ:
        parts = _awq_gemm(weight)
    elif dialect in PACK_QUANTIZED:
        parts = _pack_quantized(weight, dialect)
    else:
        raise ValueError(f"{dialect} does not store quantised layers")
    return {f"{module}.{leaf}": array for leaf, array in parts.items()}


def _gptq(weight: QuantizedWeight, one_less: str) -> Tensors:
    """`one_less`: how 1 is taken off zero-points: not at all, in each nibble, or off whole words as GPTQModel does."""
    codes, groups = _in_model_order(weight)
    zeros = [[(int(z) - 1) % 16 if one_less == "nibbles" else int(z) for z in row] for row in weight.zero_points]
    words = _pack_rows(_transposed(zeros))
    if one_less == "words":
        for place, word in np.ndenumerate(words):
            less = (int(word) % 2**32 - 0x11111111) % 2**32
            words[place] = less - 2**32 if less >= 2**31 else less
    return {
        "qweight": _transposed(_pack_rows(codes)),
        "qzeros": words,
        "scales": _transposed(weight.scales),
        "g_idx": np.array(groups, np.int32),
    }


def _awq_gemm(weight: QuantizedWeight) -> Tensors:
    return {
        "qweight": _pack_rows(_transposed(weight.codes), _AWQ_ELEMENTS),
        "qzeros": _pack_rows(_transposed(weight.zero_points), _AWQ_ELEMENTS),
        "scales": _transposed(weight.scales),
    }


def _awq_gemv(weight: QuantizedWeight) -> Tensors:
    out, groups = weight.scales.shape
    # The kernel reads scales 128 columns' worth at a time, so rows are filled up to that.
    step = {64: 2, 32: 4}.get(weight.group_size, 1)
    words = (groups + 7) // 8
    while words % step:
        words += 1
    scales = np.zeros((out, 8 * words), weight.scales.dtype)
    zeros = [[0] * 8 * words for _ in range(out)]
    for row in range(out):
        for group in range(groups):
            scales[row, group] = weight.scales[row, group]
            zeros[row][group] = int(weight.zero_points[row, group])
    return {"qweight": _pack_rows(weight.codes), "qzeros": _pack_rows(zeros), "scales": scales}


def _pack_quantized(weight: QuantizedWeight, dialect: str) -> Tensors:
    codes, groups = _in_model_order(weight)
    parts = {
        "weight_packed": _pack_rows([[_signed(code) + 8 for code in row] for row in codes]),
        "weight_scale": weight.scales,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    if dialect == "ct-pack-int8-zeros":
        parts["weight_zero_point"] = np.array([[_signed(z) for z in row] for row in weight.zero_points], np.int8)
    elif dialect != "ct-pack-sym":
        # Packed along the rows of the weight: column by column of the zero-points.
        parts["weight_zero_point"] = _transposed(_pack_rows(_transposed(weight.zero_points)))
    if dialect == "ct-pack-group-order":
        parts["weight_g_idx"] = np.array(groups, np.int32)
    return parts


def _bitmask(values: np.ndarray, mask: np.ndarray, *, two_of_four: bool) -> Tensors:
    rows, columns = values.shape
    kept: list[Any] = []
    offsets: list[int] = []
    masks = np.zeros((rows, (columns + 7) // 8), np.uint8)
    for row in range(rows):
        offsets.append(len(kept))
        for column in range(columns):
            if mask[row, column]:
                kept.append(values[row, column])
                masks[row, column // 8] += 2 ** (column % 8)
    compressed = np.array(kept, values.dtype)
    if two_of_four:
        shape = np.array([[rows], [columns]], np.int64)
        return {"shape": shape, "compressed": compressed.reshape(rows, columns // 2), "bitmask": masks}
    shape = np.array([rows, columns], np.int64)
    return {"shape": shape, "compressed": compressed, "bitmask": masks, "row_offsets": np.array(offsets, np.int64)}


def _in_model_order(weight: QuantizedWeight) -> tuple[list[list[int]], list[int]]:
    """Codes with their columns where the model has them, and the group of each of those columns."""
    rows, columns = weight.shape
    order = range(columns) if weight.input_order is None else weight.input_order
    codes = [[0] * columns for _ in range(rows)]
    groups = [0] * columns
    for stored, column in enumerate(order):
        groups[column] = stored // weight.group_size
        for row in range(rows):
            codes[row][column] = int(weight.codes[row, stored])
    return codes, groups


def _pack_rows(rows: Any, elements: tuple[int, ...] = _IN_ORDER) -> np.ndarray:
    """Eight values of a row to an int32, the last word filled with zeros; nibble i holds value `elements[i]`."""
    packed = []
    for row in rows:
        words = []
        for start in range(0, len(row), 8):
            word = 0
            for nibble, element in enumerate(elements):
                if start + element < len(row):
                    word += int(row[start + element]) * 16**nibble
            words.append(word - 2**32 if word >= 2**31 else word)
        packed.append(words)
    return np.array(packed, np.int32)


def _transposed(rows: Any) -> np.ndarray:
    return np.array([[row[column] for row in rows] for column in range(len(rows[0]))], getattr(rows, "dtype", None))


def _signed(code: int) -> int:
    """Code 0..15 as the number -8..7 that compressed-tensors quantises to."""
    return int(code) - 8


# --- settings --------------------------------------------------------------------------------------------------------


def quantization_config(dialect: str, weights: Mapping[str, Weight]) -> dict[str, Any] | None:
    """config.json's quantization_config as the dialect's tool writes it; None for a dense model."""
    quantised = [weight for weight in weights.values() if isinstance(weight, QuantizedWeight)]
    group_size = -1 if dialect in ONE_GROUP else quantised[0].group_size if quantised else 0
    sym = all(bool((weight.zero_points == 8).all()) for weight in quantised)
    if dialect in GPTQ:
        return {
            "bits": 4,
            "checkpoint_format": "gptq_v2" if dialect == "gptq-v2" else "gptq",
            "desc_act": dialect == "gptq-act-order",
            "group_size": group_size,
            "lm_head": False,
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "true_sequential": True},
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": sym,
        }
    if dialect in ("auto-round-gptq", "auto-round", "auto-round-awq"):
        packing = {"auto-round-gptq": ":auto_gptq", "auto-round-awq": ":auto_awq"}.get(dialect, "")
        return {
            "autoround_version": "0.16.1",
            "bits": 4,
            "block_name_to_quantize": "model.layers",
            "data_type": "int",
            "group_size": group_size,
            "iters": 8,
            "packing_format": f"auto_round{packing}",
            "quant_method": "auto-round",
            "sym": sym,
        }
    if dialect in AWQ:
        return {
            "bits": 4,
            "group_size": group_size,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": dialect.removeprefix("awq-"),
            "zero_point": True,
        }
    if dialect in PACK_QUANTIZED:
        return _pack_quantized_config(dialect, group_size)
    if dialect in BITMASK:
        return {
            "quant_method": "compressed-tensors",
            "sparsity_config": {
                "format": dialect,
                "global_sparsity": 0.5,
                "ignore": ["lm_head"],
                "registry_requires_subclass": False,
                "sparsity_structure": "2:4" if dialect == "sparse-24-bitmask" else "unstructured",
                "targets": ["Linear"],
            },
            "transform_config": {},
            "version": "0.12.2",
        }
    return None


def _pack_quantized_config(dialect: str, group_size: int) -> dict[str, Any]:
    channel = dialect == "ct-pack-channel"
    weights: dict[str, Any] = {
        "actorder": {"ct-pack-group-order": "group", "ct-pack-asym": "static"}.get(dialect),
        "block_structure": None,
        "dynamic": False,
        "group_size": None if channel else group_size,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel" if channel else "group",
        "symmetric": dialect == "ct-pack-sym",
        "type": "int",
    }
    group = {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.7.0" if dialect == "ct-pack-int8-zeros" else "0.19.0",
    }
