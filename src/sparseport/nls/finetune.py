"""NLS fine-tuning: train all sub-networks of a super-network at once by sampling one at each step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseport.checkpoints.elastic import ElasticGroup, Selection, save_search_space
from sparseport.checkpoints.peft import write_adapter
from sparseport.errors import BadInput, UsageError
from sparseport.nls.activation import activate
from sparseport.nls.elastic import elastic_layers
from sparseport.nls.encoding import encode_example
from sparseport.nls.linears import leaf
from sparseport.nls.load import MASKED
from sparseport.nls.record import Sample, write_training_record
from sparseport.nls.space import search_space
from sparseport.nls.tasks import Example, Task
from sparseport.nls.team import Team
from sparseport.recipe import FinetuneRecipe

# Label of a position that has no part in the loss (torch.nn.functional.cross_entropy).
_IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Several items packed into one sequence of T tokens, their common prefix stored once.

    ids        int64 [1, T]
    positions  int64 [1, T]; every item goes on where the prefix ends
    visible    float32 [1, 1, T, T], 0 where row i may look at column j, -inf elsewhere
    labels     int64 [1, T], -100 outside the answers
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(part.to(device) for part in (self.ids, self.positions, self.visible, self.labels)))


def train(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    recipe: FinetuneRecipe,
    on_step: Callable[[int, float], None],
    team: Team | None = None,
) -> list[Sample]:
    """Train the adapters in place and return every sub-network that was sampled, with its loss.

    AdamW, linear warm-up, cosine decay to a tenth. For each microbatch one size per group of the search space is drawn
    at random, the same on every process: each size of a group with equal chances, but a block is left out at the
    recipe's `removal_rate` (half of the blocks at every step would leave little to learn from).

    Args:
        model: from `load_for_training`.
        tokenizer: of the base.
        task: its split `train` is used.
        recipe: everything else.
        on_step: called after every step as (step, mean loss).
        team: the processes that train together; this one alone without it.

    Raises:
        BadInput: the loss is not finite.
        UsageError: a microbatch has fewer items than there are processes.
    """
    team = team or Team()
    space = search_space(model, recipe)
    _check_parts(recipe, len(task.train), team.count)
    loss_of = _AnswerLoss(model)
    team.place(model, loss_of)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    dice = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed + team.index)  # dropout; everything that has to be equal comes from the dice
    items = list(task.examples("train"))
    samples: list[Sample] = []
    model.train()
    for step in range(recipe.steps):
        start = step * recipe.batch_size % len(items)
        if start == 0 or start + recipe.batch_size > len(items):
            dice.shuffle(items)
            start = min(start, len(items) - recipe.batch_size) if len(items) >= recipe.batch_size else 0
        now = items[start : start + recipe.batch_size]
        parts = [team.part(now[number :: recipe.microbatches]) for number in range(recipe.microbatches)]
        batches = [make_batch(tokenizer, part).to(team.device) for part in parts]
        counts = team.total(torch.stack([(batch.labels != _IGNORED).sum() for batch in batches]).to(torch.float64))
        sampled, sums = [], []
        for batch in batches:
            sampled.append(tuple(_draw(group, dice, recipe) for group in space.groups))
            activate(model, space, sampled[-1])
            with torch.autocast(team.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                total = loss_of(batch)
            # Gradients are averaged over the processes, and the loss is a mean over the step's tokens.
            (total * (team.count / float(counts.sum()))).backward()
            sums.append(total.detach().to(torch.float64))
        losses = (team.total(torch.stack(sums)) / counts).tolist()
        value = float(sum(loss * float(count) for loss, count in zip(losses, counts, strict=True)) / counts.sum())
        if not math.isfinite(value):
            raise BadInput(
                "the training loss is not finite",
                where=f"step {step}",
                found=value,
                fix="lower learning_rate",
                code="E_NAN",
            )
        team.average(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        samples += [Sample(len(samples) + i, sizes, losses[i]) for i, sizes in enumerate(sampled)]
        on_step(step, value)
    model.eval()
    activate(model, space, Selection())
    return samples


def _draw(group: ElasticGroup, dice: random.Random, recipe: FinetuneRecipe) -> int:
    if group.kind == "block":
        return int(dice.random() >= recipe.removal_rate)
    return dice.choice(group.sizes)


class _AnswerLoss(nn.Module):
    """The training step's forward pass as one module, which is what FSDP needs to gather weights in time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the answers' tokens."""
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()  # type: ignore[operator]
        hidden = decoder(
            input_ids=batch.ids, attention_mask=batch.visible, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        # Only positions that predict an answer token go through the head: the widest matrix of a small model.
        predicting = batch.labels[:, 1:] != _IGNORED
        logits = head(hidden[:, :-1][predicting])
        return nn.functional.cross_entropy(logits.float(), batch.labels[:, 1:][predicting], reduction="sum")


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answers' tokens."""
    total: Tensor = _AnswerLoss(model)(batch)
    return total / (batch.labels != _IGNORED).sum()


