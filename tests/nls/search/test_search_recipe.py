"""Search recipes: combinations that cannot work are refused and say what is allowed."""

from __future__ import annotations

import pytest

from sparseport.errors import BadInput
from sparseport.nls.search.run import _EXTRAS, _LENGTH, _STEERING
from sparseport.recipe import SearchRecipe, load_job
from sparseport.search_recipe import _SEARCH_OPTIONS

RNSGA2 = {"strategy": "rnsga2", "reference_points": [[0.8, 1e9]]}


def load(tmp_path, search):
    import json

    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({"search": search, "export": {"base": "b", "output": "o"}}), encoding="utf-8")
    return load_job(path).search


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"strategy": "hill_climbing", "turns": 3, "neighbours": 4, "evaluations": 20, "objectives": ["accuracy"]},
        {"strategy": "nsga2", "population": 10, "evaluations": 10, "backend": "processes", "workers": 4},
        {**RNSGA2, "epsilon": 0.01, "weights": [1, 2], "backend": "ray", "workers": 2, "worker_gpus": 0.5},
        {"strategy": "heuristics", "lowest_loss": 3, "minimum_samples": 2},
        {"objectives": ["accuracy", "latency"], "backend": "processes"},
    ],
)
def test_recipes_that_fit(tmp_path, search):
    recipe = load(tmp_path, search)
    assert SearchRecipe(**recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"split": "test"}, "search.split': Input should be 'validation'"),
        ({"strategy": "random"}, "'hill_climbing', 'nsga2', 'rnsga2' or 'heuristics'"),
        ({"objectives": ["accuracy", "size"]}, "'accuracy', 'macs', 'parameters' or 'latency'"),
        ({"objectives": []}, "search.objectives"),
        ({"objectives": ["macs", "accuracy"]}, "objectives are accuracy and then macs, parameters or latency"),
        ({"objectives": ["macs"]}, "objectives are accuracy and then"),
        ({"objectives": ["accuracy", "acceptance"]}, "acceptance or speculation in the place of accuracy"),
        ({"objectives": ["speculation", "acceptance"]}, "acceptance or speculation in the place of accuracy"),
        ({"objectives": ["speculation"], "backend": "processes", "workers": 2}, "speculation is measured by one"),
        ({"answer_tokens": 8}, "answer_tokens belongs to the objective acceptance or speculation, not to accuracy"),
        ({"objectives": ["acceptance"], "assistant_tokens": 3}, "assistant_tokens belongs to the objective spec"),
        ({"objectives": ["accuracy", "macs", "macs"]}, "each once"),
        ({"strategy": "nsga2", "objectives": ["accuracy"]}, "nsga2 needs a second objective: macs, parameters"),
        ({"strategy": "nsga2", "population": 30, "evaluations": 20}, "population is at most evaluations (20)"),
        ({"strategy": "nsga2", "turns": 3}, "turns belongs to the strategy hill_climbing, not to nsga2"),
        ({"neighbours": 0}, "search.neighbours"),
        ({"population": 8}, "population belongs to the strategy nsga2 or rnsga2, not to hill_climbing"),
        ({"strategy": "heuristics", "evaluations": 8}, "evaluations belongs to"),
        ({"lowest_loss": 3}, "lowest_loss belongs to the strategy heuristics"),
        ({"strategy": "rnsga2"}, "rnsga2 needs reference_points"),
        ({"reference_points": [[0.8, 1]]}, "reference_points belongs to the strategy rnsga2"),
        ({**RNSGA2, "reference_points": [[0.8]]}, "one value per objective (2)"),
        ({**RNSGA2, "weights": [1.0]}, "one value per objective (2)"),
        ({**RNSGA2, "weights": []}, "one value per objective (2)"),
        ({**RNSGA2, "weights": [1.0, 0.0]}, "search.weights.1"),
        ({**RNSGA2, "epsilon": 0}, "search.epsilon"),
        ({"workers": 2}, "more than one worker needs the backend processes or ray"),
        ({"backend": "processes", "worker_gpus": 1}, "worker_gpus belongs to the backend ray, not to processes"),
        (
            {"objectives": ["accuracy", "latency"], "backend": "processes", "workers": 2},
            "latency is measured by one worker",
        ),
        ({"accuracy_delta": -0.1}, "search.accuracy_delta"),
        ({"reference_accuracy": 65.8}, "search.reference_accuracy"),
        ({"seed": -1}, "search.seed"),
        ({"trials": 3}, "search.trials"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path, search, message):
    with pytest.raises(BadInput) as raised:
        load(tmp_path, search)
    assert message in str(raised.value)


def test_every_setting_of_a_strategy_is_steering_length_or_neither_for_all():
    """A setting that only some strategies have decides their way or their length; the journal has to know which."""
    owned = {name: owners for name, (chooser, owners) in _SEARCH_OPTIONS.items() if chooser == "strategy"}
    for strategy in _STEERING:
        known = {name for name, owners in owned.items() if strategy in owners}
        assert known == {*_STEERING[strategy], *_LENGTH[strategy]} - {"seed"}
        assert ("seed" in _STEERING[strategy]) is (strategy != "heuristics") and strategy in _EXTRAS
