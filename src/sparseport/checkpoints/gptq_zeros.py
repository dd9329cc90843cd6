"""How a GPTQ checkpoint stores its zero-points: V1 (z - 1) or V2 (z). A wrong guess shifts every weight by one scale.

The label in the config is not enough: writers exist that say "gptq" and store V2. So the data must agree with it, and
without a label the data must say so by itself. GPTQModel takes 1 off whole words, so a z of 0 borrows from its
neighbour; its name in the config tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparseport.checkpoints.dialect import read_part
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.writer_of import always_v1, may_wrap_nibbles, quantised_by_gptqmodel, writer_of
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import U8
from sparseport.weights.packing import I32, ZeroPointStorage, unpack_gptq_codes, unpack_gptq_zero_points

_LABELS = {"gptq": ZeroPointStorage.V1, "gptq_v2": ZeroPointStorage.V2}
_ASK = "say which it is with --gptq-zeros v1 (z - 1 is stored) or --gptq-zeros v2 (z is stored)"
# Evidence from asymmetric data: mean of code - z over layers, in steps; trained weights are centred on zero.
_SAMPLED_LAYERS, _ENOUGH_CODES, _CENTRED, _SHIFTED = 8, 4096, 0.3, 0.7


def decide_zero_storage(
    folder: ModelFolder, raw: Mapping[str, Any], where: str, *, sym: bool, override: ZeroPointStorage | None
) -> ZeroPointStorage:
    """How zero-points are stored, from the user's word, else from label, writer and data together.

    raw       the quantization_config
    where     the file that it stands in, for messages
    override  what the user says; taken as it is, but `sym` must still hold

    Without a label, files count as V1, as older writers mean it, if the data clearly says so too.

    Raises:
        BadInput: E_ZEROS, when label and data contradict each other, nothing tells, or `sym` does not hold.
        Unsupported: a label that is neither `gptq` nor `gptq_v2`.
    """
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
    if override is None:
        if chosen is ZeroPointStorage.V1 and quantised_by_gptqmodel(raw):
            chosen = ZeroPointStorage.V1_WORDS
        _check_centred(folder, modules, chosen, labelled=label is not None or always_v1(raw))
    if chosen is ZeroPointStorage.V1:
        known = override is not None or may_wrap_nibbles(raw)
        _check_wraps(folder, modules, unknown=None if known else writer_of(raw) or "another tool")
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


def _words(folder: ModelFolder, module: str) -> I32:
    return read_part(folder, f"{module}.qzeros", ("I32",), 2).view(np.int32)


def _stored(folder: ModelFolder, module: str) -> U8:
    """Zero-points as stored, without V1's offset: uint8 [out, groups]."""
    return unpack_gptq_zero_points(_words(folder, module), ZeroPointStorage.V2)


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
    """Compare a reading of asymmetric zero-points with the data.

    A label stands unless the data clearly contradicts it. Without one the data must clearly say the same.
    """
    other = ZeroPointStorage.V1 if chosen is ZeroPointStorage.V2 else ZeroPointStorage.V2
    shifts = _mean_shifts(folder, modules, chosen, other)
    if shifts is None:
        if labelled:
            return
        found = "too few codes to tell, or all the same"
    else:
        mine, theirs = abs(shifts[0]), abs(shifts[1])
        if (mine <= _SHIFTED or theirs >= _CENTRED) if labelled else (mine < _CENTRED and theirs > _SHIFTED):
            return
        found = f"weights off centre by {mine:.2f} steps as {chosen.name}, by {theirs:.2f} as {other.name}"
    raise BadInput(
        f"the config says {chosen.name} zero-points, but the data says {other.name}"
        if labelled
        else "the config does not say how zero-points are stored, and the data does not clearly say V1",
        where=f"{folder.path}, tensor {modules[0]}.qzeros",
        expected=f"weights centred on zero as {chosen.name}",
        found=found,
        fix=_ASK,
        code="E_ZEROS",
    )


def _mean_shifts(folder: ModelFolder, modules: list[str], *readings: ZeroPointStorage) -> tuple[float, ...] | None:
    """Mean of code - z under each reading, over all sampled layers; None where they are too small or flat to tell."""
    step = max(1, len(modules) // _SAMPLED_LAYERS)
    count, sums = 0, [0.0] * len(readings)
    for module in modules[::step][:_SAMPLED_LAYERS]:
        name = f"{module}.qweight"
        if not folder.has(name) or folder.info(name).stored != "I32" or len(folder.info(name).shape) != 2:
            continue  # its own reader refuses it by name
        codes, words = unpack_gptq_codes(folder.read(name).view(np.int32)), _words(folder, module)
        if codes.size == 0 or words.size == 0 or float(codes.std()) < 1:
            continue
        count += codes.size
        for i, reading in enumerate(readings):
            # Every zero-point stands for the same number of codes.
            sums[i] += codes.size * (float(codes.mean()) - float(unpack_gptq_zero_points(words, reading).mean()))
    return None if count < _ENOUGH_CODES else tuple(total / count for total in sums)


def _check_wraps(folder: ModelFolder, modules: list[str], unknown: str | None) -> None:
    """Report zero-points that V1 wraps around.

    unknown  the writer, if it has a name and nobody knows how it wraps; else None

    Raises:
        BadInput: E_ZEROS, for such a writer.
    """
    wrapped, suspicious = 0, 0
    for module in modules:
        stored = _stored(folder, module)
        if unknown is not None and (stored == 15).any():
            raise BadInput(
                "zero-points are stored as 15, and how this writer means them is not known",
                where=f"{folder.path}, tensor {module}.qzeros",
                expected="a writer whose zero-points are known: AutoGPTQ, SQFT, AutoRound or GPTQModel",
                found=unknown[:80],
                fix="pass --gptq-zeros v1 (each 15 is a 0, as AutoGPTQ reads it) or --gptq-zeros v1-words (0x11111111 "
                "was taken off whole words, as GPTQModel does)",
                code="E_ZEROS",
            )
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
