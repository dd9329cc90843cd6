"""The inputs of one export, opened together and checked against each other; weights are read one at a time."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.dialect import LayerFormat, StoredLinears
from sparseport.checkpoints.elastic import Selection
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.nncf_fq import CHECKPOINT as NNCF_CHECKPOINT
from sparseport.checkpoints.nncf_fq import NncfCheckpoint
from sparseport.checkpoints.paths import file_sha256
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.checkpoints.sub_config import cut_config
from sparseport.child import Child
from sparseport.errors import BadInput
from sparseport.merge.subnetwork import SubNetwork, cut_small, sub_network
from sparseport.recipe import Recipe
from sparseport.selection import chosen_sub_network, nls_ranks
from sparseport.weights.linear import Array, DenseWeight, LowRankBranch, Mask, QuantizedWeight
from sparseport.weights.mask import mask_of

# A trained floating-point layer has next to no exact zeros; a layer above this share was pruned.
SPARSE_FROM = 0.05


@dataclass
class Sources:
    """Open input folders.

    base            the model to export: dense, sparse, or INT4 in any dialect
    linears         its linear layers
    sparse          the sparse floating-point base that an INT4 base was made from, or None
    sparse_linears  its linear layers, or None
    adapter         the fine-tuned adapter, or None
    tuned           the NNCF FQ_LORA checkpoint, or None
    extra_files     files beside the folders that have a say in the result: role -> path
    ranks           module -> active rank of the chosen sub-adapter; modules outside the search space keep their rank
    cut             what the chosen sub-network leaves of the base, or None for all of it
    """

    base: ModelFolder
    linears: StoredLinears
    sparse: ModelFolder | None
    sparse_linears: StoredLinears | None
    adapter: AdapterFolder | None
    tuned: NncfCheckpoint | None
    ranks: dict[str, int]
    cut: SubNetwork | None
    extra_files: dict[str, Path]
    _stack: ExitStack

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def format_of(self, module: str) -> LayerFormat:
        """How the base stores a layer."""
        return self.linears.format_of(module)

    def quantized(self, module: str) -> QuantizedWeight:
        """The base's INT4 weight of a module, without a mask.

        Raises:
            BadInput: the layer is damaged, or not quantised.
        """
        weight = self.linears.read(module)
        if not isinstance(weight, QuantizedWeight):
            raise BadInput("layer is not quantised", where=f"{self.base.path}, {module}", code="E_PAIRING")
        return weight

    def dense(self, module: str, rule: str = "carry") -> DenseWeight:
        """The base's floating-point weight of a module with its mask.

        The mask is that of the sparse base, if one was given; else the one that is stored with the weight (bitmask
        layouts). Otherwise it is the base's own zeros: always for `sparse_peft`, as in training, and for other rules if
        the layer is sparse at all.

        Raises:
            BadInput: the layer is damaged, or quantised.
        """
        weight = self.linears.read(module)
        if not isinstance(weight, DenseWeight):
            raise BadInput("layer is quantised", where=f"{self.base.path}, {module}", code="E_PAIRING")
        mask = self.mask(module)
        mask = weight.mask if mask is None else mask
        if mask is None:
            own = mask_of(weight.values)
            mask = own if rule == "sparse_peft" or own.mean() <= 1 - SPARSE_FROM else None
        return DenseWeight(weight.values, mask)

    def sparse_dense(self, module: str) -> DenseWeight:
        """The sparse base's weight of a module with its mask.

        Raises:
            BadInput: no sparse base was given, or it does not have this module.
        """
        if self.sparse_linears is None:
            raise BadInput("this layer needs the sparse base", where=module, fix="give --sparse-base DIR")
        weight = self.sparse_linears.read(module)
        assert isinstance(weight, DenseWeight), "the sparse base was checked to be in floating point"
        return weight if weight.mask is not None else DenseWeight(weight.values, mask_of(weight.values))

    def mask_available(self, module: str) -> bool:
        """Whether a sparse base was given and holds this module."""
        return self.sparse_linears is not None and self.sparse_linears.has(module)

    def mask(self, module: str) -> Mask | None:
        """The mask from the sparse base that was given, or None."""
        return self.sparse_dense(module).mask if self.mask_available(module) else None

    def branch(self, module: str) -> LowRankBranch:
        """The chosen sub-adapter's low-rank branch of a module."""
        assert self.adapter is not None
        branch = self.adapter.branch(module)
        rank = self.ranks.get(module)
        return branch if rank is None or rank == branch.rank else branch.at_rank(rank)

    @property
    def elastic(self) -> bool:
        """Whether a search space stands beside the adapter or was given, so that there was something to choose."""
        given = self.extra_files.get("search_space")
        return given is not None or (self.adapter is not None and self.adapter.search_space_file() is not None)

    def adapter_modules(self) -> set[str]:
        """Modules that the adapter or the NNCF checkpoint changes."""
        return {module for tool in (self.adapter, self.tuned) if tool is not None for module in tool.modules()}

    def rank_of(self, module: str) -> int | None:
        """Active rank of a module's low-rank update; None where it has none."""
        trained = {**(self.adapter.ranks() if self.adapter else {}), **(self.tuned.ranks() if self.tuned else {})}
        return self.ranks.get(module, trained.get(module))

    def written_name(self, name: str) -> str | None:
        """Name of a module or tensor in what is written; None if the chosen sub-network leaves it out."""
        return name if self.cut is None else self.cut.name(name)

    def small_tensors(self) -> dict[str, Array]:
        """Norms, biases and the like, by written name, as far as the chosen sub-network keeps them.

        Every tensor of fewer than two dimensions that is no part of a packed layer.

        Raises:
            Unsupported: a sub-network cuts a layer that one of them runs along.
        """
        parts = self.linears.part_names()
        found: dict[str, Array] = {}
        for name in self.base.names():
            written = self.written_name(name)
            if written is None or name in parts or len(self.base.info(name).shape) >= 2:
                continue
            values = self.base.read(name)
            found[written] = values if self.cut is None else cut_small(name, values, self.cut)
        return found

    def written_config(self) -> dict[str, Any]:
        """The config.json of what is written: that of the base, or of the chosen sub-network.

        Raises:
            Unsupported: see `cut_config`.
        """
        if self.cut is None:
            return self.base.config
        before, after = {}, {}
        for module in self.linears.folder.linear_names():
            written = self.cut.name(module)
            if written is not None:
                before[written] = self.format_of(module).shape
                after[written] = self.cut.shape(module, before[written])
        return cut_config(self.base.config, self.cut.blocks, before, after)

    def release(self) -> None:
        """Give the memory of weights read so far back to the system."""
        for folder in (self.base, self.sparse, self.adapter, self.tuned):
            if folder is not None:
                folder.release()

    def facts(self) -> dict[str, Any]:
        """SHA-256 of every input file, by role, for the certificate."""
        roles = {"base": self.base, "sparse_base": self.sparse, "adapter": self.adapter, "nncf": self.tuned}
        found = {role: folder.sha256() for role, folder in roles.items() if folder is not None}
        for role, path in self.extra_files.items():
            # A converted base is known by the file that the user gave, not by what it was converted to.
            found[role] = {path.name: file_sha256(path)}
        return found


