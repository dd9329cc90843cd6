"""Greedy generation with and without a draft, for speculation.py: the same interface over both runtimes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparseport.verify.runs import OPENVINO_FULL_PRECISION


@dataclass(frozen=True)
class Generated:
    """An answer.

    tokens     new tokens
    decode_ms  milliseconds after the prompt was read
    proposed   tokens that the draft said, as the runtime counts them: OpenVINO GenAI leaves out the last round
    accepted   those that were kept
    steps      steps of the main network after the prompt
    stepped    tokens that these steps gave
    """

    tokens: list[int]
    decode_ms: float
    proposed: int = 0
    accepted: int = 0
    steps: int = 0
    stepped: int = 0


class Engine(Protocol):
    """A main network with its draft."""

    def generate(self, prompt: list[int], tokens: int, assistant: int, on: bool) -> Generated:
        """Generate greedily.

        Args:
            prompt: token ids.
            tokens: new tokens, at most.
            assistant: tokens that the draft says at once; 0: without it.
            on: whether generation goes on after an end token, as far as the runtime can.
        """


class OpenVino:
    """OpenVINO GenAI: continuous batching with paged attention in both cases, without a cache of prompts."""

    def __init__(self, main: Path, draft: Path, settings: str) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        properties: dict[str, Any] = dict(OPENVINO_FULL_PRECISION) if settings == "full" else {}
        drafts = genai.draft_model(str(draft), "CPU", **properties)
        common: dict[str, Any] = {"scheduler_config": scheduler, **properties}
        self._plain = genai.LLMPipeline(str(main), "CPU", **common)
        self._drafted = genai.LLMPipeline(str(main), "CPU", draft_model=drafts, **common)

    def generate(self, prompt: list[int], tokens: int, assistant: int, on: bool) -> Generated:
        """See `Engine`."""
        import openvino as ov
        import openvino_genai as genai

        config = genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, ignore_eos=on)
        pipeline = self._drafted if assistant else self._plain
        config.set_eos_token_id(pipeline.get_tokenizer().get_eos_token_id())
        if assistant:
            config.num_assistant_tokens = assistant
        ids = np.array([prompt], np.int64)
        answer = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
        found, times = list(answer.tokens[0]), answer.perf_metrics
        decode_ms = float(times.get_generate_duration().mean - times.get_ttft().mean)
        if not assistant:
            return Generated(found, decode_ms)
        counts = answer.extended_perf_metrics
        proposed, accepted = counts.get_num_draft_tokens(), counts.get_num_accepted_tokens()
        steps = len(counts.main_model_metrics.raw_metrics.m_durations) - 1
        return Generated(found, decode_ms, proposed, accepted, steps, len(found) - 1)


class Onnx:
    """onnxruntime-genai, as the folders are written; it stops at an end token in any case."""

    def __init__(self, main: Path, draft: Path, settings: str) -> None:
        import onnxruntime_genai as genai

        if settings != "default":
            raise SystemExit("an ONNX folder has its settings in it: give --settings default")
        decoder = json.loads((draft / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        decoder["filename"] = f"../{draft.name}/{decoder['filename']}"  # relative to the main network's folder
        config = genai.Config(str(main))
        config.overlay(json.dumps({"model": {"draft": decoder}}))
        self._plain, self._drafted = genai.Model(str(main)), genai.Model(config)

    def generate(self, prompt: list[int], tokens: int, assistant: int, on: bool) -> Generated:
        """See `Engine`."""
        import onnxruntime_genai as genai

        model = self._drafted if assistant else self._plain
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
        if assistant:
            parameters.set_speculative_options(max_draft_tokens=assistant)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        started = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        decode_ms = (time.perf_counter() - started) * 1e3
        found = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        if not assistant:
            return Generated(found, decode_ms)
        stats = generator.get_speculative_stats()
        counts = [int(stats[f"draft_tokens_{name}"]) for name in ("proposed", "accepted")]
        return Generated(found, decode_ms, *counts, int(stats["target_verify_forward_passes"]), len(found))


ENGINES: dict[str, Callable[[Path, Path, str], Engine]] = {"openvino": OpenVino, "onnx": Onnx}
