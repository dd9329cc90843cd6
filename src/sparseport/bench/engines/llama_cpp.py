"""llama.cpp through llama-cpp-python. Settings are arguments of its `Llama`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.bench.engines import Timing
from sparseport.errors import UsageError
from sparseport.machine import processor

# Its default of 512 tokens cuts a prompt and its answer short.
_CONTEXT = 4096


class _Runner:
    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocabulary = int(model.n_vocab())

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        self._model.reset()
        started = time.perf_counter()
        self._model.eval(list(prompt))
        token = self._most_likely()
        first = time.perf_counter()
        for _ in range(tokens - 1):
            self._model.eval([token])
            token = self._most_likely()
        return Timing(first - started, time.perf_counter() - first, tokens)

    def _most_likely(self) -> int:
        import llama_cpp

        # Of the last token; `scores` is filled only where logits of all positions were asked for.
        pointer = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        return int(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).argmax())


def load(path: Path, device: str, settings: dict[str, Any], threads: int) -> _Runner:
    """See `sparseport.bench.engines.load`."""
    from llama_cpp import Llama

    if device != "CPU":
        raise UsageError("llama.cpp is measured on the CPU", found=device)
    count = threads or processor()["cores"]  # it would take half of the cores itself
    options = {"n_ctx": _CONTEXT, "n_threads": count, "n_threads_batch": count, "verbose": False, **settings}
    return _Runner(Llama(str(path), **options))
