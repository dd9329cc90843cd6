"""Search spaces from recipes: their order, what is shared, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from super_networks import KINDS, folder_of, recipe_of  # noqa: E402

from sparseport.checkpoints.elastic import (  # noqa: E402
    FILE_NAME,
    OWN_FILE_NAME,
    SearchSpace,
    open_search_space,
    save_search_space,
)
from sparseport.errors import BadInput, Unsupported  # noqa: E402
from sparseport.nls.load import load_for_training, sketch  # noqa: E402
from sparseport.nls.space import adapted_modules, search_space  # noqa: E402
from sparseport.recipe import FinetuneRecipe  # noqa: E402

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Architecture -> model without weights."""
    made = {}
    for kind in KINDS:
        made[kind] = sketch(folder_of(kind, tmp_path_factory.mktemp(kind)))
    return made


def short(space: SearchSpace) -> list[tuple[str, tuple[int, ...], str]]:
    """(kind, sizes, first and last target) of each group."""
    return [(g.kind, g.sizes, f"{g.targets[0]}..{g.targets[-1].rpartition('.')[2]}") for g in space.groups]


def test_sqft_has_one_rank_for_each_layer(sketches):
    space = search_space(sketches["llama"], FinetuneRecipe(method="sqft"))
    assert [group.targets for group in space.groups] == [
        tuple(f"model.layers.{i}.self_attn.{name}" for name in QKV) for i in range(4)
    ]
    assert {group.sizes for group in space.groups} == {(32, 24, 16)}


def test_a_rank_for_each_module(sketches):
    space = search_space(sketches["llama"], FinetuneRecipe(rank_sharing="module"))
    assert [group.targets[0] for group in space.groups] == [
        f"model.layers.{i}.self_attn.{name}" for name in QKV for i in range(4)
    ]
    assert all(len(group.targets) == 1 for group in space.groups)


def test_shears_groups_go_list_by_list_and_layer_by_layer(sketches):
    space = search_space(sketches["llama"], FinetuneRecipe(method="shears"))
    assert [group.targets[-1] for group in space.groups] == [
        f"model.layers.{i}.{last}" for last in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj") for i in range(4)
    ]


def test_lonas_has_ranks_then_widths_then_heads_then_blocks(sketches):
    recipe = FinetuneRecipe(method="lonas", heads=(2, 1), elastic_blocks=(3, 1), width_multiple=16)
    space = search_space(sketches["llama"], recipe)
    assert short(space) == [
        *(("rank", (32, 28), f"model.layers.{i}.self_attn.q_proj..v_proj") for i in range(4)),
        *(("rank", (32, 28), f"model.layers.{i}.mlp.gate_proj..up_proj") for i in range(4)),
        *(("width", (128, 112, 96, 80, 64), f"model.layers.{i}.mlp.gate_proj..up_proj") for i in range(4)),
        *(("heads", (2, 1), f"model.layers.{i}.self_attn..self_attn") for i in range(4)),
        *(("block", (1, 0), f"model.layers.{i}..{i}") for i in (1, 3)),
    ]


def test_the_space_is_read_back_as_it_was(sketches, tmp_path):
    for recipe, name in ((FinetuneRecipe(), FILE_NAME), (recipe_of("llama"), OWN_FILE_NAME)):
        space = search_space(sketches["llama"], recipe)
        assert save_search_space(tmp_path, space.groups).name == name
        assert open_search_space(tmp_path / name) == space


def test_without_nls_there_is_no_space(sketches):
    assert search_space(sketches["llama"], FinetuneRecipe(method="lora", nls=False)).groups == ()


def test_adapters_on_all_weight_matrices(sketches):
    """The enhancement of LoNAS by Sukthanker et al.: adapters everywhere, whole blocks elastic."""
    recipe = FinetuneRecipe.model_validate(
        {"method": "lonas", "target_modules": "all-linear", "elastic_blocks": {"all_but_first": 1}, "widths": []}
    )
    names = adapted_modules(sketches["llama"], recipe)
    assert len(names) == 4 * 7 and "model.layers.3.self_attn.o_proj" in names and "lm_head" not in names
    space = search_space(sketches["llama"], recipe)
    assert [group.targets[0] for group in space.groups if group.kind == "block"] == [
        f"model.layers.{i}" for i in (1, 2, 3)
    ]


def test_other_trees(sketches):
    opt = search_space(sketches["opt"], recipe_of("opt"))
    assert short(opt)[0] == ("rank", (8, 6, 4), "model.decoder.layers.0.self_attn.v_proj..q_proj")
    assert ("width", (128, 96, 64), "model.decoder.layers.3.fc1..fc1") in short(opt)
    neox = search_space(sketches["gpt_neox"], recipe_of("gpt_neox"))
    assert short(neox)[0] == ("rank", (8, 6, 4), "gpt_neox.layers.0.attention.query_key_value..query_key_value")


