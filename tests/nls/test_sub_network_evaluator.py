"""What measures sub-networks: refusals before any weights, what a digest follows, and what a latency is measured on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sparseport import extras  # noqa: E402
from sparseport.errors import BadInput, EnvironmentProblem, SparseportError, Unsupported, UsageError  # noqa: E402
from sparseport.nls import sub_networks  # noqa: E402
from sparseport.nls.finetune import save_adapter  # noqa: E402
from sparseport.nls.load import check_adapter, load_for_training, restore_adapter  # noqa: E402
from sparseport.nls.record import Sample  # noqa: E402
from sparseport.nls.searching import journal_name, make_search  # noqa: E402
from sparseport.nls.sub_networks import SubNetworkEvaluator  # noqa: E402
from sparseport.progress import Progress  # noqa: E402
from sparseport.recipe import FinetuneRecipe, SearchRecipe, make_recipe  # noqa: E402


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("task") / "task.jsonl"
    splits = ["train"] * 4 + ["validation"] * 3 + ["test"]
    lines = [{"prompt": f"{n} and", "answer": f" {n + 1}", "split": s, "form": "text"} for n, s in enumerate(splits)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _recipe(task: Path, method: str = "shears", **changes: Any) -> FinetuneRecipe:
    fields = {"method": method, "task": str(task), "search_space": [8, 4], "alpha": 16, "target_modules": ["q_proj"]}
    fields |= {"elastic_modules": ["q_proj"], **changes}
    return FinetuneRecipe.model_validate(fields)


def _trained(base: Path, recipe: FinetuneRecipe, out: Path) -> Path:
    model = load_for_training(base, recipe)
    groups = 2 if recipe.nls else 0
    samples = [Sample(step, (8, 4)[:groups], 1.0 - step / 10) for step in range(3)]
    save_adapter(model, recipe, "base", out, samples)
    return out


@pytest.fixture(scope="module")
def adapter(tiny_sparse: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tiny_sparse, _recipe(task), tmp_path_factory.mktemp("shears") / "adapter")


@pytest.fixture
def setup(tiny_sparse: Path, adapter: Path, task: Path, tmp_path: Path) -> SubNetworkEvaluator:
    """Of folders that a test may change."""
    base = Path(shutil.copytree(tiny_sparse, tmp_path / "base"))
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    export = make_recipe({"base": base, "adapter": own, "output": tmp_path / "out", "branches": "adapter"})
    return SubNetworkEvaluator(base, None, own, _recipe(task), SearchRecipe(), export)


def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sub_networks, "load_for_training", refuse)


def _search(**fields: Any) -> SearchRecipe:
    return SearchRecipe.model_validate(fields)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_method_is_refused_before_weights_are_read(
    setup: SubNetworkEvaluator, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and scaling are the same in all of them; only what the forward does with the update differs."""
    masked = _trained(setup.base, _recipe(task, "sparse_peft"), tmp_path / "masked")
    for folder, method, flag in (
        (setup.adapter, "sparse_peft", "sparse_adapter"),
        (masked, "shears", "sparse_adapter"),
        (masked, "qa_sparse_peft", "quantization_aware"),
    ):
        with pytest.raises(BadInput, match=flag):
            check_adapter(folder, method)
    check_adapter(setup.adapter, "shears")
    check_adapter(masked, "sparse_peft")
    with pytest.raises(BadInput, match="sparse_adapter"):
        restore_adapter(load_for_training(setup.base, _recipe(task)), masked)
    _no_weights(monkeypatch)
    wrong = replace(setup, adapter=masked)
    for use in (wrong, lambda: make_search(wrong, tmp_path / "journal", tmp_path, Progress("quiet"))):
        with pytest.raises(BadInput, match="another method than the recipe's"):
            use()
    assert not (tmp_path / "journal").exists()


