"""NLS fine-tuning: train all sub-adapters at once by sampling one rank per decoder layer and step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseport.checkpoints.elastic import FILE_NAME as ELASTIC_FILE
from sparseport.checkpoints.elastic import ElasticGroup, write_search_space
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import read_gptq_linear, read_quantization_config
from sparseport.checkpoints.peft import write_adapter
from sparseport.errors import BadInput
from sparseport.nls.elastic import ElasticLinear, elastic_layers, set_ranks
from sparseport.nls.encoding import prompt_ids
from sparseport.nls.linears import decoder_layers, layer_linears
from sparseport.nls.tasks import Example, Task
from sparseport.recipe import FinetuneRecipe
from sparseport.weights.mask import mask_of
from sparseport.weights.rounding import dequantize

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


def load_for_training(base: Path, recipe: FinetuneRecipe, quantized: Path | None) -> nn.Module:
    """The base model in float32 with elastic adapters in place; everything else is frozen.

    Args:
        base: floating-point model, sparse for SparsePEFT and QA-SparsePEFT.
        recipe: method, target modules, ranks.
        quantized: GPTQ folder of the same model, for QA-SparsePEFT. Layers without an adapter run with its weights.

    Raises:
        BadInput: QA-SparsePEFT without an INT4 base, or a target module that the model does not have.
    """
    from transformers import AutoModelForCausalLM

    if (recipe.method == "qa_sparse_peft") != (quantized is not None):
        raise BadInput("QA-SparsePEFT, and only it, trains on an INT4 base", where=base, found=recipe.method)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    prefix, layers = decoder_layers(model)
    with ModelFolder.open(quantized or base) as folder:
        gptq = read_quantization_config(folder) if quantized else None
        adapted = 0
        for index, layer in enumerate(layers):
            for name, linear in layer_linears(layer, f"{prefix}.{index}").items():
                weight = None if gptq is None else read_gptq_linear(folder, name, gptq)
                if name.rpartition(".")[2] not in recipe.target_modules:
                    if weight is not None:
                        linear.weight.data = torch.from_numpy(dequantize(weight))
                    continue
                mask = None if recipe.method == "lora" else mask_of(linear.weight.numpy())
                elastic = ElasticLinear(
                    linear,
                    recipe.search_space[0],
                    recipe.alpha,
                    mask=mask,
                    quantized=weight,
                    dropout=recipe.dropout,
                    seed=recipe.seed + adapted,
                )
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, elastic)
                adapted += 1
    if not adapted:
        raise BadInput(
            "the model has none of the target modules", where=base, expected=", ".join(recipe.target_modules)
        )
    return model


def search_space(model: nn.Module, recipe: FinetuneRecipe) -> list[ElasticGroup]:
    """One group per decoder layer: its elastic modules share a rank (SQFT's `share_rank_within_layer`)."""
    prefix, layers = decoder_layers(model)
    groups = []
    for index in range(len(layers)):
        names = tuple(
            name
            for name, _ in elastic_layers(model)
            if name.startswith(f"{prefix}.{index}.") and name.rpartition(".")[2] in recipe.elastic_modules
        )
        if names:
            groups.append(ElasticGroup(names, recipe.search_space))
    return groups


def train(
    model: nn.Module, tokenizer: Any, task: Task, recipe: FinetuneRecipe, on_step: Callable[[int, float], None]
) -> list[float]:
    """Train the adapters in place and return the loss of every step.

    AdamW, linear warm-up, cosine decay to a tenth; one rank per layer is sampled at each step.

    Raises:
        BadInput: the loss is not finite.
    """
    groups = search_space(model, recipe)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    dice = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    items = list(task.train)
    losses: list[float] = []
    model.train()
    for step in range(recipe.steps):
        start = step * recipe.batch_size % len(items)
        if start == 0 or start + recipe.batch_size > len(items):
            dice.shuffle(items)
            start = min(start, len(items) - recipe.batch_size) if len(items) >= recipe.batch_size else 0
        set_ranks(
            model, {name: rank for group in groups for rank in [dice.choice(group.sizes)] for name in group.targets}
        )
        loss = batch_loss(model, make_batch(tokenizer, items[start : start + recipe.batch_size]))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise BadInput(
                "the training loss is not finite",
                where=f"step {step}",
                found=value,
                fix="lower learning_rate",
                code="E_NAN",
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(value)
        on_step(step, value)
    model.eval()
    set_ranks(model, {})
    return losses


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answers' tokens.

    Only positions that predict an answer token go through the head: it is the widest matrix of a small model.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    hidden = decoder(
        input_ids=batch.ids, attention_mask=batch.visible, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    predicting = batch.labels[:, 1:] != _IGNORED
    logits = head(hidden[:, :-1][predicting])
    return nn.functional.cross_entropy(logits, batch.labels[:, 1:][predicting])


def make_batch(tokenizer: Any, items: list[Example]) -> Batch:
    """Chat prompts with their answers in one sequence.

    Every chat prompt starts with the same system message; as a prefix that all items look at, it is computed once per
    step instead of once per item, and there is no padding. The result is that of separate rows.
    """
    rows, starts = [], []
    for item in items:
        prompt = prompt_ids(tokenizer, item.prompt)
        rows.append(prompt + [*tokenizer(item.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
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


def save_adapter(model: nn.Module, recipe: FinetuneRecipe, base_model_name: str, out_dir: Path) -> None:
    """Write the super-adapter in the reference's files: adapter_config.json, weights, elastic_adapter_config.json."""
    write_adapter(
        out_dir,
        {name: layer.branch() for name, layer in elastic_layers(model)},
        r=recipe.search_space[0],
        alpha=recipe.alpha,
        target_modules=sorted(recipe.target_modules),
        base_model_name=base_model_name,
        sparse_adapter=recipe.method != "lora",
        quantization_aware=recipe.method == "qa_sparse_peft",
        dropout=recipe.dropout,
    )
    groups = search_space(model, recipe)
    if groups:
        write_search_space(out_dir / ELASTIC_FILE, groups)


def _rate(step: int, recipe: FinetuneRecipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
