"""Super-networks of every method: which weights run beside the adapter, and which bases are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from super_networks import KINDS, folder_of, recipe_of, super_network  # noqa: E402

from sparseport.checkpoints.folder import ModelFolder  # noqa: E402
from sparseport.checkpoints.gptq import read_gptq_linear, read_quantization_config  # noqa: E402
from sparseport.errors import BadInput  # noqa: E402
from sparseport.nls.elastic import elastic_layers  # noqa: E402
from sparseport.nls.finetune import save_adapter  # noqa: E402
from sparseport.nls.load import load_dense, load_for_training, load_int4, restore_adapter  # noqa: E402
from sparseport.recipe import FinetuneRecipe  # noqa: E402
from sparseport.weights.rounding import dequantize  # noqa: E402

IDS = torch.tensor([[5, 17, 2, 60, 33, 8, 91, 4]])
QUERY = "model.layers.1.self_attn.q_proj"


def recipe(method: str, **changes: object) -> FinetuneRecipe:
    return FinetuneRecipe.model_validate({"method": method, "search_space": [8, 4], "alpha": 16, **changes})


def logits(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("method", ["lora", "shears", "sqft", "sparse_peft", "qa_sparse_peft", "lonas"])
def test_each_method_has_its_mask_and_its_grid(method, tiny_base, tiny_sparse, tiny_int4):
    base = {"lora": tiny_base, "lonas": tiny_base, "sqft": tiny_int4}.get(method, tiny_sparse)
    more = {"width_multiple": 16} if method == "lonas" else {}
    model = load_for_training(base, recipe(method, **more), tiny_int4 if method == "qa_sparse_peft" else None)
    layers = dict(elastic_layers(model))
    assert all((layer.mask is not None) == (method in ("sparse_peft", "qa_sparse_peft")) for layer in layers.values())
    assert all((layer.grid is not None) == (method == "qa_sparse_peft") for layer in layers.values())
    trained = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"a", "b"}
    # A fresh adapter changes nothing: the model is the base that the method runs on.
    if method == "qa_sparse_peft":
        with ModelFolder.open(tiny_int4) as folder:
            want = dequantize(
                read_gptq_linear(folder, "model.layers.1.self_attn.o_proj", read_quantization_config(folder))
            )
        assert np.array_equal(model.get_submodule("model.layers.1.self_attn.o_proj").weight.numpy(), want)
    else:
        assert torch.equal(logits(model), logits(load_int4(base) if method == "sqft" else load_dense(base)))


def test_sqft_runs_on_dequantised_weights_and_its_adapter_is_dense(tiny_int4):
    model = load_for_training(tiny_int4, recipe("sqft"))
    layer = dict(elastic_layers(model))[QUERY]
    with ModelFolder.open(tiny_int4) as folder:
        weight = read_gptq_linear(folder, QUERY, read_quantization_config(folder))
    assert np.array_equal(layer.base.weight.detach().numpy(), dequantize(weight))
    with torch.no_grad():
        layer.b.fill_(0.1)
    x = torch.randn(3, 64)
    dense = torch.from_numpy(dequantize(weight)) + layer.scaling * layer.b @ layer.a
    assert torch.allclose(layer.eval()(x), x @ dense.T, atol=1e-5)
    assert (dense.detach().numpy()[weight.codes == 8] != 0).all()


@pytest.mark.parametrize(
    ("method", "base", "message"),
    [
        ("lora", "sparse", "lora trains on a dense base"),
        ("lonas", "sparse", "lonas trains on a dense base"),
        ("sparse_peft", "base", "sparse_peft trains on a sparse base"),
        ("sqft", "sparse", "sqft trains on an INT4 base"),
        ("shears", "int4", "shears trains on a floating-point base"),
        ("qa_sparse_peft", "sparse", "INT4 base together"),
    ],
)
def test_a_base_that_the_method_could_not_be_merged_into_is_refused(
    method, base, message, tiny_base, tiny_sparse, tiny_int4
):
    folder = {"base": tiny_base, "sparse": tiny_sparse, "int4": tiny_int4}[base]
    with pytest.raises(BadInput, match=message):
        load_for_training(folder, recipe(method, width_multiple=16))


def test_a_floating_point_folder_in_place_of_the_int4_one_is_refused(tiny_sparse):
    with pytest.raises(BadInput, match="INT4"):
        load_for_training(tiny_sparse, recipe("qa_sparse_peft"), tiny_sparse)


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_comes_back_as_it_was_saved(kind, tmp_path):
    base = folder_of(kind, tmp_path / "base")
    made = super_network(base, recipe_of(kind))
    save_adapter(made, recipe_of(kind), "base", tmp_path / "adapter")
    again = load_for_training(base, recipe_of(kind))
    assert not torch.equal(logits(again), logits(made))
    restore_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(made))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_space": [6, 4]}, "shapes"),
        ({"alpha": 8}, "another scaling"),
        ({"target_modules": ["q_proj", "v_proj"]}, "does not have the modules"),
    ],
)
def test_an_adapter_of_another_recipe_is_refused(changes, message, tmp_path):
    base = folder_of("llama", tmp_path / "base")
    save_adapter(load_for_training(base, recipe_of("llama")), recipe_of("llama"), "base", tmp_path / "adapter")
    with pytest.raises(BadInput, match=message):
        restore_adapter(load_for_training(base, recipe_of("llama", **changes)), tmp_path / "adapter")


def test_without_nls_there_is_no_search_space_beside_the_adapter(tiny_base: Path, tmp_path: Path):
    plain = recipe("lora", nls=False)
    save_adapter(load_for_training(tiny_base, plain), plain, "tiny", tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_widths_and_int4_groups_go_together(tiny_sparse, tiny_int4, tmp_path):
    """Columns of an INT4 layer that a width cuts: the codes of the cut layer are those of the whole one."""
    wide = recipe("qa_sparse_peft", widths=[128, 96, 48], width_multiple=16, target_modules="all-linear")
    model = load_for_training(tiny_sparse, wide, tiny_int4)
    layer = dict(elastic_layers(model))["model.layers.0.mlp.down_proj"]
    whole = layer.codes()
    layer.active_columns = 48  # groups of 32 are split
    assert layer.codes().shape == (64, 48) and torch.equal(layer.codes(), whole[:, :48])
    x = torch.randn(2, 48)
    layer.eval()
    cut = layer(x)
    layer.active_columns = 128
    assert torch.allclose(cut, layer(torch.nn.functional.pad(x, (0, 80))), atol=1e-5)
