"""The networks that one export writes: the main one, and with `draft` a smaller one of the same super-network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from sparseport.cuts import require_same_class
from sparseport.errors import SparseportError
from sparseport.layout import folder_name
from sparseport.plan import Plan, make_plan
from sparseport.progress import Progress
from sparseport.recipe import Recipe, Target
from sparseport.sources import Sources, other_sub_network


@dataclass(frozen=True)
class Network:
    """What is exported as one network.

    recipe   its sub-network and how it leaves; a draft's own recipe names no further draft
    sources  inputs with that sub-network
    layers   its plan
    draft    whether it is the draft
    """

    recipe: Recipe
    sources: Sources
    layers: Plan
    draft: bool = False

    def folder(self, target: Target, output: Path) -> Path:
        """A target's folder: the output itself, or one of several in it."""
        several = self.draft or self.recipe.several
        return output / folder_name(target, draft=self.draft) if several else output

    def step(self, name: str, target: Target | None = None) -> str:
        """A step's name in the progress report; the target is named where there are several."""
        of: list[str] = [target] if target is not None and len(self.recipe.target) > 1 else []
        of += ["draft"] if self.draft else []
        return f"{name} ({', '.join(of)})" if of else name


def networks_of(recipe: Recipe, sources: Sources) -> list[Network]:
    """The main network, and its draft if the recipe names one; both are planned.

    Raises:
        SparseportError: the draft's sub-network cannot be chosen.
    """
    main = Network(recipe, sources, _planned(recipe, sources))
    if recipe.draft is None:
        return [main]
    own = recipe.of_draft()
    chosen = other_sub_network(sources, own)
    draft = Network(own, chosen, _planned(own, chosen), draft=True)
    draft.layers.notes.append(_size_note(main, draft))
    return [main, draft]


def _planned(recipe: Recipe, sources: Sources) -> Plan:
    """The plan, after a look at what the model's class makes of the blocks that a sub-network keeps."""
    layers = make_plan(recipe, sources)
    if layers.problem is None:
        try:
            layers.notes.extend(require_same_class(sources))
        except SparseportError as error:
            return replace(layers, problem=error)
    return layers


def _size_note(main: Network, draft: Network) -> str:
    """How large the draft is; one that costs as much as its main network cannot make anything faster."""
    before, after = (sum(rows * columns for rows, columns in _shapes(one)) for one in (main, draft))
    note = f"{after:,} of the main network's {before:,} weights of linear layers ({after / before:.1%})"
    same = draft.recipe.compress == main.recipe.compress
    return note + ("; it takes as long as the main network, so nothing gets faster" if same and after >= before else "")


def _shapes(network: Network) -> list[tuple[int, int]]:
    return [layer.shape for layer in network.layers.layers]


@dataclass
class Notes:
    """Things worth knowing, told once each."""

    progress: Progress
    told: list[str] = field(default_factory=list)

    def tell(self, network: Network) -> None:
        """Tell what is new in a network's notes; what the main network's said already is not said of the draft."""
        for note in network.layers.notes:
            text = f"draft: {note}" if network.draft else note
            if note not in self.told and text not in self.told:
                self.told.append(text)
                self.progress.note(text)
