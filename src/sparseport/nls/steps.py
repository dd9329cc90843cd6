"""The three steps that make a super-adapter and its base, each from folders to a folder: prune, quantise, fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput
from sparseport.nls.artifacts import write_gptq_base, write_sparse_base
from sparseport.nls.calibration import calibration_batches
from sparseport.nls.encoding import prompt_text
from sparseport.nls.finetune import save_adapter, train
from sparseport.nls.importance import MAGNITUDE
from sparseport.nls.linears import decoder_linears
from sparseport.nls.load import load_for_training, load_plain
from sparseport.nls.quantize import quantize_model
from sparseport.nls.tasks import Task
from sparseport.nls.team import Team
from sparseport.nls.wanda import prune_model
from sparseport.progress import Progress
from sparseport.recipe import FinetuneRecipe, QuantizeRecipe, SparsifyRecipe
from sparseport.training_recipe import CalibrationRecipe
from sparseport.weights.mask import mask_of

# Prompts of a task that calibration takes beside the package's own sentences.
_TASK_PROMPTS = 128


def make_sparse(base: Path, recipe: SparsifyRecipe, out: Path, progress: Progress, task: Task | None = None) -> None:
    """Prune a floating-point model and write it, in the base's dtype, with every pruned weight exactly 0.

    Args:
        base: the dense model, with its tokenizer.
        recipe: how much, in which pattern, by which metric.
        out: folder to fill.
        progress: where to report.
        task: its prompts are calibrated on too.

    Raises:
        BadInput, Unsupported: see `prune_model`, or the calibration text is missing or too short.
    """
    model = load_plain(base).eval().to(Team().device)
    batches = None if recipe.metric == MAGNITUDE else calibration(base, recipe, task)
    total = sum(1 for _ in decoder_linears(model))
    with progress.task(f"pruning ({recipe.metric})", total) as step:
        masks = prune_model(
            model,
            batches,
            sparsity=recipe.sparsity,
            pattern=recipe.pattern,
            metric=recipe.metric,
            on_progress=lambda *_: step(),
        )
    with ModelFolder.open(base) as folder:
        write_sparse_base(folder, masks, out)


def make_int4(base: Path, recipe: QuantizeRecipe, out: Path, progress: Progress, task: Task | None = None) -> None:
    """Quantise a floating-point model, sparse or dense, to a GPTQ folder in which every zero stays zero.

    Args:
        base: the model, with its tokenizer.
        recipe: method and grid.
        out: folder to fill.
        progress: where to report.
        task: its prompts are calibrated on too (gptq).

    Raises:
        BadInput: see `quantize_model`, or the calibration text is missing or too short.
    """
    model = load_plain(base).eval().to(Team().device)
    batches = calibration(base, recipe, task) if recipe.method == "gptq" else None
    names = [name for name, _ in decoder_linears(model)]
    with ModelFolder.open(base) as folder, progress.task(f"quantising (INT4, {recipe.method})", len(names)) as step:
        weights = quantize_model(
            model,
            {name: mask_of(folder.read(f"{name}.weight")) for name in names},
            recipe.method,
            batches,
            group_size=recipe.group_size,
            symmetric=recipe.symmetric,
            on_progress=lambda *_: step(),
        )
        write_gptq_base(folder, weights, out, group_size=recipe.group_size, symmetric=recipe.symmetric)


def make_adapter(
    base: Path,
    quantized: Path | None,
    recipe: FinetuneRecipe,
    task: Task,
    out: Path,
    progress: Progress,
    team: Team | None = None,
) -> dict[str, Any]:
    """Fine-tune a super-adapter and write it.

    Args:
        base: what the adapter is trained on, see `load_for_training`; with its tokenizer.
        quantized: its INT4 form, for QA-SparsePEFT.
        recipe: how.
        task: what on.
        out: folder to fill; only the team's main process does.
        progress: where to report.
        team: the processes that train together.

    Returns:
        steps, groups of the search space, trained parameters, processes, and the loss at the beginning and at the end.

    Raises:
        BadInput, Unsupported, UsageError: see `load_for_training` and `train`.
    """
    from transformers import AutoTokenizer

    from sparseport.nls.elastic import elastic_layers
    from sparseport.nls.space import search_space

    model = load_for_training(base, recipe, quantized)
    layers = [layer for _, layer in elastic_layers(model)]
    parameters = sum(layer.a.numel() + layer.b.numel() for layer in layers)
    with progress.task(f"fine-tuning ({'NLS' if recipe.nls else 'LoRA'})", recipe.steps) as step:
        samples = train(model, AutoTokenizer.from_pretrained(base), task, recipe, lambda *_: step(), team)
    save_adapter(model, recipe, base.name, out, samples, team)
    losses = [sample.loss for sample in samples]
    return {
        "steps": recipe.steps,
        "groups": len(search_space(model, recipe).groups),
        "parameters": parameters,
        "processes": 1 if team is None else team.count,
        "first_loss": losses[0],
        "last_loss": sum(losses[-5:]) / len(losses[-5:]),
    }


def calibration(folder: Path, recipe: CalibrationRecipe, task: Task | None) -> list[Any]:
    """Calibration windows: from the recipe's file, or the package's own sentences and the task's prompts.

    Raises:
        BadInput: the file cannot be read, or there is too little text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = Path(__file__).parent / "calibration.txt"
    path = recipe.calibration or own
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            "cannot read the calibration text", where=path, found=str(error), code="E_CALIBRATION"
        ) from error
    if task is not None and recipe.calibration is None:
        texts += [prompt_text(tokenizer, item) for item in task.examples("train")[:_TASK_PROMPTS]]
    return calibration_batches(tokenizer, texts, samples=recipe.samples, sequence_length=recipe.sequence_length, seed=0)
