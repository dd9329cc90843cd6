"""How a GPTQ checkpoint stores its zero-points: V1 (z - 1) or V2 (z). A wrong guess shifts every weight by one scale.

The label in the config is not enough: writers exist that say "gptq" and store V2. So the data must agree with it.
GPTQModel takes 1 off whole words, so a z of 0 borrows from its neighbour; its name in the config tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.writer_of import writer_of
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import U8
from sparseport.weights.packing import ZeroPointStorage, unpack_gptq_codes, unpack_gptq_zero_points

_LABELS = {"gptq": ZeroPointStorage.V1, "gptq_v2": ZeroPointStorage.V2}
_ASK = "say which it is with --gptq-zeros v1 (z - 1 is stored) or --gptq-zeros v2 (z is stored)"
_GPTQMODEL = "gptqmodel"
# Evidence from asymmetric data: mean of code - z over a layer, in steps; trained weights are centred on zero.
_SAMPLED_LAYERS, _ENOUGH_CODES, _CENTRED, _SHIFTED = 8, 4096, 0.3, 0.7


def decide_zero_storage(
    folder: ModelFolder, raw: Mapping[str, Any], *, sym: bool, override: ZeroPointStorage | None
) -> ZeroPointStorage:
    """V1 or V2, from the user's word, else from the label and the data together.

    raw       the quantization_config
    override  what the user says; taken as it is, but `sym` must still hold

    Without a label V1 is assumed, as older writers mean it, unless the data says otherwise.

    Raises:
        BadInput: E_ZEROS, when label and data contradict each other, or `sym` does not hold.
        Unsupported: a label that is neither `gptq` nor `gptq_v2`.
    """
    where = str(folder.path / "config.json")
    label = _label(raw, where)
    split = (name.rpartition(".") for name in folder.names())
    modules = list(dict.fromkeys(module for module, _, leaf in split if leaf in ("qweight", "qzeros")))
    if not modules:
        raise BadInput(
            "config.json says GPTQ, but no layer is stored so",
            where=folder.path,
            fix="remove quantization_config if the model is not quantised",
            code="E_TENSOR",
        )
    if sym:
        return _from_symmetric(folder, modules, label, override)
    chosen = override or label or ZeroPointStorage.V1
    if chosen is ZeroPointStorage.V1 and override is None and writer_of(raw).startswith(_GPTQMODEL):
        chosen = ZeroPointStorage.V1_WORDS
    if override is None:
        _check_centred(folder, modules, chosen, labelled=label is not None)
    if chosen is ZeroPointStorage.V1:
        _note_wraps(folder, modules)
    return chosen


def _label(raw: Mapping[str, Any], where: str) -> ZeroPointStorage | None:
    found: set[ZeroPointStorage] = set()
    for key in ("checkpoint_format", "format"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or value not in _LABELS:
            raise Unsupported(
                f"{key} is not a GPTQ layout that sparseport reads",
                where=where,
                expected=" or ".join(_LABELS),
                found=repr(value)[:40],
                fix="save the model in the layout gptq, which every loader reads",
                code="E_QUANT_CONFIG",
            )
        found.add(_LABELS[value])
    if len(found) > 1:
        raise BadInput("checkpoint_format and format disagree", where=where, fix=_ASK, code="E_ZEROS")
    return found.pop() if found else None


def _stored(folder: ModelFolder, module: str) -> U8:
    """Zero-points as stored, without V1's offset: uint8 [out, groups]."""
    info = folder.info(f"{module}.qzeros")
    if info.stored != "I32" or len(info.shape) != 2:
        raise BadInput(
            "tensor has the wrong dtype or rank",
            where=f"{folder.path}, tensor {module}.qzeros",
            expected="I32 with 2 axes",
            found=f"{info.stored} {info.shape}",
            code="E_SHAPE",
        )
    return unpack_gptq_zero_points(folder.read(f"{module}.qzeros").view(np.int32), ZeroPointStorage.V2)


