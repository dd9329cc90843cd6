"""How fast this machine reads memory: the limit of decoding, which reads every weight once for each token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sparseport.figures import summary
from sparseport.machine import processor

# Far more than any processor's caches hold, and little enough for a small machine.
_BYTES = 1 << 30


def measure_bandwidth(size: int = _BYTES, repeats: int = 7, threads: int = 0) -> dict[str, Any]:
    """Read memory from end to end with all cores.

    Each thread takes the maximum of its part, which numpy computes in vector instructions and without the interpreter's
    lock; finding a maximum is faster than memory is.

    Args:
        size: bytes to read.
        repeats: how often, after one time that does not count.
        threads: how many read; 0 for one on each core.

    Returns:
        GB/s (10^9 bytes) as `sparseport.figures.summary` has it, and `threads`.
    """
    count = threads or int(processor()["cores"] or 1)
    length = size // count // 4
    # Ones, not zeros: the pages of untouched zeros are all the same one.
    parts = [np.ones(length, np.int32) for _ in range(count)]
    samples = []
    with ThreadPoolExecutor(count) as pool:
        for number in range(repeats + 1):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds = time.perf_counter() - started
            if number:
                samples.append(count * length * 4 / seconds / 1e9)
    return {**summary(samples), "threads": count}


def bandwidth_step(size: int = _BYTES, repeats: int = 7, threads: int = 0) -> dict[str, Any]:
    """`measure_bandwidth` as the step of a child process, so that its memory is gone before models are measured."""
    return measure_bandwidth(size, repeats, threads)


if __name__ == "__main__":
    from sparseport.child import serve

    serve(bandwidth_step)
