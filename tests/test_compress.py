"""The comparison of a compressed weight with its source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparseport.compress import _STEPS_OF_ROUNDING, _facts, error_in_steps
from sparseport.errors import FidelityError
from sparseport.nls.quantize import quantize_rtn
from sparseport.weights.linear import QuantizedWeight


@pytest.fixture
def pair():  # type: ignore[no-untyped-def]
    """A weight of more rows than one block, and its INT4 rounding."""
    values = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    return values, quantize_rtn(values, None, group_size=32)


def test_rounding_is_within_half_a_step(pair) -> None:  # type: ignore[no-untyped-def]
    values, weight = pair
    largest, mean = error_in_steps(weight, values)
    assert 0.45 < largest <= 0.55 and 0.2 < mean < 0.3
    assert (
        _facts("u4", weight, values, _STEPS_OF_ROUNDING, "layer")["compression_error_steps"]["max"] == f"{largest:.3f}"
    )


@pytest.mark.parametrize("row", [0, 299])
def test_one_code_two_steps_off_is_refused(pair, row: int) -> None:  # type: ignore[no-untyped-def]
    values, weight = pair
    codes = weight.codes.copy()
    codes[row, 5] = codes[row, 5] + 2 if codes[row, 5] < 8 else codes[row, 5] - 2
    with pytest.raises(FidelityError, match="not the source"):
        _facts("u4", replace(weight, codes=codes), values, _STEPS_OF_ROUNDING, "layer")


def test_the_sign_of_a_scale_has_no_say(pair) -> None:  # type: ignore[no-untyped-def]
    """NNCF's symmetric modes have negative scales: a wrong code is a distance, whatever the sign."""
    values, weight = pair
    turned = replace(weight, scales=-weight.scales)
    largest, mean = error_in_steps(turned, values)
    assert largest > 5 and mean > 1
    with pytest.raises(FidelityError, match="not the source"):
        _facts("i4", turned, values, _STEPS_OF_ROUNDING, "layer")
    mirrored = replace(weight, codes=15 - weight.codes, zero_points=15 - weight.zero_points, scales=-weight.scales)
    assert error_in_steps(mirrored, values) == error_in_steps(weight, values)


def test_a_row_of_next_to_nothing_is_measured_beyond_its_scale_s_rounding() -> None:
    """TinyLlama's row for unknown tokens: float16 has no scale nearer than 6 % to the one that it needs."""
    values = np.linspace(-1.6e-5, 1.6e-5, 64, dtype=np.float32)[None]
    exact = np.float32((values.max() - values.min()) / 255)
    codes = np.clip(np.rint(values / exact) + 128, 0, 255).astype(np.uint8)
    stored = np.array([[exact]], np.float16)
    assert abs(float(stored[0, 0]) / exact - 1) > 0.04
    weight = QuantizedWeight(codes, stored, np.full((1, 1), 128, np.uint8), 64, 8)
    assert error_in_steps(weight, values)[0] < 1.01
    wrong = QuantizedWeight(codes[:, ::-1].copy(), stored, weight.zero_points, 64, 8)
    assert error_in_steps(wrong, values)[0] > 100
