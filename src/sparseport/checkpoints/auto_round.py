"""AutoRound's own format: the words of GPTQ or of AWQ under the name `auto-round`; `packing_format` tells which.

    auto_round:auto_gptq                 GPTQ words, zero-points stored as z - 1
    auto_round, auto_round:gptqmodel,    GPTQ words, zero-points stored as z
    auto_round:exllamav2, ...:triton
    auto_round:auto_awq                  AWQ gemm words

Older releases call the key `backend`. Other packings (fp8, mlx, nvfp4, ...) do not hold 4-bit integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseport.checkpoints.awq import Awq, open_awq
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import Gptq, flag, open_gptq
from sparseport.errors import Unsupported
from sparseport.weights.packing import ZeroPointStorage

_V1 = ("auto_round:auto_gptq", "auto_round:gptq", "auto_round:gptq:exllamav2", "auto_round:auto_gptq:exllamav2")
_V2 = ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2", "auto_round:triton", "auto_round:tritonv2")
_AWQ = ("auto_round:auto_awq", "auto_round:awq", "auto_round:awq:gemm")


def open_auto_round(
    folder: ModelFolder, raw: Mapping[str, Any], where: str, *, zero_storage: ZeroPointStorage | None = None
) -> Gptq | Awq:
    """The dialect of a folder whose quantization_config says `auto-round`.

    zero_storage  what the user says about GPTQ zero-points (`--gptq-zeros`)

    Raises:
        BadInput: the config is damaged, or contradicts the data.
        Unsupported: a packing that does not hold 4-bit integers.
    """
    packing = raw.get("packing_format", raw.get("backend"))
    plain_settings = {k: v for k, v in raw.items() if k not in ("packing_format", "backend")}
    if packing in _AWQ:
        settings = {**plain_settings, "version": "gemm", "zero_point": not flag(raw, "sym", where)}
        dialect: Gptq | Awq = open_awq(folder, settings, where)
    elif packing in _V1 + _V2:
        label = "gptq" if packing in _V1 else "gptq_v2"
        settings = {**plain_settings, "quant_method": "gptq", "checkpoint_format": label}
        dialect = open_gptq(folder, settings, where, zero_storage=zero_storage)
    else:
        raise Unsupported(
            f"AutoRound packing {packing!r} is not read",
            where=where,
            expected="auto_round, auto_round:auto_gptq or auto_round:auto_awq",
            found=packing,
            fix="export from AutoRound with format auto_round, auto_gptq, auto_awq or llm_compressor",
            code="E_QUANT_METHOD",
        )
    dialect.name = f"AutoRound {packing} ({dialect.name})"
    return dialect
