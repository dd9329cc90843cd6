"""What a draft would say at each token of its main network's answers: in torch, and in an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from sparseport.verify.sessions import Session

# Answers that are read at once; the logits of all their positions are there at the same time.
_BATCH = 8


@torch.no_grad()
def agreements_torch(
    model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[list[bool]]:
    """For each token of each answer but the first, whether the model would have chosen it there (greedy).

    Args:
        model: the draft, a causal language model of transformers.
        prompts: token ids, one or more in each.
        answers: token ids of the main network's greedy answers.
    """
    device = next(model.parameters()).device
    found: list[list[bool]] = []
    for start in range(0, len(prompts), _BATCH):
        batch = list(zip(prompts[start : start + _BATCH], answers[start : start + _BATCH], strict=True))
        rows = [[*prompt, *answer] for prompt, answer in batch]
        width = max(map(len, rows))
        # Filled up on the right, where causal attention keeps the filling from what counts.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        chosen = model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
        for (prompt, answer), said in zip(batch, chosen, strict=True):
            found.append(_equal(said[len(prompt) - 1 :], answer))
    return found


def agreements_of(
    session: Session,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    on_answer: Callable[[], None] = lambda: None,
) -> list[list[bool]]:
    """The same in a runtime: `session` has the draft."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        session.reset()
        logits = session.read([*prompt, *answer])
        found.append(_equal(np.argmax(logits, axis=-1)[len(prompt) - 1 :].tolist(), answer))
        on_answer()
    return found


def _equal(said: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """`said` begins at the place of the answer's first token, which comes of reading the prompt."""
    return [one == other for one, other in zip(said[1:], answer[1:], strict=False)]