def make_batch(tokenizer: Any, items: list[Example]) -> Batch:
    """Prompts with their answers in one sequence.

    Every chat prompt starts with the same system message; as a prefix that all items look at, it is computed once per
    step instead of once per item, and there is no padding. The result is that of separate rows.
    """
    rows, starts = [], []
    for item in items:
        prompt, answer = encode_example(tokenizer, item)
        rows.append([*prompt, *answer])
        starts.append(len(prompt))
    # The last token before an answer predicts it, so it has to stay in the item's own part.
    shared = min(_common_prefix(rows), min(starts) - 1)
    ids, positions, labels, segments = list(rows[0][:shared]), list(range(shared)), [_IGNORED] * shared, [0] * shared
    for number, (row, start) in enumerate(zip(rows, starts, strict=True), 1):
        ids += row[shared:]
        positions += range(shared, len(row))
        labels += [_IGNORED] * (start - shared) + row[start:]
        segments += [number] * (len(row) - shared)
    segment = torch.tensor(segments)
    order = torch.arange(len(ids))
    allowed = ((segment[None] == segment[:, None]) | (segment[None] == 0)) & (order[None] <= order[:, None])
    visible = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
    return Batch(torch.tensor([ids]), torch.tensor([positions]), visible[None, None], torch.tensor([labels]))


def _common_prefix(rows: list[list[int]]) -> int:
    length = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def save_adapter(
    model: nn.Module,
    recipe: FinetuneRecipe,
    base_model_name: str,
    out_dir: Path,
    samples: Sequence[Sample] = (),
    team: Team | None = None,
) -> None:
    """Write the super-adapter: adapter_config.json and weights as PEFT does, its search space, its training record.

    Without NLS there is no search space and no record. Every process of a team has to call this; one of them writes.
    """
    team = team or Team()
    branches = {name: layer.branch(team.gathered) for name, layer in elastic_layers(model)}
    if not team.main:
        return
    write_adapter(
        out_dir,
        branches,
        r=recipe.rank,
        alpha=recipe.alpha,
        target_modules=sorted({leaf(name) for name in branches}),
        base_model_name=base_model_name,
        sparse_adapter=recipe.method in MASKED,
        quantization_aware=recipe.method == "qa_sparse_peft",
        dropout=recipe.dropout,
    )
    space = search_space(model, recipe)
    if space.groups:
        save_search_space(out_dir, space.groups)
        if samples:
            write_training_record(out_dir, space, samples)


def _check_parts(recipe: FinetuneRecipe, items: int, processes: int) -> None:
    smallest = min(recipe.batch_size, items) // recipe.microbatches
    if smallest < processes:
        raise UsageError(
            "a microbatch has fewer items than there are processes",
            where="finetune.batch_size",
            expected=f"at least {processes * recipe.microbatches}, and as many items in the task",
            found=f"{recipe.batch_size} of {items} items in {recipe.microbatches} microbatches",
            fix="raise batch_size, or lower microbatches or the number of processes",
        )


def _rate(step: int, recipe: FinetuneRecipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
