"""Exports that a search makes only to time them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.nls.latency import measure_draft_costs
from sparseport.recipe import Recipe
from sparseport.search_recipe import SearchRecipe


@dataclass(frozen=True)
class Latency:
    """Seconds a token, and the ratio to the main network's where there is one: c of `sparseport.nls.speculation`."""

    seconds: float
    ratio: float | None = None


class MainNetwork:
    """The exported main network of a search for its draft; its folder stays as long as this object.

    folder  the exported folder
    verify  v_1, v_2, ... of `sparseport.nls.speculation`, measured once
    """

    def __init__(self, recipe: Recipe, search: SearchRecipe, threads: int) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="sparseport-main-")
        self.folder = exported(recipe, None, Path(self._place.name))
        longest = search.assistant_tokens
        measured = measure_draft_costs(self.folder, [], longest=longest, prompt=search.tokens, threads=threads)
        self.verify = [float(measured["step_ms"][str(k + 1)]["ratio"]) for k in range(1, longest + 1)]


def exported(recipe: Recipe, sizes: Sequence[int] | None, place: Path) -> Path:
    """Export a sub-network into a folder at `place`; without sizes it is the recipe's own."""
    from sparseport.pipeline import export

    update: dict[str, Any] = {"output": place / "out"}
    if sizes is not None:
        chosen = place / "sizes.json"
        chosen.write_text(json.dumps(list(sizes)), encoding="utf-8")
        update["sub_adapter"] = str(chosen)
    made = recipe.model_copy(update=update)
    export(made)
    return made.output
