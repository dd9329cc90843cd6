"""How long exported folders take on this machine, measured side by side.

Each folder is run by its own runtime directly: no tokenizer, no sampling, only the model and its KV cache. A prefill
hands over the logits of all its positions. Rounds go through the folders in turn, so that what slows the machine down
slows all of them; figures are medians with their range, and ratios are taken within rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.json_files import read_json
from sparseport.errors import UsageError
from sparseport.figures import paired_ratio, summary
from sparseport.nls.adapters import active_adapter
from sparseport.nls.engines import Precision, longest_input, open_session
from sparseport.verify.sessions import Session

# Ids below are most often special tokens.
_FIRST_TOKEN = 10


@dataclass(frozen=True)
class _Runner:
    path: Path
    session: Session
    settings: dict[str, str]
    vocabulary: int
    adapter: str | None


def measure_latency(
    folders: Sequence[Path],
    *,
    prompts: Sequence[int] = (64,),
    decode_tokens: int = 32,
    rounds: int = 5,
    warm_up: int = 1,
    threads: int = 0,
    precision: Precision = "default",
    adapter: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure folders in turns; all of them are loaded at the same time.

    Args:
        folders: exported folders, OpenVINO or ONNX, one or more; ratios are against the first.
        prompts: tokens of each prefill.
        decode_tokens: tokens that are read one at a time after each prefill.
        rounds: how often everything is measured.
        warm_up: rounds before those, which do not count.
        threads: threads for each runtime; 0 leaves it to them.
        precision: see `sparseport.nls.engines.Precision`.
        adapter: file of an adapter, to switch on in each folder, or `none`; None takes the one that a folder has.
        clock: seconds.
        on_step: called after each prefill with its decoding.

    Returns:
        What was asked for, and `folders`: for each `path`, `adapter` (its file, None for none), `settings`, and under
        `prefill_ms` and `decode_ms` (per token) one entry per prompt length (as text) with `median`, `min`, `max`,
        `samples` in milliseconds and `ratio`, the median over the rounds of this folder's time by the first folder's.

    Raises:
        UsageError: a count below 1 (`warm_up` and `threads`: below 0), no folder or prompt, prompts that are too
            long for a model, or an adapter that a folder does not have.
        BadInput: a folder is no exported one.
        Unsupported: an OpenVINO folder with an adapter in a file: export it with the branches in the graph.
    """
    asked = {"prompts": list(prompts), "decode_tokens": decode_tokens, "rounds": rounds, "warm_up": warm_up}
    counts = [*prompts, decode_tokens, rounds]
    if not folders or not prompts or min(counts) < 1 or min(warm_up, threads) < 0:
        raise UsageError("nothing to measure: folders, prompts, tokens and rounds are 1 or more", found=asked)
    for folder in folders:
        longest = longest_input(read_json(folder / "config.json", what="config.json"))
        if max(prompts) + decode_tokens > longest:
            raise UsageError(
                "the model does not read so many tokens",
                where=folder,
                expected=f"at most {longest}",
                found=max(prompts) + decode_tokens,
            )
    adapters = [active_adapter(folder, adapter) for folder in folders]
    runners = [_open(folder, precision, threads, file) for folder, file in zip(folders, adapters, strict=True)]
    prefill: dict[tuple[int, int], list[float]] = {(n, p): [] for n in range(len(runners)) for p in prompts}
    decode: dict[tuple[int, int], list[float]] = {key: [] for key in prefill}
    random = np.random.default_rng(0)
    for number in range(warm_up + rounds):
        for prompt in prompts:
            for index, runner in enumerate(runners):
                tokens = random.integers(_FIRST_TOKEN, runner.vocabulary, prompt + decode_tokens).tolist()
                first, rest = _run(runner.session, tokens, prompt, clock)
                if number >= warm_up:
                    prefill[index, prompt].append(first * 1e3)
                    decode[index, prompt].append(rest * 1e3)
                on_step()
    return {
        **asked,
        "threads": threads,
        "precision": precision,
        "folders": [
            {
                "path": str(runner.path),
                "adapter": runner.adapter,
                "settings": runner.settings,
                **{
                    name: {str(p): _summary(samples[index, p], samples[0, p]) for p in prompts}
                    for name, samples in (("prefill_ms", prefill), ("decode_ms", decode))
                },
            }
            for index, runner in enumerate(runners)
        ],
    }


def _open(folder: Path, precision: Precision, threads: int, adapter: str | None) -> _Runner:
    session, settings = open_session(folder, precision, threads, adapter)
    vocabulary = int(read_json(folder / "config.json", what="config.json")["vocab_size"])
    return _Runner(folder, session, settings, vocabulary, adapter)


def _run(session: Session, tokens: list[int], prompt: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the prefill, and per token after it."""
    session.reset()
    started = clock()
    session.read(tokens[:prompt])
    read = clock()
    for token in tokens[prompt:]:
        session.read([token])
    return read - started, (clock() - read) / (len(tokens) - prompt)


def _summary(samples: list[float], first: list[float]) -> dict[str, Any]:
    return {**summary(samples), "ratio": paired_ratio(samples, first)}
