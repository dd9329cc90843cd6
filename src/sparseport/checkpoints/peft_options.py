"""The options of an adapter_config.json: those that plain LoRA arithmetic covers are read, all others are refused.

delta W = scaling * (B @ A), with scaling = alpha / r, or alpha / sqrt(r) with use_rslora (rank-stabilised LoRA,
Kalajdzievski 2023). rank_pattern and alpha_pattern give modules an r and an alpha of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from sparseport.errors import BadInput, Unsupported

# Keys that are read here, or that have no part in the arithmetic of a finished adapter.
_HARMLESS = frozenset(
    (
        "alpha_pattern",
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
        "rank_pattern",
        "revision",
        "runtime_config",
        "sparse_adapter",
        "target_modules",
        "task_type",
        "use_rslora",
        "eva_config",
    )
)
# These initialisations leave the base weights as they are; others (PiSSA, OLoRA, LoftQ, ...) change them.
_PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")
_MAX_RANK = 1 << 20
# What a loader takes for "not set".
_UNSET: tuple[object, ...] = (None, False, "", [], {})

# One step of a pattern: a character or a set of characters, perhaps repeated, or a mark. Repeated groups, counted
# repeats, references and look-around are no steps.
_STEP = re.compile(
    r"(?P<item>[A-Za-z0-9_-]|\\[.dw_-]|\.|\[[A-Za-z0-9_]+(?:-[A-Za-z0-9_]+)*\])(?P<repeat>[*+?]?)"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<either>\|)|(?P<start>\^)|(?P<end>\$)"
)
_MAX_PATTERN = 1000
# Character comparisons for all patterns on all modules, and those that compiling a pattern is worth: some seconds.
_MAX_WORK, _COMPILE_WORK = 1 << 30, 1 << 14
_Value = TypeVar("_Value", int, float)


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
        if value not in plain.get(key, _UNSET):
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
    return _rank(config.get("r"), "r", where)


def read_alpha(config: Mapping[str, Any], where: str) -> float:
    """`lora_alpha`, a positive number."""
    return _alpha(config.get("lora_alpha"), "lora_alpha", where)


def read_rslora(config: Mapping[str, Any], where: str) -> bool:
    """`use_rslora`: whether the scaling is alpha / sqrt(r)."""
    return False if config.get("use_rslora") in _UNSET else read_flag(config, "use_rslora", where)


def lora_scaling(alpha: float, r: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r), in the float64 arithmetic of PEFT."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def ranks_by_module(config: Mapping[str, Any], modules: Iterable[str], where: str) -> dict[str, int]:
    """Module -> r: the first key of `rank_pattern` that matches the module's name, else the config's r.

    Raises:
        BadInput: a rank is no positive whole number, or a key matches no module.
        Unsupported: a key is a regular expression outside the subset that is certain to finish.
    """
    return _by_module(config, "rank_pattern", list(modules), read_rank(config, where), _rank, where)


def alphas_by_module(config: Mapping[str, Any], modules: Iterable[str], where: str) -> dict[str, float]:
    """Module -> alpha: the first key of `alpha_pattern` that matches the module's name, else lora_alpha.

    Raises:
        BadInput, Unsupported: as `ranks_by_module`.
    """
    return _by_module(config, "alpha_pattern", list(modules), read_alpha(config, where), _alpha, where)


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


def _rank(value: object, label: str, where: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise BadInput(
            f"{label} is no positive whole number of sensible size",
            where=where,
            found=repr(value)[:40],
            code="E_ADAPTER",
        )
    return value


def _alpha(value: object, label: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise BadInput(f"{label} is no positive number", where=where, found=repr(value)[:40], code="E_ADAPTER")
    return float(value)


def _by_module(
    config: Mapping[str, Any],
    option: str,
    modules: list[str],
    default: _Value,
    read: Callable[[object, str, str], _Value],
    where: str,
) -> dict[str, _Value]:
    table = config.get(option)
    if table in _UNSET:
        return dict.fromkeys(modules, default)
    if not isinstance(table, dict):
        raise BadInput(
            f"{option} is no table", where=where, expected="name -> number", found=repr(table)[:80], code="E_ADAPTER"
        )
    result: dict[str, _Value] = {}
    room = _MAX_WORK
    for key, value in table.items():
        number = read(value, f"{option} of {key[:80]!r}", where)
        expression, cost = _expression(key, option, modules, where)
        room -= cost
        if room < 0:
            raise _refused(key, option, where, "patterns that are quick to match")
        matched = [module for module in modules if expression.match(module)]
        if not matched:
            raise BadInput(
                f"{option} has a key that matches no module of the adapter",
                where=where,
                expected=", ".join(modules[:3]) + ", ...",
                found=repr(key)[:120],
                fix="take the key out if it is a leftover; otherwise export the adapter again",
                code="E_ADAPTER",
            )
        for module in matched:
            result.setdefault(module, number)  # the first key that matches wins
    return {module: result.get(module, default) for module in modules}


def _expression(key: str, option: str, modules: list[str], where: str) -> tuple[re.Pattern[str], int]:
    """PEFT's expression for a key (0.21, `get_pattern_key`), and the most comparisons that it takes on all modules."""
    plain = "a module name, with ., \\d, [..], *, +, ? after one character, or (a|b)"
    place, depth, open_ended, branches = 0, 0, 0, 1
    alternatives = [1, 1]  # outside and inside of a group
    while place < len(key) <= _MAX_PATTERN:
        step = _STEP.match(key, place)
        if step is None:
            raise _refused(key, option, where, plain)
        depth += bool(step["open"]) - bool(step["close"])
        misplaced = (step["start"] and place) or (step["end"] and step.end() < len(key))
        if depth not in (0, 1) or misplaced:
            raise _refused(key, option, where, plain)
        open_ended += step["repeat"] in ("*", "+")
        branches *= 2 if step["repeat"] == "?" else 1
        alternatives[depth] += bool(step["either"])
        if step["close"]:
            branches, alternatives[1] = branches * alternatives[1], 1
        place = step.end()
    if not key or place < len(key):
        raise _refused(key, option, where, plain)
    try:
        expression = re.compile(rf"(.*\.)?({key})$")
    except re.error:
        raise _refused(key, option, where, plain) from None
    # From every dot on, every open-ended repeat can stop at every place, and every branch can be tried.
    steps = sum((1 + module.count(".")) * (1 + len(module)) ** open_ended for module in modules)
    return expression, _COMPILE_WORK + len(key) * branches * alternatives[0] * steps


def _refused(key: str, option: str, where: str, expected: str) -> Unsupported:
    return Unsupported(
        f"{option} has a key that could take for ever to match, or is no valid expression",
        where=where,
        expected=expected,
        found=repr(key)[:120],
        fix="name the modules one by one",
        code="E_ADAPTER_OPTION",
    )
