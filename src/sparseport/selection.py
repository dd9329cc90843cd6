"""Which sub-network of the inputs a recipe chooses: ranks of adapters, and what is left of a super-network."""

from __future__ import annotations

from pathlib import Path

from sparseport.checkpoints.dialect import StoredLinears
from sparseport.checkpoints.elastic import CHOICES, Selection, choose, open_search_space
from sparseport.checkpoints.layers import layer_count
from sparseport.checkpoints.nncf_fq import NncfCheckpoint, read_nls_ranks
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput
from sparseport.recipe import Recipe


def nls_ranks(tuned: NncfCheckpoint, recipe: Recipe, extra: dict[str, Path]) -> dict[str, int]:
    """Module -> rank of the chosen sub-adapter of an NNCF checkpoint, which itself always says the largest.

    Raises:
        BadInput: the ranks are in no file that was given or found.
    """
    if recipe.search_space is not None:
        raise BadInput(
            "an NNCF checkpoint has no search space file",
            where=recipe.search_space,
            fix="give ranks with --sub-adapter FILE, or leave --search-space away",
            code="E_ELASTIC",
        )
    if recipe.sub_adapter == "maximal":
        if tuned.result_json is not None and tuned.elastic_ranks():
            tuned.warnings.append(
                f"{tuned.result_json.name} names searched ranks, and the largest are exported; "
                "--sub-adapter heuristic takes the searched ones"
            )
        return {}
    file: Path | None = Path(recipe.sub_adapter)
    if recipe.sub_adapter == "heuristic":
        file = tuned.result_json
    if file is None or recipe.sub_adapter == "minimal":
        raise BadInput(
            f"an NNCF checkpoint does not hold the ranks of the {recipe.sub_adapter} sub-adapter",
            where=tuned.source,
            expected="result.json beside it, or a JSON list with one rank per layer",
            fix="give the training output with its result.json as --adapter, or --sub-adapter FILE",
            code="E_ELASTIC",
        )
    if file != tuned.result_json:
        extra["sub_adapter"] = file
    return read_nls_ranks(file, tuned.elastic_ranks())


def chosen_sub_network(
    adapter: AdapterFolder | None, recipe: Recipe, linears: StoredLinears, extra: dict[str, Path]
) -> Selection:
    """The chosen sub-network; files outside the adapter's folder are added to `extra`.

    Without an adapter there is nothing to choose but parts of the model itself: channels, heads and blocks.

    Raises:
        BadInput: there is no search space to choose from, or it does not belong to the adapter.
    """
    beside = None if adapter is None else adapter.search_space_file()
    space_file = recipe.search_space or beside
    if recipe.search_space is not None:
        extra["search_space"] = recipe.search_space
    choice: str | Path = recipe.sub_adapter
    if choice not in CHOICES:
        choice = Path(recipe.sub_adapter)
        extra["sub_adapter"] = choice
    if space_file is None:
        if choice != "maximal":
            raise BadInput(
                "there is no search space to choose a sub-adapter from",
                where=recipe.base if adapter is None else adapter.path,
                expected="search_space.json, elastic_adapter_config.json or nncf_config.json beside the adapter",
                fix="give --search-space FILE, or leave --sub-adapter away",
                code="E_ELASTIC",
            )
        return Selection()
    space = open_search_space(space_file, layers=layer_count(linears.folder.config))
    if adapter is None and any(group.kind == "rank" for group in space.groups):
        raise BadInput(
            "the search space has ranks, but there is no adapter",
            where=space_file,
            fix="give --adapter DIR",
            code="E_ELASTIC",
        )
    return choose(space, choice, trained=None if adapter is None else adapter.ranks())
