"""One measurement in a process of its own: load, warm up, generate; a row's samples come from many such processes.

The prompt is of random tokens, another one for each generation, so that no cache of prefixes can help.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.bench import energy
from sparseport.bench.engines import load
from sparseport.errors import SparseportError

# Ids below are most often special tokens.
_FIRST_TOKEN = 10


def measure(
    engine: str,
    path: str,
    device: str,
    settings: dict[str, Any],
    prompt: int,
    tokens: int,
    warm_up: int,
    threads: int,
    pinned: list[int] | None,
    seed: int,
) -> dict[str, Any]:
    """Load a model and generate; the last generation counts.

    Args:
        engine: see `sparseport.bench.engines`.
        path: what it loads.
        device: where.
        settings: the engine's own.
        prompt: tokens to read.
        tokens: tokens to generate, 2 or more.
        warm_up: generations before the one that counts.
        threads: threads to compute with; 0 leaves it to the engine.
        pinned: numbers of the processor's cores that the process may use, or None for all.
        seed: of the prompts.

    Returns:
        `load_s`, `first_token_ms`, `prefill_tokens_s`, `decode_ms` (per token after the first), `decode_tokens_s`,
        `peak_mib` (of this process; None where the system does not say) and `energy_j` (per token, of the whole
        processor, while generating; None where the machine does not say).
    """
    if pinned is not None:
        os.sched_setaffinity(0, pinned)  # before any runtime makes its threads
    started = time.perf_counter()
    runner = load(engine, Path(path), device, settings, threads)
    loaded = time.perf_counter()
    random = np.random.default_rng(seed)
    for _ in range(warm_up + 1):
        words = random.integers(_FIRST_TOKEN, runner.vocabulary, prompt).tolist()
        before = energy.read()
        timing = runner.generate(words, tokens)
        after = energy.read()
    if timing.tokens != tokens:
        raise SparseportError("generation ended early", where=engine, expected=tokens, found=timing.tokens)
    decode = timing.rest_s / (tokens - 1)
    return {
        "load_s": loaded - started,
        "first_token_ms": timing.first_s * 1e3,
        "prefill_tokens_s": prompt / timing.first_s,
        "decode_ms": decode * 1e3,
        "decode_tokens_s": 1 / decode,
        "peak_mib": _peak_mib(),
        "energy_j": None if before is None or after is None else energy.between(before, after) / tokens,
    }


def _peak_mib() -> float | None:
    """Peak memory of this process; `ru_maxrss` would begin with that of the process that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    from sparseport.child import serve

    serve(measure)
