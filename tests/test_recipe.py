"""Recipes: what is unknown, of the wrong type or out of range is refused by name; every shipped recipe loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sparseport.errors import BadInput, UsageError
from sparseport.recipe import FinetuneRecipe, Job, Recipe, apply_settings, load_job, make_recipe
from sparseport.weights.packing import ZeroPointStorage
from sparseport.weights.rounding import RoundingRule

CONFIGS = sorted((Path(__file__).parents[1] / "export_configs").glob("*.y*ml"))
MINIMAL = {"base": "b", "output": "o"}


def job_file(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def nested(key: str, value: object) -> dict[str, object]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def test_defaults():
    recipe = make_recipe(MINIMAL)
    assert recipe.base == Path("b") and recipe.output == Path("o") and recipe.target == ("openvino",)
    assert recipe.rounding is RoundingRule.SQFT and recipe.mask_policy == "strict" and recipe.sub_adapter == "maximal"
    assert recipe.tokenizer and recipe.numerics and not recipe.overwrite and not recipe.allow_pickle
    assert recipe.compress.mode == "none" and recipe.gptq_zeros is None


def test_values_become_what_they_name():
    recipe = make_recipe({**MINIMAL, "rounding": "paper", "gptq_zeros": "v2", "compress": {"mode": "int4_sym"}})
    assert recipe.rounding is RoundingRule.PAPER and recipe.gptq_zeros is ZeroPointStorage.V2
    assert recipe.compress.mode == "int4_sym" and recipe.compress.group_size == 64


def test_recipes_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        make_recipe(MINIMAL).base = Path("other")


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"output": "o"}, "base"),
        ({"base": "b"}, "output"),
        ({**MINIMAL, "bsae": "b"}, "bsae"),
        ({**MINIMAL, "compress": {"mdoe": "none"}}, "compress.mdoe"),
        ({**MINIMAL, "rounding": "nearest"}, "rounding"),
        ({**MINIMAL, "target": ["openvino", "tensorrt"]}, "target.1"),
        ({**MINIMAL, "target": []}, "target"),
        ({**MINIMAL, "tokenizer": "perhaps"}, "tokenizer"),
        ({**MINIMAL, "base": 3}, "base"),
        ({**MINIMAL, "embedding": "int4"}, "embedding"),
        ({**MINIMAL, "gptq_zeros": "v3"}, "gptq_zeros"),
        ({**MINIMAL, "mask_policy": "ignore"}, "mask_policy"),
        ({**MINIMAL, "compress": "int8"}, "compress"),
        ({**MINIMAL, "compress": {"mode": "int2"}}, "compress.mode"),
        ({**MINIMAL, "compress": {"ratio": 1.01}}, "compress.ratio"),
        ({**MINIMAL, "compress": {"ratio": -0.1}}, "compress.ratio"),
        ({**MINIMAL, "compress": {"ratio": float("nan")}}, "compress.ratio"),
        ({**MINIMAL, "compress": {"group_size": 0}}, "compress.group_size"),
        ({**MINIMAL, "compress": {"group_size": -2}}, "compress.group_size"),
        ({**MINIMAL, "compress": {"samples": 0}}, "compress.samples"),
        ({**MINIMAL, "compress": {"samples": "many"}}, "compress.samples"),
    ],
)
def test_bad_recipes_name_the_field(data, field):
    with pytest.raises(BadInput, match=re.escape(f"recipe field {field!r}")) as caught:
        make_recipe(data)
    assert caught.value.code == "E_RECIPE" and "\n" not in str(caught.value)


def test_several_mistakes_are_counted():
    with pytest.raises(BadInput, match=r"and 2 more"):
        make_recipe({**MINIMAL, "a": 1, "b": 2, "c": 3})


JOB = {
    "model": {"wheel": "w==1", "sha256": "0" * 64, "member": "m"},
    "sparsify": {},
    "quantize": {},
    "finetune": {},
    "export": MINIMAL,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparsify.sparsity", 0),
        ("sparsify.sparsity", 1),
        ("sparsify.pattern", "1:4"),
        ("sparsify.samples", 0),
        ("sparsify.sequence_length", 7),
        ("quantize.method", "awq"),
        ("quantize.group_size", 4),
        ("quantize.symmetric", "half"),
        ("finetune.method", "full"),
        ("finetune.search_space", []),
        ("finetune.search_space", [16, 32]),
        ("finetune.search_space", [16, 16]),
        ("finetune.search_space", [16, 0]),
        ("finetune.alpha", 0),
        ("finetune.alpha", float("inf")),
        ("finetune.dropout", 1),
        ("finetune.learning_rate", -1),
        ("finetune.steps", 0),
        ("finetune.batch_size", 0),
        ("finetune.warmup_steps", -1),
        ("model.sha256", "0" * 63),
        ("model.sha256", "G" * 64),
        ("model.url", "x"),
        ("evaluate.task", "x"),
        ("export.base", None),
    ],
)
def test_bad_jobs_name_the_field(tmp_path, key, value):
    data = {name: dict(section) for name, section in JOB.items()}
    load_job(job_file(tmp_path, yaml.safe_dump(data)))
    section, _, field = key.partition(".")
    data.setdefault(section, {})[field] = value
    with pytest.raises(BadInput, match=re.escape(f"'{section if section == 'evaluate' else key}")) as caught:
        load_job(job_file(tmp_path, yaml.safe_dump(data)))
    assert "job.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: [\n", "cannot read the recipe"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot read the recipe"),
        ("export: 3\n", "'export'"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path, text, message):
    with pytest.raises(BadInput, match=message) as caught:
        load_job(job_file(tmp_path, text))
    assert "job.yaml" in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot read the recipe"):
        load_job(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot read the recipe"):
        load_job(tmp_path / "binary.yaml")


def test_settings_are_read_as_yaml_and_reach_any_depth():
    data = {"export": {"compress": {"mode": "none", "ratio": 1.0}}}
    settings = ("export.compress.ratio=0.5", "finetune.search_space=[8, 4]", "export.numerics=false", "a=x=y")
    apply_settings(data, settings)
    assert data == {
        "export": {"compress": {"mode": "none", "ratio": 0.5}, "numerics": False},
        "finetune": {"search_space": [8, 4]},
        "a": "x=y",
    }


def test_the_last_setting_wins():
    data: dict[str, object] = {}
    apply_settings(data, ("a=1", "a=2"))
    assert data == {"a": 2}


@pytest.mark.parametrize("setting", ["a", "=1", "", "a.b.c=1", "a=[", "a=: :"])
def test_bad_settings_are_refused(setting):
    with pytest.raises(UsageError) as caught:
        apply_settings({"a": 1}, (setting,))
    assert caught.value.exit_code == 2 and caught.value.where == "--set"


def test_settings_and_options_win_over_the_file(tmp_path):
    path = job_file(tmp_path, "export: {base: b, compress: {mode: int4_sym, ratio: 0.5}}\n")
    with pytest.raises(BadInput, match=r"'export\.output'"):
        load_job(path)
    job = load_job(path, ("export.output=set", "export.base=set"), {"output": "option", "compress": {"ratio": 0.25}})
    assert job.export.base == Path("set") and job.export.output == Path("option")
    assert job.export.compress.mode == "int4_sym" and job.export.compress.ratio == 0.25
    with pytest.raises(BadInput, match=r"'export\.surprise'"):
        load_job(path, (), {"output": "o", "surprise": 1})
    assert load_job(job_file(tmp_path, "quantize: {}\n"), (), MINIMAL).export == make_recipe(MINIMAL)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path):
    job = load_job(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(written) <= set(Job.model_fields) and written["export"].keys() <= Recipe.model_fields.keys()
    # What is written is what is loaded: nothing is dropped or rewritten on the way.
    loaded = job.model_dump(mode="json", exclude_unset=True)
    assert loaded == written


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_comments_of_shipped_recipes_promise_is_true(path):
    text = path.read_text(encoding="utf-8")
    for setting in re.findall(r"--set ([^`\s]+)", text):
        load_job(path, (setting,))
    section = ""
    for line in text.splitlines():
        if found := re.match(r"^(\w+):", line):
            section = found[1]
        # `pattern: unstructured   # or 2:4, 4:8` names other values of the field.
        if found := re.match(r"^\s+(\w+): .*#\s*or (.+)$", line):
            for value in found[2].split(","):
                load_job(path, (f'{section}.{found[1]}="{value.strip()}"',))


def test_there_are_shipped_recipes_with_the_demo_among_them():
    assert "demo.yaml" in [path.name for path in CONFIGS]


def test_defaults_are_checked_too():
    assert FinetuneRecipe().search_space[0] == max(FinetuneRecipe().search_space)


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("export:\n  base: a\n  output: b\n  base: c\n")
    with pytest.raises(BadInput, match="cannot read the recipe"):
        load_job(path)
