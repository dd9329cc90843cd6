"""The options of an adapter_config.json: those that plain LoRA arithmetic covers are read, all others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseport.errors import BadInput, Unsupported

# Keys that are read here, or that have no part in the arithmetic of a finished adapter.
_HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "quantization_aware",
        "r",
        "revision",
        "runtime_config",
        "sparse_adapter",
        "target_modules",
        "task_type",
        "eva_config",
    )
)
# These initialisations leave the base weights as they are; others (PiSSA, OLoRA, LoftQ, ...) change them.
_PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")
_MAX_RANK = 1 << 20


def check_options(config: Mapping[str, Any], where: str) -> None:
    """Refuse any option that plain LoRA arithmetic does not cover.

    Raises:
        Unsupported: names the option.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(
            "peft_type is not LORA", where=where, expected="LORA", found=repr(kind)[:40], code="E_ADAPTER_OPTION"
        )
    plain: dict[str, tuple[object, ...]] = {"bias": ("none", None), "init_lora_weights": _PLAIN_INIT}
    for key, value in config.items():
        if key in _HARMLESS:
            continue
        if value not in plain.get(key, (None, False, "", [], {})):
            raise Unsupported(
                f"adapter option {key} changes the arithmetic, or is not known",
                where=where,
                code="E_ADAPTER_OPTION",
                expected="it unset",
                found=repr(value)[:80],
                fix="train the adapter without it, or merge it with the tool that made it",
            )


def read_rank(config: Mapping[str, Any], where: str) -> int:
    """`r`, the rank of the super-adapter."""
    value = config.get("r")
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise BadInput(
            "r is no positive whole number of sensible size", where=where, found=repr(value)[:40], code="E_ADAPTER"
        )
    return value


def read_alpha(config: Mapping[str, Any], where: str) -> float:
    """`lora_alpha`, a positive number."""
    value = config.get("lora_alpha")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise BadInput("lora_alpha is no positive number", where=where, found=repr(value)[:40], code="E_ADAPTER")
    return float(value)


def read_flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    """A true or false option; absent means false."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise BadInput(f"{key} is not true or false", where=where, found=repr(value)[:40], code="E_ADAPTER")
    return value


def read_targets(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """`target_modules`, sorted; one entry when it is a pattern."""
    value = config.get("target_modules")
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries or not all(isinstance(v, str) and v for v in entries):
        raise BadInput("target_modules names no modules", where=where, found=repr(value)[:80], code="E_ADAPTER")
    return tuple(sorted(entries))
