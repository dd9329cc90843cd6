"""PyTorch as transformers runs it: a checkpoint, or the dequantised model of an exported folder.

Setting `dtype`: float32 (default) or bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseport.bench.engines import Timing
from sparseport.errors import UsageError


class _Runner:
    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocabulary = int(model.config.vocab_size)

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        import torch

        device = next(self._model.parameters()).device
        with torch.inference_mode():
            started = time.perf_counter()
            answer = self._model(torch.tensor([list(prompt)], device=device), use_cache=True, logits_to_keep=1)
            token = answer.logits[:, -1:].argmax(-1)
            first = _now(device)
            for _ in range(tokens - 1):
                answer = self._model(token, past_key_values=answer.past_key_values, use_cache=True)
                token = answer.logits[:, -1:].argmax(-1)
        return Timing(first - started, _now(device) - first, tokens)


def _now(device: Any) -> float:
    """The time when everything that was asked of a device is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def load(path: Path, device: str, settings: dict[str, Any], threads: int) -> _Runner:
    """See `sparseport.bench.engines.load`."""
    import torch
    from transformers import AutoModelForCausalLM

    from sparseport.targets.read_back import open_reader
    from sparseport.verify.certificate import FILE_NAME, Certificate

    if threads:
        torch.set_num_threads(threads)
    unknown = sorted(set(settings) - {"dtype"})
    dtype = str(settings.get("dtype", "float32"))
    if unknown or dtype not in ("float32", "bfloat16"):
        raise UsageError("unknown setting for torch", expected="dtype float32 or bfloat16", found=settings)
    if (path / FILE_NAME).is_file():
        from sparseport.verify.numerics import reference_of

        model = reference_of(path, open_reader(Certificate.read(path).target, path)).to(getattr(torch, dtype))
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True)
    return _Runner(model.eval().to(device.lower().replace("gpu", "cuda")))
