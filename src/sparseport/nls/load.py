"""Torch models from checkpoint folders: as they are, dequantised, and as super-networks ready to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.dialect import StoredLinears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.peft import CONFIG, AdapterFolder
from sparseport.errors import BadInput
from sparseport.nls.activation import make_elastic, require_runnable
from sparseport.nls.elastic import ElasticLinear, elastic_layers
from sparseport.nls.linears import decoder_linears
from sparseport.nls.space import adapted_modules, search_space
from sparseport.recipe import FinetuneRecipe
from sparseport.sources import SPARSE_FROM
from sparseport.targets.empty_model import config_of, empty_model
from sparseport.weights.linear import Array, QuantizedWeight
from sparseport.weights.mask import mask_of
from sparseport.weights.rounding import dequantize

# Methods whose adapter takes the base's mask, and methods whose base is INT4.
MASKED = ("sparse_peft", "qa_sparse_peft")
QUANTIZED = ("sqft", "qa_sparse_peft")


def load_dense(folder: Path) -> nn.Module:
    """A floating-point checkpoint in float32, ready to evaluate."""
    with ModelFolder.open(folder) as source:
        return filled(source.config, source.read)


def load_int4(folder: Path) -> nn.Module:
    """A quantised checkpoint of any dialect, dequantised to float32 by our own readers."""
    with ModelFolder.open(folder) as source:
        linears = open_linears(source)
        return filled(source.config, lambda name: _dequantized(source, linears, name))


def load_for_training(base: Path, recipe: FinetuneRecipe, quantized: Path | None = None) -> nn.Module:
    """The base model in float32 with elastic adapters in place; everything else is frozen.

    Args:
        base: the model that the adapter is trained on: dense for lora and lonas, sparse for shears, SparsePEFT and
            QA-SparsePEFT, INT4 for sqft.
        recipe: method, target modules, search space.
        quantized: INT4 folder of the same model, for QA-SparsePEFT. Layers without an adapter run with its weights.

    Raises:
        BadInput: inputs that do not fit the method, or a search space that does not fit the model.
        Unsupported: an architecture whose layers cannot be cut as the search space wants.
    """
    if (recipe.method == "qa_sparse_peft") != (quantized is not None):
        raise BadInput(
            "QA-SparsePEFT, and only it, trains on a sparse base and its INT4 base together",
            where=base,
            found=recipe.method,
            fix="give both for qa_sparse_peft; for sqft give the INT4 folder as the base",
        )
    with ModelFolder.open(quantized or base) as folder:
        linears = open_linears(folder)
        _require_form(folder, linears, recipe.method)
        shapes = sketch(base)
        names = adapted_modules(shapes, recipe)
        space = search_space(shapes, recipe)
        model = load_plain(base).requires_grad_(False)
        for name, linear in decoder_linears(model):
            weight = linears.read(name) if quantized is not None else None
            weight = weight if isinstance(weight, QuantizedWeight) else None
            if name in names:
                _adapt(model, name, linear, weight, recipe, names.index(name))
            elif weight is not None:
                linear.weight.data = torch.from_numpy(dequantize(weight))
            folder.release()
    make_elastic(model, space)
    if not all(group.kind == "rank" for group in space.groups):
        require_runnable(model, space)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model


def check_adapter(folder: Path, method: str) -> None:
    """Check that a saved super-adapter was trained with a method's mask and grid; only its config is read.

    Raises:
        BadInput: it was trained for another kind of merge, or the folder is no adapter.
    """
    with AdapterFolder.open(folder) as adapter:
        _require_forward(adapter, masked=method in MASKED, rounded=method == "qa_sparse_peft")


@torch.no_grad()
def restore_adapter(model: nn.Module, folder: Path) -> None:
    """Put a saved super-adapter's weights into a model that `load_for_training` made with the same recipe.

    Raises:
        BadInput: the adapter has other modules, ranks or another scaling than the model, or ran in training with a
            mask or a grid that the model does not have, or without one that it has.
    """
    with AdapterFolder.open(folder) as adapter:
        layers = dict(elastic_layers(model))
        _require_forward(
            adapter,
            masked=any(layer.mask is not None for layer in layers.values()),
            rounded=any(layer.grid is not None for layer in layers.values()),
        )
        if sorted(adapter.modules()) != sorted(layers):
            raise BadInput(
                "the adapter does not have the modules that the recipe adapts",
                where=folder,
                expected=f"{len(layers)} modules",
                found=f"{len(list(adapter.modules()))} modules",
                fix="give the recipe that the adapter was trained with",
                code="E_PAIRING",
            )
        for name, layer in layers.items():
            branch = adapter.branch(name)
            if branch.a.shape != tuple(layer.a.shape) or branch.b.shape != tuple(layer.b.shape):
                raise BadInput(
                    "the adapter's tensors do not have the shapes of the recipe's",
                    where=f"{folder}, {name}",
                    expected=f"A {tuple(layer.a.shape)}, B {tuple(layer.b.shape)}",
                    found=f"A {branch.a.shape}, B {branch.b.shape}",
                    fix="give the recipe that the adapter was trained with",
                    code="E_PAIRING",
                )
            if branch.scaling != layer.scaling:
                raise BadInput(
                    "the adapter was trained with another scaling",
                    where=f"{folder}, {name}",
                    expected=layer.scaling,
                    found=branch.scaling,
                    fix="set alpha and search_space as they were",
                    code="E_PAIRING",
                )
            layer.a.copy_(torch.from_numpy(np.array(branch.a, np.float32)))
            layer.b.copy_(torch.from_numpy(np.array(branch.b, np.float32)))


def _require_forward(adapter: AdapterFolder, *, masked: bool, rounded: bool) -> None:
    """Refuse an adapter whose training forward was another than the one it is put into."""
    for flag, found, wanted in (
        ("sparse_adapter", adapter.sparse_adapter, masked),
        ("quantization_aware", adapter.quantization_aware, rounded),
    ):
        if found != wanted:
            raise BadInput(
                "the adapter was trained with another method than the recipe's",
                where=f"{adapter.path / CONFIG}, {flag}",
                expected=str(wanted).lower(),
                found=str(found).lower(),
                fix="give the recipe that the adapter was trained with",
                code="E_PAIRING",
            )


def sketch(folder: Path) -> nn.Module:
    """The Hugging Face model of a folder's config without weights: modules and shapes."""
    with ModelFolder.open(folder) as source:
        return empty_model(config_of(source.config, str(folder)), dtype="float32")


