"""The inputs of one export, opened together and checked against each other; weights are read one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.elastic import FILE_NAME as ELASTIC_FILE
from sparseport.checkpoints.elastic import choose_ranks, read_search_space
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import GptqConfig, read_gptq_linear, read_quantization_config
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput
from sparseport.recipe import Recipe
from sparseport.weights.linear import Array, DenseWeight, LowRankBranch, Mask, QuantizedWeight
from sparseport.weights.mask import mask_of

# A trained floating-point layer has next to no exact zeros; a layer above this share was pruned.
SPARSE_FROM = 0.05


@dataclass
class Sources:
    """Open input folders.

    base     the model to export: dense, sparse, or GPTQ INT4
    sparse   the sparse floating-point base that an INT4 base was made from, or None
    adapter  the fine-tuned adapter, or None
    gptq     how the INT4 base is stored; None for a floating-point base
    ranks    module -> active rank of the chosen sub-adapter; modules outside the search space keep their full rank
    """

    base: ModelFolder
    sparse: ModelFolder | None
    adapter: AdapterFolder | None
    gptq: GptqConfig | None
    ranks: dict[str, int]
    _stack: ExitStack

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def is_quantized(self, module: str) -> bool:
        """Whether the base holds this layer as INT4 codes."""
        return self.gptq is not None and self.base.has(f"{module}.qweight")

    def quantized(self, module: str) -> QuantizedWeight:
        """The base's INT4 weight of a module, without a mask."""
        assert self.gptq is not None
        return read_gptq_linear(self.base, module, self.gptq)

    def dense(self, module: str, rule: str = "carry") -> DenseWeight:
        """The base's floating-point weight of a module with its mask.

        The mask is that of the sparse base, if one was given. Otherwise it is the base's own zeros: always for
        `sparse_peft`, as in training, and for other rules if the layer is sparse at all.
        """
        values = self.base.read(f"{module}.weight")
        mask = self.mask(module)
        if mask is None:
            own = mask_of(values)
            mask = own if rule == "sparse_peft" or own.mean() <= 1 - SPARSE_FROM else None
        return DenseWeight(values, mask)

    def sparse_dense(self, module: str) -> DenseWeight:
        """The sparse base's weight of a module with its mask.

        Raises:
            BadInput: no sparse base was given, or it does not have this module.
        """
        if self.sparse is None:
            raise BadInput("this layer needs the sparse base", where=module, fix="give --sparse-base DIR")
        values = self.sparse.read(f"{module}.weight")
        return DenseWeight(values, mask_of(values))

    def mask_available(self, module: str) -> bool:
        """Whether a sparse base was given and holds this module."""
        return self.sparse is not None and self.sparse.has(f"{module}.weight")

    def mask(self, module: str) -> Mask | None:
        """The mask from the sparse base that was given, or None."""
        if self.sparse is None or not self.mask_available(module):
            return None
        return mask_of(self.sparse.read(f"{module}.weight"))

    def branch(self, module: str) -> LowRankBranch:
        """The chosen sub-adapter's low-rank branch of a module."""
        assert self.adapter is not None
        branch = self.adapter.branch(module)
        rank = self.ranks.get(module)
        return branch if rank is None or rank == branch.rank else branch.at_rank(rank)

    def adapter_modules(self) -> set[str]:
        """Modules that the adapter changes."""
        return set(self.adapter.modules()) if self.adapter else set()

    def small_tensors(self) -> dict[str, Array]:
        """Norms, biases and the like: every tensor of fewer than two dimensions, by name."""
        packed = ("g_idx", "qzeros", "scales", "qweight")
        names = [name for name in self.base.names() if name.rpartition(".")[2] not in packed]
        return {name: self.base.read(name) for name in names if len(self.base.info(name).shape) < 2}

    def release(self) -> None:
        """Give the memory of weights read so far back to the system."""
        for folder in (self.base, self.sparse, self.adapter):
            if folder is not None:
                folder.release()

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of a linear layer of the base, from the header."""
        if self.is_quantized(module):
            words, out = self.base.info(f"{module}.qweight").shape
            return int(out), int(words) * 8
        rows, columns = self.base.info(f"{module}.weight").shape
        return int(rows), int(columns)

    def facts(self) -> dict[str, Any]:
        """SHA-256 of every input file, by role, for the certificate."""
        roles = {"base": self.base, "sparse_base": self.sparse, "adapter": self.adapter}
        return {role: folder.sha256() for role, folder in roles.items() if folder is not None}


def open_sources(recipe: Recipe) -> Sources:
    """Open every input that a recipe names and check that they belong together.

    Raises:
        BadInput: an input is missing or damaged, or does not fit the others.
        Unsupported: an input is of a kind that cannot be carried exactly.
    """
    stack = ExitStack()
    try:
        base = stack.enter_context(ModelFolder.open(recipe.base, allow_pickle=recipe.allow_pickle))
        base.check_layers()
        quantized = base.config.get("quantization_config") is not None
        gptq = read_quantization_config(base, zero_storage=recipe.gptq_zeros) if quantized else None
        sparse = None
        if recipe.sparse_base is not None:
            sparse = stack.enter_context(ModelFolder.open(recipe.sparse_base, allow_pickle=recipe.allow_pickle))
            sparse.check_layers()
            _check_same_shape(base, sparse)
        sources = Sources(base, sparse, None, gptq, {}, stack)
        if sparse is not None:
            _check_layer_shapes(sources, sparse)
        adapter = None
        ranks: dict[str, int] = {}
        if recipe.adapter is not None:
            adapter = stack.enter_context(AdapterFolder.open(recipe.adapter, allow_pickle=recipe.allow_pickle))
            adapter.check_base(base)
            ranks = _sub_adapter_ranks(adapter, recipe.adapter, recipe.sub_adapter)
        return Sources(base, sparse, adapter, gptq, ranks, stack)
    except BaseException:
        stack.close()
        raise


def _check_same_shape(base: ModelFolder, sparse: ModelFolder) -> None:
    if sparse.config.get("quantization_config") is not None:
        raise BadInput(
            "the sparse base is quantised; its floating-point original is needed",
            where=sparse.path,
            fix="give the sparse model as it was before quantisation",
            code="E_PAIRING",
        )
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        if base.config.get(key) != sparse.config.get(key):
            raise BadInput(
                f"base and sparse base differ in {key}",
                where=sparse.path,
                expected=base.config.get(key),
                found=sparse.config.get(key),
                code="E_PAIRING",
            )


def _check_layer_shapes(sources: Sources, sparse: ModelFolder) -> None:
    for module in sources.base.linear_names():
        name = f"{module}.weight"
        found = sparse.info(name).shape if sparse.has(name) else None
        if found != sources.shape(module):
            raise BadInput(
                "the sparse base does not have this layer, or has it in another shape",
                where=f"{sparse.path}, tensor {name}",
                expected=sources.shape(module),
                found=found,
                fix="give the sparse model that the base was made from",
                code="E_PAIRING",
            )


def _sub_adapter_ranks(adapter: AdapterFolder, folder: Path, choice: str) -> dict[str, int]:
    space_file = folder / ELASTIC_FILE
    if not space_file.is_file():
        if choice != "maximal":
            raise BadInput(
                "the adapter has no search space to choose a sub-adapter from",
                where=space_file,
                fix="leave --sub-adapter away, or put elastic_adapter_config.json beside the adapter",
            )
        return {}
    groups = read_search_space(space_file)
    selected = choice if choice in ("maximal", "heuristic", "minimal") else Path(choice)
    return choose_ranks(groups, selected, trained=adapter.ranks())
