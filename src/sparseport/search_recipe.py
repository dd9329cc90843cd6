"""What the user asks of a search for sub-networks, as checked data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparseport.strict import Strict

SearchObjective = Literal["acceptance", "speculation", "accuracy", "macs", "parameters", "latency"]
# What a search is about, and comes first; those but the first are about a draft for another network.
QUALITIES = ("accuracy", "acceptance", "speculation")
# Measured on exported folders, which others must not slow down.
TIMED = ("latency", "speculation")

# Search settings that only some strategies or backends look at.
_SEARCH_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "evaluations": ("strategy", ("hill_climbing", "nsga2", "rnsga2")),
    "population": ("strategy", ("nsga2", "rnsga2")),
    "turns": ("strategy", ("hill_climbing",)),
    "neighbours": ("strategy", ("hill_climbing",)),
    "reference_points": ("strategy", ("rnsga2",)),
    "epsilon": ("strategy", ("rnsga2",)),
    "weights": ("strategy", ("rnsga2",)),
    "lowest_loss": ("strategy", ("heuristics",)),
    "minimum_samples": ("strategy", ("heuristics",)),
    "worker_gpus": ("backend", ("ray",)),
}


class SearchRecipe(Strict):
    """Search for a sub-network of a trained super-adapter."""

    strategy: Literal["hill_climbing", "nsga2", "rnsga2", "heuristics"] = Field(
        "hill_climbing", description="heuristics: the named sub-networks and the best of the training record only"
    )
    objectives: tuple[SearchObjective, ...] = Field(
        ("accuracy", "macs"),
        min_length=1,
        description="accuracy, then costs in the order in which they count; for a draft instead of accuracy "
        "acceptance (share of the main network's tokens that it would say) or speculation (predicted speed-up)",
    )
    split: Literal["validation"] = Field(
        "validation", description="part of the task to measure on; a choice made on the test split would spoil it"
    )
    items: int | None = Field(None, ge=1, description="only the first items of that split; none: all")
    metric: str | None = Field(
        None,
        description="acc or acc_norm where answers are chosen (default acc_norm); where they are written exact_match, "
        "number_match, or for gsm8k strict_match (default) or flexible_extract",
    )
    tokens: int = Field(64, ge=1, description="prompt length that macs are counted for, each as macs per token")
    answer_tokens: int = Field(32, ge=2, description="of each answer that a draft is compared with (acceptance)")
    assistant_tokens: int = Field(5, ge=1, le=16, description="most tokens that a draft says at once (speculation)")
    seed: int = Field(0, ge=0)
    evaluations: int = Field(100, ge=3, description="at most so many sub-networks are measured")
    population: int = Field(20, ge=4, description="sub-networks in a generation (nsga2, rnsga2)")
    turns: int = Field(10, ge=1, description="steps of the climb (hill_climbing)")
    neighbours: int = Field(8, ge=1, description="sub-networks measured in each turn (hill_climbing)")
    reference_points: tuple[tuple[float, ...], ...] = Field(
        (), description="values to aim at, one per objective in each point (rnsga2)"
    )
    epsilon: float = Field(0.001, gt=0.0, description="distance below which sub-networks crowd each other (rnsga2)")
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(
        None, description="of the objectives in the distance to a reference point (rnsga2)"
    )
    lowest_loss: int = Field(5, ge=1, description="sub-networks with the lowest training loss (heuristics)")
    minimum_samples: int = Field(1, ge=1, description="training steps that such a sub-network had (heuristics)")
    reference_accuracy: float | None = Field(
        None, ge=0.0, le=1.0, description="accuracy to hold; none: the best that the search measures"
    )
    accuracy_delta: float = Field(
        0.0, ge=0.0, le=1.0, description="the cheapest sub-network at most this far below that accuracy is chosen"
    )
    backend: Literal["local", "processes", "ray"] = "local"
    workers: int = Field(1, ge=1, description="sub-networks measured at once")
    worker_gpus: float = Field(
        0.0, ge=0.0, description="GPUs of each worker (ray); others use the first if there is one"
    )
    retries: int = Field(2, ge=0, description="how often a sub-network is measured again after its worker died")

    @model_validator(mode="after")
    def _options_fit(self) -> SearchRecipe:
        for name, (chooser, owners) in _SEARCH_OPTIONS.items():
            if getattr(self, name) != type(self).model_fields[name].default and getattr(self, chooser) not in owners:
                raise ValueError(
                    f"{name} belongs to the {chooser} {' or '.join(owners)}, not to {getattr(self, chooser)}"
                )
        first, *costs = self.objectives
        if first not in QUALITIES or set(costs) & set(QUALITIES) or len(set(costs)) != len(costs):
            raise ValueError(
                "objectives are accuracy and then macs, parameters or latency, each once; a search for a draft has "
                "acceptance or speculation in the place of accuracy"
            )
        for name, owners in (("answer_tokens", QUALITIES[1:]), ("assistant_tokens", QUALITIES[2:])):
            if getattr(self, name) != type(self).model_fields[name].default and first not in owners:
                raise ValueError(f"{name} belongs to the objective {' or '.join(owners)}, not to {first}")
        if self.strategy in ("nsga2", "rnsga2"):
            if len(self.objectives) < 2:
                raise ValueError(f"{self.strategy} needs a second objective: macs, parameters or latency")
            if self.population > self.evaluations:
                raise ValueError(f"population is at most evaluations ({self.evaluations})")
        if (self.strategy == "rnsga2") != bool(self.reference_points):
            raise ValueError("rnsga2 needs reference_points: one or more lists with one value per objective")
        rows = [*self.reference_points, *([] if self.weights is None else [self.weights])]
        if any(len(row) != len(self.objectives) for row in rows):
            raise ValueError(f"reference points and weights have one value per objective ({len(self.objectives)})")
        if self.backend == "local" and self.workers > 1:
            raise ValueError("more than one worker needs the backend processes or ray")
        if timed := [name for name in self.objectives if name in TIMED and self.workers > 1]:
            raise ValueError(f"{timed[0]} is measured by one worker; others beside it would slow it down")
        return self

    @property
    def drafts(self) -> bool:
        """Whether the search is for a draft."""
        return self.objectives[0] != "accuracy"
