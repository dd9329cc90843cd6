"""Which tool wrote a quantised folder, as far as its quantization_config tells, and what follows from that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Tools that wrap a zero-point of 0 to 15 by itself, in its own nibble.
_WRAP_NIBBLES = ("autogptq", "autoround", "sqft")
# Tools that write GPTQ words without a label, and always as V1.
_ALWAYS_V1 = ("autogptq", "autoround")


def writer_of(raw: Mapping[str, Any]) -> str:
    """Tool and version for people to read (`gptqmodel 7.7.0`); empty where the config says nothing.

    The text comes from the file and has no say in how it is read.
    """
    if release := raw.get("autoround_version"):
        return f"auto-round {release}"
    if raw.get("quant_method") == "compressed-tensors":
        return f"compressed-tensors {raw['version']}" if raw.get("version") else "compressed-tensors"
    quantizer = raw.get("quantizer")
    if quantizer is None and isinstance(raw.get("meta"), dict):
        quantizer = raw["meta"].get("quantizer")
    if isinstance(quantizer, list) and quantizer:
        quantizer = quantizer[0]
    if isinstance(quantizer, str):
        return quantizer.replace(":", " ")
    provider = raw.get("provider")
    return provider if isinstance(provider, str) else ""


def quantised_by_gptqmodel(raw: Mapping[str, Any]) -> bool:
    """Whether GPTQModel packed the words, by itself or for another tool (`["optimum:1.27", "gptqmodel:4.2"]`)."""
    return "gptqmodel" in _tools(raw)


def may_wrap_nibbles(raw: Mapping[str, Any]) -> bool:
    """Whether the writer is one that wraps zero-points in their own nibble, or does not say its name.

    AutoGPTQ's and SQFT's files, and those of this package, have no name in them.
    """
    tools = _tools(raw)
    return not tools or any(tool in _WRAP_NIBBLES for tool in tools)


def always_v1(raw: Mapping[str, Any]) -> bool:
    """Whether the writer's name says that GPTQ zero-points are stored as V1, as a label would."""
    return any(tool in _ALWAYS_V1 for tool in _tools(raw)) and not quantised_by_gptqmodel(raw)


def scales_may_be_negative(raw: Mapping[str, Any]) -> bool:
    """Whether the writer is AutoRound: its symmetric schemes give a group the sign of its largest weight."""
    return raw.get("provider") == "auto-round" or bool(raw.get("autoround_version"))


def _tools(raw: Mapping[str, Any]) -> set[str]:
    """Names of all tools that had a hand in the file, without versions, in lower-case letters and digits."""
    meta = raw.get("meta")
    named: list[object] = [raw.get("provider"), "auto-round" if raw.get("autoround_version") else None]
    for quantizer in (raw.get("quantizer"), meta.get("quantizer") if isinstance(meta, dict) else None):
        named += quantizer if isinstance(quantizer, list) else [quantizer]
    # One text may name several tools: "optimum:1.27, gptqmodel:4.2".
    entries = [entry for name in named if isinstance(name, str) for entry in re.split(r"[,;\s]+", name)]
    return {tool for entry in entries if (tool := re.sub(r"[^a-z0-9]", "", entry.partition(":")[0].casefold()))}
