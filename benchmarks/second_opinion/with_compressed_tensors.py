"""llm-compressor with today's compressed-tensors: pack-quantized folders, decompressed by compressed-tensors."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from samples import Dequantised, Paths, calibration, finish, modules_with, paths, tensors, write_expected
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HOW = (
    "compressed_tensors PackedQuantizationCompressor.decompress: (code - zero) * scale in the scales' own dtype, and "
    "once more with the scales cast to float32"
)


def weights(**options: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=4, type="int", **options)


def groups(*schemes: tuple[list[str], QuantizationArgs]) -> dict[str, QuantizationScheme]:
    return {
        f"group_{i}": QuantizationScheme(targets=targets, weights=each) for i, (targets, each) in enumerate(schemes)
    }


GROUP_32 = weights(strategy="group", group_size=32, symmetric=False)
MIXED = (
    (["re:.*self_attn.*"], GROUP_32),
    (["model.layers.0.mlp.gate_proj"], weights(strategy="group", group_size=64, symmetric=True)),
    (["re:.*down_proj$"], weights(strategy="channel", symmetric=False)),
)
# name -> (source, modifier, config groups, layers left alone)
SAMPLES: dict[str, tuple[str, Any, Any, list[str]]] = {
    "compressed-tensors-pack-asym-g32": (
        "two-layers",
        QuantizationModifier,
        groups((["Linear"], GROUP_32)),
        ["lm_head"],
    ),
    "compressed-tensors-pack-sym-g32": (
        "one-layer",
        QuantizationModifier,
        groups((["Linear"], weights(strategy="group", group_size=32, symmetric=True))),
        ["re:.*lm_head"],
    ),
    "compressed-tensors-pack-sym-channel": (
        "one-layer",
        QuantizationModifier,
        groups((["Linear"], weights(strategy="channel", symmetric=True))),
        ["lm_head"],
    ),
    "compressed-tensors-pack-asym-g32-actorder-weight": (
        "one-layer",
        GPTQModifier,
        groups((["Linear"], weights(strategy="group", group_size=32, symmetric=False, actorder="weight"))),
        ["lm_head"],
    ),
    "compressed-tensors-pack-mixed": ("one-layer", QuantizationModifier, groups(*MIXED), ["lm_head"]),
    # 60 rows and columns fill no whole words, and 12 columns straddle them.
    "compressed-tensors-pack-asym-g12-odd": (
        "odd",
        QuantizationModifier,
        groups((["Linear"], weights(strategy="group", group_size=12, symmetric=False))),
        ["lm_head"],
    ),
    "compressed-tensors-pack-asym-channel-odd": (
        "odd",
        QuantizationModifier,
        groups((["Linear"], weights(strategy="channel", symmetric=False))),
        ["lm_head"],
    ),
}


def main() -> None:
    where = paths()
    release = f"llmcompressor {version('llmcompressor')}, compressed-tensors {version('compressed-tensors')}"
    for name, (source, modifier, config_groups, ignore) in SAMPLES.items():
        folder = where.fresh(name)
        model = AutoModelForCausalLM.from_pretrained(where.sources / source, dtype=torch.float16)
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(where.sources / source),
            recipe=[modifier(config_groups=config_groups, ignore=ignore)],
            **(with_calibration() if modifier is GPTQModifier else {}),
        )
        model.save_pretrained(folder, save_compressed=True)
        finish(where, name, dequantised(folder), tool="llm-compressor", version=release, how=HOW)
    if where.shared is not None:
        shared_sample(where, where.shared, "compressed-tensors-pack-asym-g64")


def with_calibration() -> dict[str, Any]:
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration()]
    return {"dataset": Dataset.from_list(rows), "max_seq_length": 64, "num_calibration_samples": len(rows)}


def shared_sample(where: Paths, shared: Path, name: str) -> None:
    """Hashes only, for a checkpoint that is not in the repository."""
    folder = shared / "checkpoints" / name
    write_expected(
        where.samples / f"shared-{name}.json",
        where.values / f"shared-{name}",
        tensors(folder),
        dequantised(folder),
        tool="compressed-tensors",
        version=version("compressed-tensors"),
        how=HOW,
    )


def dequantised(folder: Path) -> dict[str, Dequantised]:
    stored = tensors(folder)
    schemes = schemes_of(folder)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    layers = {}
    for module in modules_with(stored, "weight_packed"):
        prefix = f"{module}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        in_float32 = {**parts, "weight_scale": parts["weight_scale"].float()}
        layers[module] = Dequantised(
            compressor.decompress(parts, schemes[module])["weight"],
            compressor.decompress(in_float32, schemes[module])["weight"],
        )
    return layers


def schemes_of(folder: Path) -> dict[str, QuantizationScheme]:
    """The scheme of each module, by compressed-tensors' own matching on an empty model of the folder's config."""
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    with torch.device("meta"):
        plain = AutoConfig.from_pretrained(folder)
        del plain.quantization_config
        model = AutoModelForCausalLM.from_config(plain)
    return {
        name: scheme
        for scheme in config.config_groups.values()
        for name, _ in match_named_modules(model, scheme.targets, config.ignore)
    }


if __name__ == "__main__":
    main()
