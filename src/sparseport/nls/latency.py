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
        _require_length(folder, max(prompts) + decode_tokens)
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


def measure_draft_costs(
    main: Path,
    drafts: Sequence[Path],
    *,
    longest: int = 5,
    prompt: int = 64,
    repeats: int = 6,
    rounds: int = 5,
    warm_up: int = 1,
    threads: int = 0,
    precision: Precision = "default",
    clock: Callable[[], float] = time.perf_counter,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure what speculative decoding costs: steps of a main network of 1 to `longest` + 1 tokens, and of its drafts.

    All are loaded at the same time and measured in turns. In a round each reads the prompt, and then steps of 1, 2, 3
    ... tokens, again and again, so that the growing context counts for every length and every network alike.

    Args:
        main: exported folder of the main network.
        drafts: exported folders of drafts, none or more.
        longest: most tokens that a draft says in a round.
        prompt: tokens read before.
        repeats: steps of each length in a round.
        rounds: how often everything is measured.
        warm_up: rounds before those, which do not count.
        threads: threads for each runtime; 0 leaves it to them.
        precision: see `sparseport.nls.engines.Precision`.
        clock: seconds.
        on_step: called after each folder of each round.

    Returns:
        What was asked for; `step_ms`: tokens of a step (as text) -> milliseconds, and `drafts`: for each `path` and
        `step_ms`; each with `median`, `min`, `max`, `samples` and `ratio`, the median over the rounds of its time by
        that of the main network's step of one token: v_k and c of `sparseport.nls.speculation`.

    Raises:
        UsageError: a count below 1 (`warm_up` and `threads`: below 0), or more tokens than a model reads.
        BadInput: a folder is no exported one.
    """
    asked = {"longest": longest, "prompt": prompt, "repeats": repeats, "rounds": rounds, "warm_up": warm_up}
    if min(longest, prompt, repeats, rounds) < 1 or min(warm_up, threads) < 0:
        raise UsageError("nothing to measure: tokens, repeats and rounds are 1 or more", found=asked)
    widths = range(1, longest + 2)
    read = prompt + sum(widths) * repeats
    folders = [main, *drafts]
    for folder in folders:
        _require_length(folder, read)
    runners = [_open(folder, precision, threads, active_adapter(folder, None)) for folder in folders]
    # Per folder and length of a step, milliseconds of one step in each round.
    samples: dict[tuple[int, int], list[float]] = {}
    random = np.random.default_rng(0)
    for number in range(warm_up + rounds):
        for index, runner in enumerate(runners):
            tokens = random.integers(_FIRST_TOKEN, runner.vocabulary, read).tolist()
            for width, seconds in _steps(runner.session, tokens, prompt, [*widths] * repeats, clock).items():
                if number >= warm_up:
                    samples.setdefault((index, width), []).append(seconds * 1e3 / repeats)
            on_step()
    one = samples[0, 1]
    return {
        **asked,
        "threads": threads,
        "precision": precision,
        "settings": runners[0].settings,
        "step_ms": {str(width): _summary(samples[0, width], one) for width in widths},
        "drafts": [
            {"path": str(runner.path), "step_ms": _summary(samples[index, 1], one)}
            for index, runner in enumerate(runners[1:], 1)
        ],
    }


def _steps(
    session: Session, tokens: list[int], prompt: int, lengths: list[int], clock: Callable[[], float]
) -> dict[int, float]:
    """Seconds of all steps of each length, after the prompt."""
    session.reset()
    session.read(tokens[:prompt])
    at, spent = prompt, dict.fromkeys(lengths, 0.0)
    for length in lengths:
        started = clock()
        session.read(tokens[at : at + length])
        spent[length] += clock() - started
        at += length
    return spent


def _require_length(folder: Path, tokens: int) -> None:
    """Refuse more tokens than the model of a folder reads.

    Raises:
        UsageError: names the limit.
    """
    longest = longest_input(read_json(folder / "config.json", what="config.json"))
    if tokens > longest:
        raise UsageError(
            "the model does not read so many tokens", where=folder, expected=f"at most {longest}", found=tokens
        )


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
