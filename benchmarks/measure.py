"""One measurement in a process of its own: load a folder, read a prompt, generate; the result is a line of JSON.

    python benchmarks/measure.py ENGINE FOLDER --prompt 64 --tokens 64 [--settings JSON]

Engines: `openvino-genai`, `onnxruntime-genai`. The prompt is random tokens, another one each time, so that no cache of
prefixes can help. Generation does not stop at an end token.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=64, help="tokens to read")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--warm-up", type=int, default=1, help="runs before the one that counts")
    parser.add_argument("--settings", type=json.loads, default={}, help="OpenVINO properties")
    options = parser.parse_args()
    started = time.perf_counter()
    generate = ENGINES[options.engine](options.folder, options.settings)
    loaded = time.perf_counter()
    random = np.random.default_rng()
    size = int(json.loads((options.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    for _ in range(options.warm_up + 1):
        first, rest = generate(random.integers(10, size, options.prompt).tolist(), options.tokens)
    peak = _peak_mib()
    result = {
        "load_s": loaded - started,
        "first_token_ms": first * 1e3,
        "decode_ms": rest * 1e3,
        "peak_mib": peak,
    }
    print(json.dumps(result))


def _peak_mib() -> float | None:
    """Peak memory of this process; `ru_maxrss` would begin with that of the process that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def openvino_genai(folder: Path, settings: dict[str, Any]) -> Any:
    """Seconds to the first token, and per token after it."""
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(folder), "CPU", **settings)

    def generate(prompt: list[int], tokens: int) -> tuple[float, float]:
        config = genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, ignore_eos=True)
        ids = np.array([prompt], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        metrics = pipeline.generate(inputs, config).perf_metrics
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3

    return generate


def onnxruntime_genai(folder: Path, settings: dict[str, Any]) -> Any:
    """Seconds to the first token, and per token after it."""
    import onnxruntime_genai as genai

    if settings:
        raise SystemExit("onnxruntime-genai takes its settings from genai_config.json")
    model = genai.Model(str(folder))

    def generate(prompt: list[int], tokens: int) -> tuple[float, float]:
        length = len(prompt) + tokens
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        made = 1
        while made < tokens and not generator.is_done():
            generator.generate_next_token()
            made += 1
        if made != tokens:
            raise SystemExit(f"generation ended after {made} tokens")
        return first - started, (time.perf_counter() - first) / (tokens - 1)

    return generate


ENGINES = {"openvino-genai": openvino_genai, "onnxruntime-genai": onnxruntime_genai}


if __name__ == "__main__":
    main()