@pytest.mark.parametrize(
    ("kind", "changes", "message", "allowed"),
    [
        ("llama", {"target_modules": ["q_proj", "fc1"], "elastic_modules": ["q_proj"]}, "target modules", "gate_proj"),
        ("gpt_neox", {"target_modules": ["q_proj"], "elastic_modules": ["q_proj"]}, "target", "query_key_value"),
        ("llama", {"width_modules": ["fc1"]}, "width modules", "up_proj"),
        ("llama", {"width_modules": ["up_proj"]}, "keep different widths", "one width for gate_proj and up_proj"),
        ("llama", {"width_modules": ["down_proj"], "widths": [1.0, 0.5]}, "takes in the rows", "up_proj -> down_proj"),
        ("llama", {"widths": [160, 128]}, "above the layer's rows", "at most 128"),
        ("llama", {"widths": [128, 72]}, "no multiple of 32 rows", "64 or 96"),
        ("llama", {"widths": [1.0, 0.875]}, "no multiple of 32 rows", "0.75 or 1"),
        ("llama", {"widths": [1.0, 0.3], "width_multiple": 8}, "no multiple of 8", "0.25 or 0.3125"),
        ("llama", {"widths": [1.0, 0.9999999]}, "the same number of rows", "at most 0.75 after 128"),
        ("llama", {"widths": [0.25, 0.24999999]}, "the same number of rows", "none after 32"),
        ("llama", {"search_space": [33, 8], "alpha": 66}, "above the smaller side", "at most 32"),
        ("llama", {"heads": [3, 1]}, "key-value heads", "1 to 2"),
        ("llama", {"elastic_blocks": [0, 4]}, "no such block", "0 to 3"),
        ("llama", {"elastic_blocks": [0, 1, 2, 3]}, "nothing would be left", "at most 3 of 4"),
        ("llama", {"elastic_blocks": {"all_but_first": 3, "all_but_last": 1}}, "no block is left to", "below 4"),
        ("llama", {"elastic_blocks": {"all_but_first": 0}}, "nothing would be left", "at most 3 of 4"),
    ],
)
def test_impossible_spaces_are_refused_with_what_is_allowed(sketches, kind, changes, message, allowed):
    with pytest.raises((BadInput, Unsupported), match=message) as caught:
        search_space(sketches[kind], recipe_of(kind, **changes))
    assert allowed in caught.value.expected


def test_heads_of_fused_projections_are_refused(sketches):
    with pytest.raises(Unsupported, match="heads") as caught:
        search_space(sketches["gpt_neox"], recipe_of("gpt_neox", heads=[4, 2]))
    assert "query_key_value" in caught.value.found


def test_a_space_without_elastic_modules_is_refused(sketches):
    recipe = FinetuneRecipe(target_modules=("up_proj", "down_proj"))
    with pytest.raises(BadInput, match="no adapter is elastic"):
        search_space(sketches["llama"], recipe)
    search_space(sketches["llama"], recipe.model_copy(update={"nls": False}))


def test_an_impossible_space_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = folder_of("llama", tmp_path)
    monkeypatch.setattr("sparseport.nls.load.load_plain", lambda folder: pytest.fail("weights were read"))
    with pytest.raises(BadInput, match="above the layer's rows"):
        load_for_training(base, recipe_of("llama", widths=[256, 128]))


def test_ranks_are_looked_at_without_a_space_too(sketches):
    recipe = FinetuneRecipe(nls=False, search_space=(33,), target_modules=("up_proj", "v_proj"))
    with pytest.raises(BadInput, match="above the smaller side") as caught:
        search_space(sketches["llama"], recipe)
    assert caught.value.where == "model.layers.0.self_attn.v_proj"
    search_space(sketches["llama"], recipe.model_copy(update={"target_modules": ("up_proj",)}))


def test_a_share_of_one_row_is_not_taken_for_the_row() -> None:
    from sparseport.nls.space import _rows

    with pytest.raises(BadInput, match="no multiple of 1 rows"):
        _rows(FinetuneRecipe(widths=(0.5,), width_multiple=1), 1, "layer")


@given(st.integers(1, 64), st.integers(1, 64), st.data())
def test_widths_are_multiples_within_the_layer_or_refused(step: int, times: int, data: st.DataObject) -> None:
    from sparseport.nls.space import _rows

    whole = step * times
    parts = sorted(data.draw(st.sets(st.integers(1, times), min_size=1)), reverse=True)
    fractions = tuple(part / times for part in parts)
    recipe = FinetuneRecipe(widths=fractions, width_multiple=step)
    assert _rows(recipe, whole, "layer") == tuple(part * step for part in parts)
    off = data.draw(st.floats(0.01, 1))
    if abs(off * whole / step - int(off * whole / step + 0.5)) > 1e-3 and off < 1:
        with pytest.raises(BadInput, match="no multiple"):
            _rows(FinetuneRecipe(widths=(off,), width_multiple=step), whole, "layer")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lonas", "widths": []}, "lonas without widths"),
        ({"nls": False, "heads": [2, 1]}, "nls: true"),
        ({"widths": [1.5, 1.0]}, "all fractions"),
        ({"widths": [128, 0.5]}, "all fractions"),
        ({"widths": [0.5, 1.0]}, "largest first"),
        ({"heads": [2, 2]}, "largest first"),
        ({"elastic_modules": ["o_proj"]}, "o_proj, which target_modules does not"),
        ({"elastic_modules": [["q_proj"], ["q_proj"]]}, "named twice"),
        ({"elastic_modules": ["self_attn.q_proj"]}, "last part"),
        ({"target_modules": "every"}, "valid"),
        ({"microbatches": 17}, "batch_size is at least as large"),
    ],
)
def test_recipes_that_contradict_themselves(fields, message):
    with pytest.raises(ValidationError, match=message):
        FinetuneRecipe.model_validate(fields)


def test_defaults_are_those_of_the_papers_and_give_way():
    assert FinetuneRecipe(method="sqft").learning_rate == 1e-4 and FinetuneRecipe().learning_rate == 3e-4
    lonas = FinetuneRecipe(method="lonas", search_space=(8, 4))
    assert lonas.search_space == (8, 4) and lonas.widths == (1.0, 0.875, 0.75, 0.625, 0.5)
    assert lonas.model_dump(exclude_unset=True) == {"method": "lonas", "search_space": (8, 4)}
    assert FinetuneRecipe(method="lonas", nls=False).widths == ()
