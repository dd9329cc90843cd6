"""onnxruntime-genai. Settings are session options, by the names that `genai_config.json` has for them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.bench.engines import Timing
from sparseport.checkpoints.json_files import read_json
from sparseport.errors import UsageError


class _Runner:
    def __init__(self, model: Any, vocabulary: int) -> None:
        self._model = model
        self.vocabulary = vocabulary

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        import onnxruntime_genai as genai

        length = len(prompt) + tokens
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(self._model, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        made = 1
        while made < tokens and not generator.is_done():
            generator.generate_next_token()
            made += 1
        return Timing(first - started, time.perf_counter() - first, made)


def load(path: Path, device: str, settings: dict[str, Any], threads: int) -> _Runner:
    """See `sparseport.bench.engines.load`."""
    import onnxruntime_genai as genai

    if device != "CPU":
        raise UsageError("onnxruntime-genai is measured on the CPU", found=device)
    config = genai.Config(str(path))
    if threads:
        settings["intra_op_num_threads"] = threads
    if settings:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
    vocabulary = int(read_json(path / "genai_config.json", what="genai_config.json")["model"]["vocab_size"])
    return _Runner(genai.Model(config), vocabulary)
