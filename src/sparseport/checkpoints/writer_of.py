"""Which tool wrote a quantised folder, as far as its quantization_config tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def scales_may_be_negative(raw: Mapping[str, Any]) -> bool:
    """Whether the writer is AutoRound: its symmetric schemes give a group the sign of its largest weight."""
    return raw.get("provider") == "auto-round" or bool(raw.get("autoround_version"))