def open_sources(recipe: Recipe) -> Sources:
    """Open every input that a recipe names and check that they belong together.

    Raises:
        BadInput: an input is missing or damaged, or does not fit the others.
        Unsupported: an input is of a kind that cannot be carried exactly.
    """
    stack = ExitStack()
    try:
        extra: dict[str, Path] = {}
        folder = recipe.base
        notes: list[str] = []
        if recipe.base.suffix == ".gguf" and recipe.base.is_file():
            extra["base"] = recipe.base
            folder, notes = _converted(recipe, stack)
        base = stack.enter_context(
            ModelFolder.open(folder, allow_pickle=recipe.allow_pickle, ignore_extra=recipe.ignore_extra)
        )
        base.warnings.extend(notes)
        base.check_layers()
        linears = open_linears(base, gptq_zeros=recipe.gptq_zeros)
        sparse, sparse_linears = None, None
        if recipe.sparse_base is not None:
            options = {"allow_pickle": recipe.allow_pickle, "ignore_extra": recipe.ignore_extra}
            sparse = stack.enter_context(ModelFolder.open(recipe.sparse_base, **options))
            sparse.check_layers()
            sparse_linears = open_linears(sparse)
            _check_same_shape(base, sparse)
            _check_layers_fit(linears, sparse_linears)
        adapter, tuned = None, None
        ranks: dict[str, int] = {}
        cut: SubNetwork | None = None
        if recipe.adapter is not None and is_nncf_checkpoint(recipe.adapter):
            tuned = stack.enter_context(NncfCheckpoint.open(recipe.adapter, allow_pickle=recipe.allow_pickle))
            tuned.check_base(base)
            ranks = nls_ranks(tuned, recipe, extra)
        elif recipe.adapter is not None:
            adapter = stack.enter_context(AdapterFolder.open(recipe.adapter, allow_pickle=recipe.allow_pickle))
            adapter.check_base(base)
            _check_adapter_shapes(adapter, linears)
        if tuned is None:
            selection = chosen_sub_network(adapter, recipe, linears, extra)
            ranks, cut = selection.ranks, _cut(selection, linears)
        return Sources(base, linears, sparse, sparse_linears, adapter, tuned, ranks, cut, extra, stack)
    except BaseException:
        stack.close()
        raise


