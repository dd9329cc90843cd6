"""The hooks of an NNCF checkpoint: which weights have a quantiser, and whether config and tensors agree about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sparseport.checkpoints.safetensors import SafeTensorsFile
from sparseport.errors import BadInput, Unsupported

# Parts of the checkpoint.
STATE, CONFIG, MODEL = "nncf_state_dict", "nncf_config", "model_state"

_NAME = re.compile(r"post_hooks\.(?P<module>[^./]+):weight__0\.0")
_FLOATS = ("F16", "BF16", "F32")
_MODULE_PATHS = (None, "", "nncf.torch.quantization.layers")
# Class of a hook -> its `mode`.
_MODES = {
    "SymmetricQuantizer": "symmetric",
    "SymmetricLoraQuantizer": "symmetric_lora",
    "SymmetricLoraNLSQuantizer": "symmetric_lora_nls",
    "AsymmetricQuantizer": "asymmetric",
    "AsymmetricLoraQuantizer": "asymmetric_lora",
    "AsymmetricLoraNLSQuantizer": "asymmetric_lora_nls",
}
# Options that change a quantiser's formula: NNCF's strip refuses other values, or reads the numbers differently.
_PLAIN = {"narrow_range": False, "half_range": False, "logarithm_scale": False}


@dataclass(frozen=True)
class Hook:
    """A quantiser of the checkpoint.

    name       `post_hooks.<module, ':' for '.'>:weight__0.0`
    symmetric  its range is `scale`; otherwise `input_low` and `input_range`
    elastic    its adapter was trained with several ranks (NLS)
    columns    input features; None where only the base knows them
    rank       trained rank of the adapter; 0 if there is none
    """

    name: str
    symmetric: bool
    elastic: bool
    bits: int
    rows: int
    groups: int
    columns: int | None
    rank: int


def pointer(*path: str) -> str:
    """Name of a tensor in the converted file: its path as a JSON pointer (RFC 6901)."""
    return "".join("/" + key.replace("~", "~0").replace("/", "~1") for key in path)


def read_hooks(plain: Mapping[str, Any], file: SafeTensorsFile, source: Path) -> dict[str, Hook]:
    """Module (`model.layers.0.mlp.up_proj`) -> its quantiser.

    plain   the checkpoint without its tensors
    file    its tensors, by `pointer`
    source  the checkpoint, for messages

    Raises:
        BadInput: no NNCF checkpoint, or config and tensors contradict each other.
        Unsupported: anything else than quantisers of weights, or an unknown part.
    """
    _check_parts(plain, file, source)
    tensors: dict[str, set[str]] = {}
    for key in plain[STATE]:
        hook, _, tensor = key.rpartition(".")
        tensors.setdefault(hook, set()).add(tensor)
    hooks: dict[str, Hook] = {}
    for number, command in enumerate(plain[CONFIG]["compression_state"]):
        where = f"{source}, compression_state {number}"
        names = command.get("hook_names_in_model") if isinstance(command, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise BadInput("an entry names no hooks", where=where, found=repr(names)[:80], code="E_NNCF")
        for name in names:
            module = _module(name, command, source)
            if module in hooks:
                raise BadInput("a weight has two quantisers", where=f"{where}, hook {name}", code="E_NNCF")
            hooks[module] = _hook(name, command, tensors.pop(name, set()), file, source)
    if not hooks:
        raise BadInput("the checkpoint holds no quantisers", where=source, code="E_NNCF")
    for name, left in sorted(tensors.items()):
        raise Unsupported(
            "the checkpoint holds a hook that nncf_config does not describe",
            where=f"{source}, tensor {STATE}/{name}.{sorted(left)[0]}",
            fix="save nncf_state_dict and nncf_config of the same model",
            code="E_HOOK",
        )
    return hooks


def _check_parts(plain: Mapping[str, Any], file: SafeTensorsFile, source: Path) -> None:
    for key in (STATE, CONFIG, *plain):
        if key not in (STATE, CONFIG, MODEL):
            raise Unsupported(
                "the checkpoint holds a part that is not NNCF's",
                where=source,
                expected=f"{STATE}, {CONFIG}, {MODEL}",
                found=key,
                fix="save a checkpoint without it",
                code="E_NNCF",
            )
        if not isinstance(plain.get(key), dict):
            raise BadInput("this is no NNCF checkpoint", where=source, expected=f"a mapping {key}", code="E_NNCF")
    config = plain[CONFIG]
    if list(config) != ["compression_state"] or not isinstance(config["compression_state"], list):
        raise BadInput(
            "nncf_config is not what nncf.torch.get_config gives",
            where=source,
            expected="the list compression_state",
            found=", ".join(config)[:80],
            code="E_NNCF",
        )
    for part in (STATE, MODEL):
        for key in plain.get(part, ()):
            if pointer(part, key) not in file:
                raise BadInput("a value is no tensor", where=f"{source}, {part}/{key}", code="E_NNCF")


def _module(name: str, command: Mapping[str, Any], source: Path) -> str:
    match = _NAME.fullmatch(name)
    kind, path = command.get("module_cls_name"), command.get("module_path")
    if match is None or not isinstance(kind, str) or kind not in _MODES or path not in _MODULE_PATHS:
        raise Unsupported(
            "the checkpoint holds a hook that is no quantiser of a weight",
            where=f"{source}, hook {name}",
            expected=f"post_hooks.<module>:weight__0.0 of {', '.join(_MODES)}",
            found=repr(kind)[:80] + (f" of {path!r}"[:80] if path else ""),
            fix="compress the model with FQ_LORA or FQ_LORA_NLS alone: no quantised activations, no AWQ, no pruning",
            code="E_HOOK",
        )
    return match["module"].replace(":", ".")


def _hook(name: str, command: Mapping[str, Any], tensors: set[str], file: SafeTensorsFile, source: Path) -> Hook:
    """One quantiser, its spec compared with its tensors."""
    where = f"{source}, hook {name}"
    mode = _MODES[command["module_cls_name"]]
    adapter, symmetric = "_lora" in mode, mode.startswith("symmetric")
    config = command.get("module_config")
    spec = config.get("qspec") if adapter and isinstance(config, dict) else config
    lora = config.get("lspec") if adapter and isinstance(config, dict) else {}
    if not isinstance(spec, dict) or not isinstance(lora, dict):
        raise BadInput("a quantiser has no spec", where=where, code="E_NNCF")
    ranges = ("scale",) if symmetric else ("input_low", "input_range")
    wanted = {"_num_bits", "enabled", *ranges}
    wanted |= ({"signed_tensor"} if symmetric else set()) | ({"lora_A", "lora_B"} if adapter else set())
    if odd := sorted(wanted ^ tensors):
        raise BadInput(
            "a quantiser does not have the tensors of its class",
            where=f"{source}, tensor {STATE}/{name}.{odd[0]}",
            expected=", ".join(sorted(wanted)),
            found="no such tensor" if odd[0] in wanted else "a tensor too many",
            fix="save the checkpoint again",
            code="E_NNCF",
        )

    def shape(tensor: str, stored: Iterable[str] = _FLOATS) -> list[int]:
        info = file.info(pointer(STATE, f"{name}.{tensor}"))
        if info.stored not in stored or 0 in info.shape:
            expected = f"{' or '.join(stored)}, not empty"
            _contradiction(f"{source}, tensor {STATE}/{name}.{tensor}", expected, f"{info.stored} {info.shape}")
        return list(info.shape)

    def number(tensor: str) -> int:
        agree(tensor, [1], shape(tensor, ("I32",)))
        return int(file.read(pointer(STATE, f"{name}.{tensor}"))[0])

    def agree(what: str, expected: object, found: object) -> None:
        if expected != found or type(expected) is not type(found):
            _contradiction(f"{where}, {what}", expected, repr(found)[:80])

    bits = number("_num_bits")
    agree("num_bits", bits, spec.get("num_bits"))
    if bits not in (4, 8):
        raise Unsupported(
            "only quantisers of 4 and 8 bits are supported", where=where, expected="4 or 8", found=bits, code="E_BITS"
        )
    agree("mode", mode, spec.get("mode"))
    agree("enabled", 1, number("enabled"))
    if symmetric:
        agree("signed_tensor", 1, number("signed_tensor"))
    for option, value in _PLAIN.items():
        agree(option, value, spec.get(option))
    scale = shape(ranges[0])
    if len(scale) not in (2, 3) or scale[-1] != 1 or (len(scale) == 3 and not adapter):
        _contradiction(f"{where}, {ranges[0]}", "[out, groups, 1] with an adapter, or [out, 1]", scale)
    agree(ranges[-1], scale, shape(ranges[-1]))
    agree("scale_shape", scale, spec.get("scale_shape"))
    rows, groups = scale[0], scale[1] if len(scale) == 3 else 1
    rank, columns = 0, None
    if adapter:
        a = shape("lora_A")
        if len(a) != 2 or a[1] % groups:
            _contradiction(f"{where}, lora_A", f"[rank, in], in a multiple of {groups} groups", a)
        rank, columns = a
        agree("lora_B", [rows, rank], shape("lora_B"))
        agree("lora_rank", rank, lora.get("lora_rank"))
        agree("active_lora_rank", rank, lora.get("active_lora_rank", rank))
        agree("orig_weight_shape", [rows, columns], lora.get("orig_weight_shape"))
        grouped = [rows, groups, columns // groups] if len(scale) == 3 else [rows, columns]
        agree("weight_shape", grouped, lora.get("weight_shape"))
    return Hook(name, symmetric, mode.endswith("_nls"), bits, rows, groups, columns, rank)


def _contradiction(where: str, expected: object, found: object) -> NoReturn:
    raise BadInput(
        "spec and tensors of a quantiser contradict each other, or are none that NNCF writes",
        where=where,
        expected=expected,
        found=found,
        fix="save nncf_state_dict and nncf_config of the same model",
        code="E_NNCF",
    )
