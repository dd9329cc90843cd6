"""Sub-networks: what a selection leaves of a model, and cuts that change no value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.checkpoints.elastic import Selection
from sparseport.errors import BadInput, Unsupported
from sparseport.merge.subnetwork import SubNetwork, cut_branch, cut_small, cut_weight, sub_network
from sparseport.weights.linear import DenseWeight, LowRankBranch, QuantizedWeight
from sparseport.weights.rounding import dequantize

CONFIG = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "num_hidden_layers": 3}
ATTENTION, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"


def llama(layers: int = 3) -> dict[str, tuple[int, int]]:
    shapes = {}
    for number in range(layers):
        attention, mlp = ATTENTION.format(number), MLP.format(number)
        shapes |= {f"{attention}.q_proj": (48, 48), f"{attention}.k_proj": (24, 48), f"{attention}.v_proj": (24, 48)}
        shapes |= {f"{attention}.o_proj": (48, 48), f"{mlp}.gate_proj": (96, 48), f"{mlp}.up_proj": (96, 48)}
        shapes[f"{mlp}.down_proj"] = (48, 96)
    return shapes


def widths(number: int, rows: int) -> dict[str, int]:
    return {f"{MLP.format(number)}.{leaf}": rows for leaf in ("gate_proj", "up_proj")}


def test_widths_cut_the_channels_of_an_mlp():
    cut = sub_network(Selection(widths=widths(1, 64)), llama(), CONFIG)
    assert cut == SubNetwork("model.layers", (0, 1, 2), widths(1, 64), {"model.layers.1.mlp.down_proj": 64})
    assert cut.shape("model.layers.1.mlp.gate_proj", (96, 48)) == (64, 48)
    assert cut.shape("model.layers.1.mlp.down_proj", (48, 96)) == (48, 64)
    assert cut.shape("model.layers.0.mlp.down_proj", (48, 96)) == (48, 96)


def test_heads_are_cut_with_the_query_heads_that_share_them():
    attention = ATTENTION.format(2)
    cut = sub_network(Selection(heads={attention: 2}), llama(), CONFIG)
    assert cut.rows == {f"{attention}.q_proj": 32, f"{attention}.k_proj": 16, f"{attention}.v_proj": 16}
    assert cut.columns == {f"{attention}.o_proj": 32} and cut.heads == {attention: 2} and cut.sizes == {attention: 8}
    # LoNAS says the same by widths of q, k and v.
    by_width = {f"{attention}.{leaf}": rows for leaf, rows in {"q_proj": 32, "k_proj": 16, "v_proj": 16}.items()}
    assert sub_network(Selection(widths=by_width), llama(), CONFIG) == cut


def test_heads_and_widths_of_one_module_agree_or_are_refused():
    attention = ATTENTION.format(2)
    two = {f"{attention}.{leaf}": rows for leaf, rows in {"q_proj": 32, "k_proj": 16, "v_proj": 16}.items()}
    cut = sub_network(Selection(widths=two, heads={attention: 2}), llama(), CONFIG)
    assert cut.heads == {attention: 2}
    for heads in (1, 3):
        with pytest.raises(BadInput, match="different numbers of heads") as caught:
            sub_network(Selection(widths=two, heads={attention: heads}), llama(), CONFIG)
        assert str(heads) in caught.value.expected and "2" in caught.value.found


def test_blocks_are_left_out_and_the_rest_is_numbered_anew():
    selection = Selection(widths=widths(1, 64) | widths(2, 32), removed=frozenset(["model.layers.1"]))
    cut = sub_network(selection, llama(), CONFIG)
    assert cut.blocks == (0, 2) and cut.rows == widths(2, 32)
    assert cut.name("model.layers.1.mlp.up_proj.weight") is None
    assert cut.name("model.layers.2.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert cut.name("model.norm.weight") == "model.norm.weight" and cut.name("model.layers_norm") == "model.layers_norm"


def test_a_selection_of_everything_is_no_cut():
    heads = {ATTENTION.format(n): 3 for n in range(3)}
    assert sub_network(Selection({"x": 4}, widths(0, 96), heads), llama(), CONFIG) is None


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(widths=widths(0, 97)), r"1 to 96"),
        (Selection(widths={"model.layers.0.mlp.gate_proj": 64}), "gate_proj and up_proj"),
        (Selection(widths={"model.layers.9.mlp.gate_proj": 64}), "no such layer"),
        (Selection(heads={ATTENTION.format(0): 4}), "1 to 3"),
        (Selection(widths={f"{ATTENTION.format(0)}.q_proj": 20}), "multiple of 8"),
        (Selection(widths={f"{ATTENTION.format(0)}.q_proj": 32}), "q_proj 32, k_proj 24"),
        (Selection(removed=frozenset(["model.layers.3"])), "model.layers.0 to model.layers.2"),
        (Selection(removed=frozenset(f"model.layers.{n}" for n in range(3))), "without any block"),
    ],
)
def test_impossible_selections_are_refused_with_what_is_allowed(selection, message):
    with pytest.raises(BadInput, match=message):
        sub_network(selection, llama(), CONFIG)


def test_fused_projections_are_refused():
    shapes = {"h.0.attention.query_key_value": (72, 24), "h.0.attention.dense": (24, 24)}
    with pytest.raises(Unsupported, match="q_proj"):
        sub_network(Selection(heads={"h.0.attention": 1}), shapes, CONFIG)
    with pytest.raises(Unsupported, match="takes in the rows"):
        sub_network(Selection(widths={"h.0.attention.dense": 8}), shapes, CONFIG)


def test_other_mlps_are_known():
    shapes = {"model.decoder.layers.0.fc1": (96, 24), "model.decoder.layers.0.fc2": (24, 96)}
    cut = sub_network(Selection(widths={"model.decoder.layers.0.fc1": 32}), shapes, CONFIG)
    assert cut.prefix == "model.decoder.layers" and cut.columns == {"model.decoder.layers.0.fc2": 32}


@given(st.sampled_from([8, 16, 64, 96]), st.integers(1, 4), st.data())
def test_a_cut_int4_weight_is_a_part_of_the_whole(group, groups, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    columns = group * groups
    kept_rows, kept = data.draw(st.integers(1, 5)), data.draw(st.integers(1, columns))
    weight = QuantizedWeight(
        rng.integers(0, 16, (5, columns), np.uint8),
        rng.uniform(0.1, 1, (5, groups)).astype(np.float16),
        rng.integers(0, 16, (5, groups), np.uint8),
        group,
        mask=rng.random((5, columns)) < 0.5,
    )
    cut = cut_weight(weight, kept_rows, kept, "layer").check("layer")
    assert cut.shape == (kept_rows, kept) and group % cut.group_size == 0
    assert np.array_equal(dequantize(cut), dequantize(weight)[:kept_rows, :kept])
    assert np.array_equal(cut.codes, weight.codes[:kept_rows, :kept])
    assert np.array_equal(cut.mask, weight.mask[:kept_rows, :kept])
    assert cut.scales.dtype == np.float16


def test_act_order_keeps_its_columns():
    order = np.arange(16, dtype=np.int32)[::-1].copy()
    one = np.ones((4, 2), np.float16)
    weight = QuantizedWeight(np.zeros((4, 16), np.uint8), one, np.zeros((4, 2), np.uint8), 8, input_order=order)
    assert cut_weight(weight, 2, None, "layer").shape == (2, 16)
    with pytest.raises(Unsupported, match="act-order"):
        cut_weight(weight, None, 8, "layer")


def test_a_cut_mlp_computes_what_the_masked_one_does():
    """The cut layers against the whole ones with everything beyond the width set to zero."""
    rng = np.random.default_rng(0)
    gate, up, down = rng.normal(size=(96, 48)), rng.normal(size=(96, 48)), rng.normal(size=(48, 96))
    x = rng.normal(size=48)
    cut = sub_network(Selection(widths=widths(0, 40)), llama(1), CONFIG)

    def mlp(gate, up, down):
        inner = gate @ x
        return down @ (inner / (1 + np.exp(-inner)) * (up @ x))

    def part(leaf, values):
        module = f"model.layers.0.mlp.{leaf}"
        return cut_weight(DenseWeight(values), cut.rows.get(module), cut.columns.get(module), module).values

    masked = [values * (np.arange(96) < 40)[:, None] for values in (gate, up)]
    small = mlp(part("gate_proj", gate), part("up_proj", up), part("down_proj", down))
    assert part("down_proj", down).shape == (48, 40)
    np.testing.assert_allclose(small, mlp(*masked, down), rtol=1e-12)


def test_branches_and_biases_are_cut_with_their_layer():
    branch = LowRankBranch(np.arange(12.0).reshape(2, 6), np.arange(10.0).reshape(5, 2), 2.0)
    cut = cut_branch(branch, 3, 4)
    assert np.array_equal(cut.b @ cut.a, (branch.b @ branch.a)[:3, :4]) and cut.scaling == 2.0
    attention = ATTENTION.format(0)
    heads = sub_network(Selection(heads={attention: 1}), llama(), CONFIG)
    assert cut_small(f"{attention}.q_proj.bias", np.arange(48), heads).tolist() == list(range(16))
    assert cut_small(f"{attention}.o_proj.bias", np.arange(48), heads).size == 48
    assert cut_small(f"{attention}.q_norm.weight", np.arange(8), heads).size == 8
    with pytest.raises(Unsupported, match="runs over all"):
        cut_small(f"{attention}.q_norm.weight", np.arange(48), heads)