def other_sub_network(sources: Sources, recipe: Recipe) -> Sources:
    """The same open inputs with the sub-network that another recipe chooses; they stay open as long as the first.

    Raises:
        BadInput, Unsupported: see `open_sources`.
    """
    extra = {role: path for role, path in sources.extra_files.items() if role == "base"}
    if sources.tuned is not None:
        return replace(sources, ranks=nls_ranks(sources.tuned, recipe, extra), extra_files=extra, _stack=ExitStack())
    selection = chosen_sub_network(sources.adapter, recipe, sources.linears, extra)
    cut = _cut(selection, sources.linears)
    return replace(sources, ranks=selection.ranks, cut=cut, extra_files=extra, _stack=ExitStack())


def _cut(selection: Selection, linears: StoredLinears) -> SubNetwork | None:
    """What the selection leaves of the model; the head is no part of it.

    Raises:
        BadInput, Unsupported: see `sub_network`.
    """
    if selection.whole:
        return None
    folder = linears.folder
    shapes = {name: linears.format_of(name).shape for name in folder.linear_names() if name != folder.head_name}
    return sub_network(selection, shapes, folder.config, str(folder.path))


def is_nncf_checkpoint(path: Path) -> bool:
    """Whether a path is NNCF's training output: the pickle itself, its folder, or the folder above."""
    if path.is_dir():
        return any((folder / NNCF_CHECKPOINT).is_file() for folder in (path, path / "last"))
    return path.suffix in (".pth", ".pt")


def _check_same_shape(base: ModelFolder, sparse: ModelFolder) -> None:
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        if base.config.get(key) != sparse.config.get(key):
            raise BadInput(
                f"base and sparse base differ in {key}",
                where=sparse.path,
                expected=base.config.get(key),
                found=sparse.config.get(key),
                code="E_PAIRING",
            )


def _check_layers_fit(linears: StoredLinears, sparse: StoredLinears) -> None:
    for module in linears.folder.linear_names():
        form = sparse.format_of(module) if sparse.has(module) else None
        if form is not None and form.quantized:
            raise BadInput(
                "the sparse base is quantised; its floating-point original is needed",
                where=f"{sparse.folder.path}, {module}",
                found=form.label,
                fix="give the sparse model as it was before quantisation",
                code="E_PAIRING",
            )
        if form is None or form.shape != linears.format_of(module).shape:
            raise BadInput(
                "the sparse base does not have this layer, or has it in another shape",
                where=f"{sparse.folder.path}, {module}",
                expected=linears.format_of(module).shape,
                found=None if form is None else form.shape,
                fix="give the sparse model that the base was made from",
                code="E_PAIRING",
            )


def _check_adapter_shapes(adapter: AdapterFolder, linears: StoredLinears) -> None:
    for module in adapter.modules():
        if adapter.shape(module) != linears.format_of(module).shape:
            raise BadInput(
                "adapter and base disagree about a module's shape",
                where=f"{adapter.path}, {module}",
                expected=linears.format_of(module).shape,
                found=adapter.shape(module),
                fix=f"use the base that the adapter was trained on ({adapter.base_model_name!r})",
                code="E_PAIRING",
            )


def _converted(recipe: Recipe, stack: ExitStack) -> tuple[Path, list[str]]:
    """A GGUF base as a Hugging Face folder that lives as long as the sources, and what the user should know of it.

    Made in a process of its own.
    """
    temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="sparseport-gguf-"))
    folder = Path(temporary) / "base"
    request = {"path": str(recipe.base.absolute()), "output": str(folder), "dtype": recipe.gguf_dtype}
    with Child("sparseport.checkpoints.gguf", request) as child:
        return folder, list(child.result()["notes"])
