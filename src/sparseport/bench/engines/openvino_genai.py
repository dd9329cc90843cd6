"""OpenVINO GenAI's LLMPipeline: what applications use. Settings are OpenVINO's properties."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.bench.engines import Timing
from sparseport.checkpoints.json_files import read_json
from sparseport.errors import BadInput


class _Runner:
    def __init__(self, pipeline: Any, vocabulary: int) -> None:
        self._pipeline = pipeline
        self.vocabulary = vocabulary

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        import openvino as ov
        import openvino_genai as genai

        config = genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, ignore_eos=True)
        ids = np.array([prompt], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        metrics = self._pipeline.generate(inputs, config).perf_metrics
        made = int(metrics.get_num_generated_tokens())
        # TTFT and TPOT are in milliseconds; TPOT is the mean over the tokens after the first.
        return Timing(metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3 * (made - 1), made)


def load(path: Path, device: str, settings: dict[str, Any], threads: int) -> _Runner:
    """See `sparseport.bench.engines.load`."""
    import openvino_genai as genai

    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    for name in ("openvino_tokenizer.xml", "openvino_detokenizer.xml"):
        if not (path / name).is_file():
            raise BadInput(
                "OpenVINO GenAI does not load a folder without tokenizer",
                where=path,
                expected=name,
                fix="measure it with --engine openvino, or export it with its tokenizer",
            )
    pipeline = genai.LLMPipeline(str(path), device, **settings)
    return _Runner(pipeline, int(read_json(path / "config.json", what="model config")["vocab_size"]))
