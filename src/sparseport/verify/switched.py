"""Does the runtime switch an adapter on and off as torch would? Run as a child process, after the base was compared.

ONNX Runtime's logits with the adapter are compared as those of the base are. OpenVINO GenAI gives no logits, but the
tokens it chooses and the sum of their log-probabilities; both are held against torch, with the adapter and without it,
in one pipeline that is switched on, off and on again. GenAI 2026.4 finds the beginnings of prompts in its cache by
their tokens alone, whatever adapter was active then: for right answers the cache of prefixes has to be off, as here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.sub_config import in_whole_model, kept_blocks
from sparseport.targets.empty_model import read_settings
from sparseport.targets.read_back import open_reader
from sparseport.verify.branched import attach
from sparseport.verify.numerics import TOLERANCE, drift, judged, logits_of, reference_of, sample_tokens
from sparseport.verify.runs import OPENVINO_FULL_PRECISION, PREFILL_TOKENS, adapter_run

# Tokens that OpenVINO GenAI generates in each position of the switch.
GENERATED = 16
_SETTINGS = {**OPENVINO_FULL_PRECISION, "enable_prefix_caching": "false"}


def compare_switched(folder: str, target: str, adapters: list[str]) -> dict[str, Any]:
    """Compare a folder with each of its adapters with torch's base and un-merged branches.

    Args:
        folder: a written folder.
        target: what it was written for.
        adapters: files of adapters in it.

    Returns:
        `with FILE` for each, and for OpenVINO `without FILE`: `judged_max_abs` and `allowed` among others, see
        `numerics.compare_logits`. For OpenVINO the difference is that of mean log-probabilities, or the gap between
        torch's largest logit and that of the chosen token, whichever is larger.
    """
    path = Path(folder)
    tokens, _ = sample_tokens(path)
    graph = open_reader(target, path)
    result: dict[str, Any] = {}
    network = reference_of(path, graph)
    blocks = kept_blocks(read_settings(path / "config.json"))
    for file in adapters:
        handles = [
            attach(network, in_whole_model(beside.module, blocks), beside.branch) for beside in graph.adapter(file)
        ]
        if target == "onnx":
            result[f"with {file}"] = _logits(network, path, file, tokens)
            _remove(handles)
        else:
            prompt = tokens[:PREFILL_TOKENS]
            on, off, again = _generated(path, file, prompt)
            result[f"with {file}"] = _chosen(network, prompt, [on, again])
            _remove(handles)
            result[f"without {file}"] = _chosen(network, prompt, [off])
    return result


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _logits(network: Any, folder: Path, file: str, tokens: list[int]) -> dict[str, Any]:
    run = adapter_run(folder, file)
    reference, logits = logits_of(network, tokens), run.logits(tokens)
    found = {**drift(reference, logits), "settings": dict(run.settings), **judged(network, tokens, reference, logits)}
    network.float()  # judging may have gone to float64
    return found


def _generated(folder: Path, file: str, prompt: list[int]) -> list[tuple[list[int], float]]:
    """Tokens and the sum of their log-probabilities: with the adapter, without it, and with it again."""
    import openvino as ov
    import openvino_genai as genai

    adapter = genai.Adapter(str(folder / file))
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    settings: dict[str, Any] = {**OPENVINO_FULL_PRECISION, "scheduler_config": scheduler}
    pipeline = genai.LLMPipeline(str(folder), "CPU", adapters=genai.AdapterConfig(adapter), **settings)
    ids = np.array([prompt], np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    found = []
    for active in (genai.AdapterConfig(adapter), genai.AdapterConfig(), genai.AdapterConfig(adapter)):
        config = genai.GenerationConfig(max_new_tokens=GENERATED, do_sample=False, ignore_eos=True, logprobs=1)
        config.adapters = active
        answer = pipeline.generate(inputs, config)
        found.append((list(answer.tokens[0]), float(answer.scores[0])))
    return found


def _chosen(network: Any, prompt: list[int], answers: list[tuple[list[int], float]]) -> dict[str, Any]:
    """How far the runtime's choices are from torch's own; in float64 too, where float32 is further off than allowed."""
    largest = max(_off(network, prompt, *answer) for answer in answers)
    result = {"tokens": len(answers[0][0]), "settings": dict(_SETTINGS), "judged_against": "float32"}
    if not largest > TOLERANCE:  # also when it is NaN, which the caller refuses
        return result | {"judged_max_abs": f"{largest:.3e}", "allowed": f"{TOLERANCE:.3e}"}
    steps = prompt + answers[0][0]
    single, double = logits_of(network, steps), logits_of(network.double(), steps)
    largest = max(_off(network, prompt, *answer) for answer in answers)
    network.float()
    noise = float(np.abs(single - double).max())
    allowed = max(TOLERANCE, 2 * noise)
    return result | {
        "judged_against": "float64",
        "judged_max_abs": f"{largest:.3e}",
        "allowed": f"{allowed:.3e}",
        "float32_noise": f"{noise:.3e}",
    }


def _off(network: Any, prompt: list[int], tokens: list[int], score: float) -> float:
    """The larger of two: the gap to torch's best logit at any token, and the difference of mean log-probabilities."""
    logits = logits_of(network, prompt + tokens)[len(prompt) - 1 : -1].astype(np.float64)
    at = np.arange(len(tokens)), np.array(tokens)
    best = logits.max(axis=1)
    gaps: npt.NDArray[np.float64] = best - logits[at]
    log_sums = best + np.log(np.exp(logits - best[:, None]).sum(axis=1))
    mean = float((logits[at] - log_sums).mean())
    return max(float(gaps.max()), abs(mean - score / len(tokens)))


if __name__ == "__main__":
    from sparseport.child import serve

    serve(compare_switched)
