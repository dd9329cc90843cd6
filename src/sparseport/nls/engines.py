"""Log-likelihoods of continuations, by torch, OpenVINO and ONNX Runtime: one interface, the context read once.

Each engine reads a context and then all of its continuations from there. torch does so for several contexts at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.layers import longest_stated
from sparseport.errors import BadInput
from sparseport.nls.adapters import no_switch
from sparseport.verify.runs import OPENVINO_FULL_PRECISION, exact_level, open_onnx
from sparseport.verify.sessions import F32, OpenVinoSession, Session

Precision = Literal["default", "full"]
"""`default`: as applications run a folder; `full`: float32, nothing about activations or KV cache quantised."""

# What lm-evaluation-harness takes for a config that does not say.
_DEFAULT_LENGTH = 2048
# Continuations that go through a torch model at once. They differ in length more than contexts do, and filling costs as
# much as tokens; a call costs too, most of all where layers are merged in the forward pass.
_ROWS = 16


@dataclass(frozen=True)
class Group:
    """A context of one token or more, and what may follow it, each of one token or more."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation in nats, and whether a greedy answer would have been it."""

    loglikelihood: float
    greedy: bool


class Engine(Protocol):
    """Something that runs a language model.

    max_length  tokens that it reads at most
    settings    what was set, by name
    """

    max_length: int
    settings: Mapping[str, str]

    def score(self, groups: Sequence[Group], on_group: Callable[[], None] = lambda: None) -> list[list[Score]]:
        """Scores of every group's continuations, in the order given."""


class TorchEngine:
    """A causal language model of transformers, in the precision that its weights have.

    Args:
        model: with `config` and a forward that returns `logits` and a cache.
        batch: groups read at once; which ones are read together changes the last bits of a score.
    """

    def __init__(self, model: nn.Module, batch: int = 32) -> None:
        self.model = model
        self.max_length = longest_input(model.config.to_dict())
        self.settings: Mapping[str, str] = {}
        self._batch = batch

    @torch.no_grad()
    def score(self, groups: Sequence[Group], on_group: Callable[[], None] = lambda: None) -> list[list[Score]]:
        """See `Engine`. A model in training mode is put back into it."""
        training = self.model.training
        self.model.eval()
        # Contexts of about the same length share a batch, so that little of it is filling.
        order = sorted(range(len(groups)), key=lambda index: len(groups[index].context))
        scores: list[list[Score]] = [[] for _ in groups]
        for start in range(0, len(order), self._batch):
            chosen = order[start : start + self._batch]
            for index, found in zip(chosen, self._together([groups[index] for index in chosen]), strict=True):
                scores[index] = found
                on_group()
        self.model.train(training)
        return scores

    def _together(self, groups: list[Group]) -> list[list[Score]]:
        """Contexts without their last token, filled up on the left; then the rest, filled up on the right."""
        # The last token of a context predicts the first of a continuation, so it belongs to what comes after the cache.
        contexts = [list(group.context[:-1]) for group in groups]
        width = max(map(len, contexts))
        read = self._tensor([[0] * (width - len(row)) + [1] * len(row) for row in contexts])
        cache = None
        if width:
            ids = self._tensor([[0] * (width - len(row)) + row for row in contexts])
            positions = (read.cumsum(1) - 1).clamp(min=0)
            cache = self._forward(ids, read, positions, use_cache=True, logits_to_keep=1).past_key_values
        rows = [
            (owner, number, [group.context[-1], *tokens])
            for owner, group in enumerate(groups)
            for number, tokens in enumerate(group.continuations)
        ]
        rows.sort(key=lambda row: len(row[2]))
        scores: dict[tuple[int, int], Score] = {}
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            logits = self._after(cache, read, [len(contexts[owner]) for owner, _, _ in chunk], chunk)
            for (owner, number, row), found in zip(chunk, logits, strict=True):
                scores[owner, number] = _score_torch(found[: len(row) - 1].float(), row[1:])
        return [[scores[owner, number] for number in range(len(g.continuations))] for owner, g in enumerate(groups)]

    def _after(self, cache: Any, read: Tensor, starts: list[int], rows: list[tuple[int, int, list[int]]]) -> Tensor:
        """Logits [rows, longest - 1, vocabulary] of rows (owner, number, tokens) after what their owners have read."""
        owners = self._tensor([owner for owner, _, _ in rows])
        longest = max(len(tokens) for _, _, tokens in rows) - 1
        ids = self._tensor([tokens[:-1] + [0] * (longest + 1 - len(tokens)) for _, _, tokens in rows])
        own = self._tensor([[1] * (len(tokens) - 1) + [0] * (longest + 1 - len(tokens)) for _, _, tokens in rows])
        positions = self._tensor(starts)[:, None] + torch.arange(longest, device=own.device)
        if cache is not None:
            cache = copy.deepcopy(cache)  # the next rows go on from it as well
            cache.batch_select_indices(owners)
        mask = torch.cat([read[owners], own], dim=1)
        answer = self._forward(ids, mask, positions, past_key_values=cache, use_cache=cache is not None)
        logits: Tensor = answer.logits
        return logits

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=next(self.model.parameters()).device)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)


