"""Which settings a sweep tries: per engine, stages of settings that are tried together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from sparseport.machine import describe, processor

Settings = dict[str, Any]
Stage = Mapping[str, Sequence[Any]]
"""Names of settings -> values to try, in all combinations; None leaves a setting to the engine."""

NUMERIC = {"DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"}
"""Settings that change what is computed, and not only how fast."""


SPARSE_WEIGHTS = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
"""OpenVINO unpacks sparse INT8 weights on the way to AMX, where at least this share of them is zero. It does so for
products of 8-bit weights with 8-bit activations only; weights in 4 bits, and activations in float, are left as they
are."""


def stages(
    engine: str,
    group_sizes: Sequence[int],
    cores: int | None = None,
    sparsity: float = 0.0,
    flags: Sequence[str] | None = None,
    fixed_threads: bool = False,
) -> list[Stage]:
    """What to try, stage by stage; each stage goes on from the best of the one before.

    Args:
        engine: `openvino-genai`, `openvino` or `onnxruntime-genai`.
        group_sizes: those of the folder's INT4 layers. OpenVINO quantises activations only in groups that divide those
            of the weights.
        cores: processors to use; those of this machine by default.
        sparsity: share of zeros among the weights.
        flags: instruction sets; those of this machine by default.
        fixed_threads: the number of threads was given and is not tried.
    """
    threads = _threads(cores or int(processor()["cores"] or 1))
    if engine == "onnxruntime-genai":
        return [
            *([] if fixed_threads else [{"intra_op_num_threads": [None, *threads]}]),
            {"session.intra_op.allow_spinning": [None, "0"]},
        ]
    flags = describe()["flags"] if flags is None else flags
    halves = [name for name, flag in (("bf16", "avx512_bf16"), ("f16", "avx512_fp16")) if flag in flags]
    # 16-bit products of AMX need no other flag.
    halves += ["bf16"] if "amx_bf16" in flags and "bf16" not in halves else []
    groups = sorted({size for size in (32, *group_sizes) if size <= 256})
    sparse: list[Stage] = []
    if "amx_int8" in flags and sparsity > 0:
        sparse = [{SPARSE_WEIGHTS: [None, sparsity]}]
    return [
        {
            "INFERENCE_PRECISION_HINT": [None, "f32", *halves],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": [None, 0, *groups],
        },
        {"KV_CACHE_PRECISION": [None, "u8", "f16"]},
        *sparse,
        *([] if fixed_threads else [{"INFERENCE_NUM_THREADS": [None, *threads]}]),
        {"NUM_STREAMS": [None, 2]},
    ]


def combinations(stage: Stage, start: Settings) -> Iterator[Settings]:
    """`start` with every combination of a stage's values; the first leaves all of them as they are in `start`."""
    names = list(stage)
    seen: list[Settings] = []
    for values in product(*stage.values()):
        chosen = {**start, **{name: value for name, value in zip(names, values, strict=True) if value is not None}}
        if chosen not in seen:
            seen.append(chosen)
            yield chosen


def _threads(cores: int) -> list[int]:
    """All processors, and half of them: two of them often share one core's arithmetic."""
    return sorted({count for count in (cores, cores // 2) if count >= 1})