def filled(settings: dict[str, Any], values: Callable[[str], Array]) -> nn.Module:
    """The Hugging Face model of a config.json in float32, every parameter taken from `values`."""
    model: Any = empty_model(config_of(settings, "config.json"), dtype="float32")
    model.tie_weights()
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        array = torch.from_numpy(values(name).astype(np.float32)).reshape(parameter.shape)
        setattr(model.get_submodule(owner), last, nn.Parameter(array))
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


def load_plain(folder: Path) -> nn.Module:
    """A checkpoint of any kind in float32: transformers' own reading where it knows the files, ours for packed ones."""
    from transformers import AutoModelForCausalLM

    with ModelFolder.open(folder) as source:
        packed = open_linears(source).packed is not None
    if packed:
        return load_int4(folder)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _adapt(
    model: nn.Module, name: str, linear: nn.Linear, weight: QuantizedWeight | None, recipe: FinetuneRecipe, number: int
) -> None:
    """Put an elastic adapter in place of a linear layer; `number` makes its start differ from the others'."""
    mask = mask_of(linear.weight.numpy())
    sparse = 1 - mask.mean() >= SPARSE_FROM
    if sparse if recipe.method in ("lora", "lonas") else (recipe.method == "sparse_peft" and not sparse):
        raise BadInput(
            f"{recipe.method} trains on a {'dense' if sparse else 'sparse'} base and could not be merged here",
            where=name,
            found=f"{1 - mask.mean():.1%} of the weights are zero",
            fix="shears and sparse_peft keep the zeros" if sparse else "give the pruned model, or train with lora",
            code="E_PAIRING",
        )
    elastic = ElasticLinear(
        linear,
        recipe.rank,
        recipe.alpha,
        mask=mask if recipe.method in MASKED else None,
        quantized=weight,
        dropout=recipe.dropout,
        seed=recipe.seed + number,
    )
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, elastic)


def _require_form(folder: ModelFolder, linears: StoredLinears, method: str) -> None:
    """Refuse a base whose layers are not stored as the method trains on them.

    Raises:
        BadInput: an INT4 base is needed and this is none, or the other way round.
    """
    quantized = linears.packed is not None and any(linears.format_of(name).quantized for name in folder.linear_names())
    if quantized == (method in QUANTIZED):
        return
    raise BadInput(
        f"{method} trains on {'an INT4' if method in QUANTIZED else 'a floating-point'} base",
        where=folder.path,
        found="an INT4 model" if quantized else "a floating-point model",
        fix="`sparseport quantize` makes an INT4 base" if method in QUANTIZED else "give the model before quantisation",
        code="E_PAIRING",
    )


def _dequantized(source: ModelFolder, linears: StoredLinears, name: str) -> Array:
    """A parameter by name, as stored or dequantised."""
    module = name.removesuffix(".weight")
    if name != module and linears.packed is not None and linears.packed.holds(module):
        weight = linears.read(module)
        return dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.values
    return source.read(name)