class SessionEngine:
    """An exported folder in its runtime, compiled once."""

    def __init__(self, session: Session, max_length: int, settings: Mapping[str, str]) -> None:
        self.max_length = max_length
        self.settings = settings
        self._session = session

    def score(self, groups: Sequence[Group], on_group: Callable[[], None] = lambda: None) -> list[list[Score]]:
        """See `Engine`."""
        scores = []
        for group in groups:
            self._session.reset()
            if len(group.context) > 1:
                self._session.read(group.context[:-1])
            rows = [[group.context[-1], *tokens] for tokens in group.continuations]
            logits = self._session.fork([row[:-1] for row in rows])
            scores.append([score_of(found, row[1:]) for found, row in zip(logits, rows, strict=True)])
            on_group()
        return scores


def session_engine(folder: Path, precision: Precision = "default", adapter: str | None = None) -> SessionEngine:
    """An exported folder in the runtime that it was exported for; see `open_session`."""
    session, settings = open_session(folder, precision, adapter=adapter)
    return SessionEngine(session, folder_length(folder), settings)


def open_session(
    folder: Path, precision: Precision = "default", threads: int = 0, adapter: str | None = None
) -> tuple[Session, dict[str, str]]:
    """An exported folder on the CPU, ready to read tokens, and what was set for it.

    Args:
        folder: an OpenVINO or ONNX folder.
        precision: see `Precision`.
        threads: threads to compute with; 0 leaves it to the runtime.
        adapter: file of an adapter in the folder, to switch on.

    Raises:
        BadInput: it is neither.
        Unsupported: an adapter for OpenVINO, which cannot switch it on without its GenAI.
    """
    if (folder / "openvino_model.xml").is_file():
        if adapter is not None:
            raise no_switch(folder, adapter)
        import openvino as ov

        settings = dict(OPENVINO_FULL_PRECISION) if precision == "full" else {}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        core = ov.Core()
        compiled = core.compile_model(core.read_model(folder / "openvino_model.xml"), "CPU", settings)
        return OpenVinoSession(compiled), settings
    if (folder / "model.onnx").is_file():
        level = exact_level(folder) if precision == "full" else None
        settings = {} if level is None else {"accuracy_level": str(level)}
        if threads:
            settings["intra_op_num_threads"] = str(threads)
        return open_onnx(folder, level, threads, None if adapter is None else folder / adapter), settings
    raise BadInput("no exported folder", where=folder, expected="openvino_model.xml or model.onnx", code="E_MISSING")


def score_of(logits: F32, tokens: Sequence[int]) -> Score:
    """The score of tokens [n] under the logits [n, vocabulary] that predict them; the softmax is in float64."""
    values = logits.astype(np.float64)
    largest = values.max(axis=1)
    norm = largest + np.log(np.exp(values - largest[:, None]).sum(axis=1))
    chosen = values[np.arange(len(tokens)), list(tokens)]
    return Score(float((chosen - norm).sum()), bool((values.argmax(axis=1) == tokens).all()))


def _score_torch(logits: Tensor, tokens: Sequence[int]) -> Score:
    wanted = torch.tensor(tokens, device=logits.device)
    chosen = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1)
    return Score(float(chosen.double().sum()), bool((logits.argmax(dim=1) == wanted).all()))


def folder_length(folder: Path) -> int:
    """`longest_input` of a folder's config.json."""
    return longest_input(read_json(folder / "config.json", what="config.json"))


def longest_input(config: Mapping[str, Any]) -> int:
    """Tokens that a model reads at most, by its config; 2048 if that does not say (lm-evaluation-harness' default)."""
    length = longest_stated(config)
    return _DEFAULT_LENGTH if length is None else length
