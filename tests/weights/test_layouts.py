"""Groups that each runtime's kernels can hold: OpenVINO never gets a size it computes wrongly, nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import Unsupported
from sparseport.weights.grouping import collapse, without_filling
from sparseport.weights.layouts import (
    MATMULNBITS_BLOCKS,
    PORTABLE_BLOCKS,
    GroupLayout,
    in_layout,
    matmulnbits_layout,
    openvino_group_size,
    openvino_layout,
)
from sparseport.weights.linear import QuantizedWeight


def test_openvino_gets_safe_group_sizes_only():
    for size in range(1, 1100):
        assert openvino_group_size(size, size, "layer") == size  # one group per row is always safe
        powers = [power for power in (8, 16, 32, 64) if size % power == 0]
        if not powers:
            with pytest.raises(Unsupported, match="computes this group size wrongly") as caught:
                openvino_group_size(size, 3 * size, "layer")
            assert caught.value.code == "E_GROUP" and caught.value.exit_code == 7
            continue
        chosen = openvino_group_size(size, 3 * size, "layer")
        assert size % chosen == 0
        assert chosen in (8, 16, 32) or chosen % 64 == 0
        assert chosen == (size if size % 64 == 0 else max(powers))


@pytest.mark.parametrize(
    ("size", "chosen"),
    [
        (8, 8),
        (16, 16),
        (24, 8),
        (32, 32),
        (40, 8),
        (48, 16),
        (64, 64),
        (80, 16),
        (96, 32),
        (112, 16),
        (120, 8),
        (128, 128),
        (160, 32),
        (192, 192),
        (240, 16),
        (256, 256),
        (320, 320),
        (480, 32),
        (1024, 1024),
    ],
)
def test_openvino_group_size_table(size, chosen):
    assert openvino_group_size(size, 15 * 1024 * size, "layer") == chosen


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 10, 12, 15, 20, 30, 36, 50, 60, 63, 86, 91, 100, 125, 250, 500])
def test_openvino_refuses_what_cannot_be_split(size):
    with pytest.raises(Unsupported):
        openvino_group_size(size, 4 * size, "layer")


def test_every_group_size_has_a_layout_for_openvino():
    for size in range(1, 700):
        layout = openvino_layout(size, 3 * size, "layer")
        assert layout.block in (8, 16, 32) or layout.block % 64 == 0
        assert size % layout.part == 0 and layout.part <= layout.block < layout.part + 64
    sizes = (1, 5, 12, 20, 36, 96, 100)
    assert [openvino_layout(size, 960, "layer").block for size in sizes] == [8, 8, 16, 32, 64, 32, 128]


@pytest.mark.parametrize("blocks", [MATMULNBITS_BLOCKS, PORTABLE_BLOCKS])
def test_matmulnbits_gets_its_own_blocks_only(blocks):
    for size in range(1, 700):
        try:
            layout = matmulnbits_layout(size, "layer", blocks)
        except Unsupported as refusal:
            # Only where even the largest part would grow more than fourfold.
            largest = max(part for part in range(1, blocks[-1] + 1) if size % part == 0)
            assert refusal.code == "E_GROUP" and largest < blocks[0] / 4
            continue
        assert size % layout.part == 0 and layout.block in blocks
        assert layout.part <= layout.block <= 4 * layout.part
        if size in blocks:
            assert layout == GroupLayout(size, size)


@pytest.mark.parametrize(
    ("size", "part", "block"), [(96, 32, 32), (12, 12, 16), (576, 64, 64), (512, 256, 256), (8, 8, 16), (100, 100, 128)]
)
def test_matmulnbits_layout_table(size, part, block):
    assert matmulnbits_layout(size, "layer") == GroupLayout(part, block)


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4), st.sampled_from([4, 5, 8, 12, 16, 36, 48, 64, 96]))
def test_a_layout_is_undone_exactly(seed, out, groups, size):
    random = np.random.default_rng(seed)
    weight = QuantizedWeight(
        random.integers(0, 16, (out, groups * size), np.uint8),
        random.uniform(0.01, 1, (out, groups)).astype(np.float16),
        random.integers(0, 16, (out, groups), np.uint8),
        size,
    )
    for layout in (openvino_layout(size, groups * size, "layer"), matmulnbits_layout(size, "layer")):
        stored = in_layout(weight, layout)
        assert stored.group_size == layout.block
        found = collapse(without_filling(stored, "layer"), size, "layer")
        assert found.group_size == size and found.input_order is None
        for part in ("codes", "scales", "zero_points"):
            assert np.array_equal(getattr(found, part), getattr(weight, part))