def _from_symmetric(
    folder: ModelFolder, modules: list[str], label: ZeroPointStorage | None, override: ZeroPointStorage | None
) -> ZeroPointStorage:
    by_value = {7: ZeroPointStorage.V1, 8: ZeroPointStorage.V2}
    seen: ZeroPointStorage | None = None
    for module in modules:
        stored = _stored(folder, module)
        value = int(stored.flat[0]) if stored.size else -1
        spot = f"{folder.path}, tensor {module}.qzeros"
        if value not in by_value or (stored != value).any():
            found = sorted({int(v) for v in np.unique(stored)})
            raise BadInput(
                "config says sym, but the zero-points vary or are not the middle",
                where=spot,
                expected="7 everywhere (V1) or 8 everywhere (V2)",
                found=found,
                fix='set "sym": false in config.json if the model is asymmetric',
                code="E_ZEROS",
            )
        if seen is not None and by_value[value] is not seen:
            raise BadInput(
                "some layers store zero-points as V1, others as V2",
                where=spot,
                code="E_ZEROS",
                fix="quantise the model again",
            )
        seen = by_value[value]
    assert seen is not None
    claim = override or label
    if claim is ZeroPointStorage.V1_WORDS:
        claim = ZeroPointStorage.V1  # the same where no zero-point is 0
    if claim is not None and claim is not seen:
        who = "--gptq-zeros" if override else "checkpoint_format in config.json"
        raise BadInput(
            f"{who} says {claim.name} zero-points, but the symmetric model stores {7 if claim.value == 'v2' else 8} "
            f"everywhere, which is {seen.name}",
            where=f"{folder.path}, tensor {modules[0]}.qzeros",
            expected=claim.name,
            found=seen.name,
            fix=f"pass --gptq-zeros {seen.value}",
            code="E_ZEROS",
        )
    return seen


def _check_centred(folder: ModelFolder, modules: list[str], chosen: ZeroPointStorage, labelled: bool) -> None:
    step = max(1, len(modules) // _SAMPLED_LAYERS)
    shifts = [s for m in modules[::step][:_SAMPLED_LAYERS] if (s := _mean_shift(folder, m)) is not None]
    if not shifts:
        return
    one_less, as_it_is = ZeroPointStorage.V1, ZeroPointStorage.V2
    own, other = (as_it_is, one_less) if chosen is as_it_is else (one_less, as_it_is)
    mine = abs(float(np.median([s[own] for s in shifts])))
    theirs = abs(float(np.median([s[other] for s in shifts])))
    if mine > _SHIFTED and theirs < _CENTRED:
        source = "config.json says" if labelled else "without checkpoint_format the file counts as"
        raise BadInput(
            f"{source} {own.name} zero-points, but then the weights are off centre by {mine:.2f} steps "
            f"(as {other.name}: {theirs:.2f})",
            where=f"{folder.path}, tensor {modules[0]}.qzeros",
            expected=own.name,
            found=f"data like {other.name}",
            fix=_ASK,
            code="E_ZEROS",
        )


def _mean_shift(folder: ModelFolder, module: str) -> dict[ZeroPointStorage, float] | None:
    """Mean of code - z under both readings, or None where the layer is too small or too flat to tell."""
    stored = _stored(folder, module)
    name = f"{module}.qweight"
    if not folder.has(name) or folder.info(name).stored != "I32" or len(folder.info(name).shape) != 2:
        return None
    codes = unpack_gptq_codes(folder.read(name).view(np.int32))
    if codes.size < _ENOUGH_CODES or stored.size == 0 or float(codes.std()) < 1:
        return None
    mean = float(codes.mean())
    v1 = (stored + np.uint8(1)) & np.uint8(15)
    return {ZeroPointStorage.V1: mean - float(v1.mean()), ZeroPointStorage.V2: mean - float(stored.mean())}


def _note_wraps(folder: ModelFolder, modules: list[str]) -> None:
    wrapped, suspicious = 0, 0
    for module in modules:
        stored = _stored(folder, module)
        wrapped += int((stored == 15).sum())
        words = stored[: len(stored) // 8 * 8].reshape(-1, 8, stored.shape[1])
        # An old writer turned z = 0 into -1 and spilled ones over the rest of the word.
        suspicious += int((words[:, 6:] == 15).all(axis=1).sum())
    if wrapped:
        folder.warnings.append(
            f"qzeros: {wrapped} zero-points are stored as 15 and are read as 0 (V1 wraps around in each "
            "nibble); if GPTQModel wrote the file, --gptq-zeros v1-words reads it as GPTQModel does"
        )
    if suspicious:
        folder.warnings.append(
            f"qzeros: {suspicious} words end in 15s, as an old AutoGPTQ wrote them when a zero-point of 0 overflowed; "
            "their zero-points may be lost already in the checkpoint"
        )