def test_an_unknown_metric_is_refused_before_weights_are_read(
    setup: SubNetworkEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_weights(monkeypatch)
    wrong = replace(setup, search=_search(metric="acc_norm"))
    for use in (wrong, wrong.check, lambda: make_search(wrong, tmp_path / "journal", tmp_path, Progress("quiet"))):
        with pytest.raises(UsageError, match=r"no such metric.*exact_match"):
            use()
    assert not (tmp_path / "journal").exists()


def test_a_picture_needs_its_package_at_the_beginning(
    setup: SubNetworkEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    _no_weights(monkeypatch)
    with pytest.raises(EnvironmentProblem, match="matplotlib"):
        make_search(setup, tmp_path / "journal", tmp_path, Progress("quiet"))
    assert not (tmp_path / "journal").exists()
    one = replace(setup, search=_search(objectives=["accuracy"]))
    with pytest.raises(SparseportError, match="weights were loaded"):  # it has come that far
        make_search(one, tmp_path / "journal", tmp_path, Progress("quiet"))


def test_shapes_are_asked_for_only_where_a_cost_counts(
    task: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-NeoX has queries, keys and values in one matrix, from which heads cannot be counted."""
    config = transformers.GPTNeoXConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    base = tmp_path / "neox"
    transformers.GPTNeoXForCausalLM(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, base / name)
    recipe = _recipe(task, "lora", target_modules=["query_key_value"], elastic_modules=["query_key_value"])
    adapter = _trained(base, recipe, tmp_path / "neox-adapter")
    only = SubNetworkEvaluator(base, None, adapter, recipe, _search(objectives=["accuracy"], items=2))
    assert set(only()((8, 4))) == {"accuracy"}
    _no_weights(monkeypatch)
    costly = replace(only, search=SearchRecipe())
    for use in (costly, costly.check):
        with pytest.raises(Unsupported, match="attention heads"):
            use()


def test_spaces_written_once_for_all_layers_know_any_name_of_their_number(setup: SubNetworkEvaluator) -> None:
    """Shears writes one group for all layers; the number of layers is under three names in config.json files."""
    (setup.adapter / "elastic_adapter_config.json").unlink()
    node = "Peft/LoraModel[base_model]/A[model]/B[model]/ModuleList[layers]/C[{*}]/D[self_attn]/Linear[q_proj]"
    node = f"{{re}}{node}/ModuleDict[lora_A]/NNCFLinear[default]/linear_0"
    width = {"overwrite_groups": [[node]], "overwrite_groups_widths": [[8, 4]]}
    space = {"bootstrapNAS": {"training": {"elasticity": {"width": width}}}}
    (setup.adapter / "nncf_config.json").write_text(json.dumps(space), encoding="utf-8")
    file = setup.base / "config.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    layers = plain.pop("num_hidden_layers")
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        file.write_text(json.dumps({**plain, name: layers}), encoding="utf-8")
        assert len(setup.space().groups) == layers == 2
    file.write_text(json.dumps({**plain, "text_config": {"n_layer": layers}}), encoding="utf-8")
    assert len(setup.space().groups) == 2


# --- where and what -------------------------------------------------------------------------------------------------


def test_the_model_goes_to_the_teams_device(setup: SubNetworkEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        device = torch.device("meta")

    monkeypatch.setattr(sub_networks, "Team", Elsewhere)
    places = {value.device.type for value in setup()._model.parameters()}
    assert places == {"meta"}


@pytest.mark.parametrize(("method", "branches"), [("shears", "graph"), ("lora", "refuse")])
def test_latency_is_measured_with_branches_where_their_rank_counts(
    method: str,
    branches: str,
    setup: SubNetworkEvaluator,
    tiny_base: Path,
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter = setup.base, setup.adapter
    if method == "lora":
        base, adapter = tiny_base, _trained(tiny_base, _recipe(task, "lora"), tmp_path / "lora")
    assert setup.export is not None
    export = setup.export.model_copy(update={"branches": "adapter" if method == "shears" else "refuse"})
    setup = SubNetworkEvaluator(
        base, None, adapter, _recipe(task, method), _search(objectives=["accuracy", "latency"], items=1), export
    )
    exported: list[Any] = []
    measured: list[Any] = []

    def measure(folders: list[Path], **options: Any) -> dict[str, Any]:
        measured.append((folders, options))
        return {"folders": [{"decode_ms": {"64": {"median": 4.0}}}]}

    monkeypatch.setattr("sparseport.pipeline.export", exported.append)
    monkeypatch.setattr(sub_networks, "measure_latency", measure)
    evaluator = setup()
    assert evaluator((8, 4))["latency"] == evaluator((4, 4))["latency"] == 0.004
    # Merged ranks leave no trace in the graph, so one measurement serves all of them.
    assert len(exported) == len(measured) == (2 if method == "shears" else 1)
    assert {recipe.branches for recipe in exported} == {branches}
    assert [folders for folders, _ in measured] == [[recipe.output] for recipe in exported]


# --- digests --------------------------------------------------------------------------------------------------------


def test_a_digest_follows_what_decides_an_evaluation(
    setup: SubNetworkEvaluator, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {setup.digest()}

    def require_new(changed: SubNetworkEvaluator) -> None:
        digest = changed.digest()
        assert digest not in seen
        seen.add(digest)

    for name, value in (("items", 2), ("tokens", 8), ("objectives", ["accuracy"])):
        require_new(replace(setup, search=_search(**{name: value})))
    other = tmp_path / "other.jsonl"
    other.write_text(task.read_text(encoding="utf-8").replace('" 5"', '" 6"'), encoding="utf-8")
    require_new(replace(setup, finetune=_recipe(other)))
    # A tokenizer's file that is no safetensors and no JSON.
    (setup.base / "merges.txt").write_text("a b\n", encoding="utf-8")
    require_new(setup)
    space = setup.adapter / "elastic_adapter_config.json"
    space.write_text(space.read_text(encoding="utf-8").replace("4", "3"), encoding="utf-8")
    require_new(setup)
    for name in ("torch", "transformers"):
        _with_version(monkeypatch, name)
        require_new(setup)
        monkeypatch.undo()
    # What stands beside without being read decides nothing, nor does where the same task lies.
    (setup.base / "notes.json").write_text("{}", encoding="utf-8")
    moved = tmp_path / "moved.jsonl"
    shutil.copy(task, moved)
    assert {setup.digest(), replace(setup, finetune=_recipe(moved)).digest()} <= seen


def _with_version(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain = sub_networks.version
    monkeypatch.setattr(sub_networks, "version", lambda one: "0.0" if one == name else plain(one))


def test_a_latency_follows_the_machine_and_an_accuracy_does_not(
    setup: SubNetworkEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = replace(setup, search=_search(objectives=["accuracy", "latency"]))
    before, timed_before = setup.digest(), timed.digest()
    facts = sub_networks.processor()
    assert facts["processor"] and facts["cores"] >= 1
    for change in ({"processor": "another"}, {"cores": 999}):
        monkeypatch.setattr(sub_networks, "processor", lambda change=change: {**facts, **change})
        assert timed.digest() != timed_before and setup.digest() == before
        monkeypatch.undo()
    for name, differs in (("openvino", True), ("onnxruntime", False)):
        _with_version(monkeypatch, name)
        assert (timed.digest() != timed_before) == differs and setup.digest() == before
        monkeypatch.undo()
    monkeypatch.setattr(sub_networks, "_THREADS", 1)
    assert timed.digest() != timed_before
    assert timed.export is not None
    monkeypatch.undo()
    assert replace(timed, export=timed.export.model_copy(update={"embedding": "int8"})).digest() != timed_before


RNSGA2: dict[str, Any] = {"strategy": "rnsga2", "reference_points": [[0.8, 1e6]]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"seed": 1}),
        ({}, {"neighbours": 3}),
        ({}, {"strategy": "heuristics"}),
        ({"strategy": "nsga2"}, {"population": 8}),
        ({"strategy": "heuristics"}, {"lowest_loss": 1}),
        ({"strategy": "heuristics"}, {"minimum_samples": 3}),
        (RNSGA2, {"reference_points": [[0.7, 1e6]]}),
        (RNSGA2, {"epsilon": 0.1}),
        (RNSGA2, {"weights": [1, 2]}),
        ({}, {"items": 2}),
    ],
)
def test_other_steering_is_another_journal(
    before: dict[str, Any], after: dict[str, Any], setup: SubNetworkEvaluator
) -> None:
    one = replace(setup, search=_search(**before))
    assert journal_name(one) != journal_name(replace(setup, search=_search(**{**before, **after})))


def test_named_sub_networks_are_steering_too(setup: SubNetworkEvaluator) -> None:
    heuristics = replace(setup, search=_search(strategy="heuristics"))
    before = journal_name(setup), journal_name(heuristics)
    record = setup.adapter / "training_record.jsonl"
    record.write_text(record.read_text(encoding="utf-8").replace("[8, 4]", "[4, 8]", 1), encoding="utf-8")
    assert journal_name(setup) == before[0] and journal_name(heuristics) != before[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"turns": 30, "evaluations": 500}),
        ({}, {"backend": "processes", "workers": 3, "retries": 5}),
        ({}, {"reference_accuracy": 0.3, "accuracy_delta": 0.1}),
        ({}, {"metric": "exact_match"}),
        ({"strategy": "nsga2"}, {"evaluations": 300}),
        ({**RNSGA2, "backend": "ray"}, {"worker_gpus": 0.5, "workers": 2, "evaluations": 200}),
    ],
)
def test_a_longer_budget_goes_on_with_the_same_journal(
    before: dict[str, Any], after: dict[str, Any], setup: SubNetworkEvaluator
) -> None:
    one = replace(setup, search=_search(**before))
    name = journal_name(one)
    assert name == journal_name(replace(setup, search=_search(**{**before, **after})))
    assert name.startswith("search-") and name.endswith(".jsonl")
