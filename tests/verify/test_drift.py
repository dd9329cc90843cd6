"""The numbers that describe how far logits drifted."""

from __future__ import annotations

import numpy as np
import pytest

from sparseport.verify.numerics import drift


def test_equal_logits_do_not_drift() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    assert drift(logits, logits) == {"max_abs": "0.000e+00", "kl": "0.000e+00", "top1": "1.0000"}


def test_known_divergence() -> None:
    """Reference (1/2, 1/2) against (3/4, 1/4): KL = ln 2 - ln 3 / 2."""
    reference = np.log(np.array([[0.5, 0.5], [0.75, 0.25]], np.float32))
    logits = np.log(np.array([[0.75, 0.25], [0.25, 0.75]], np.float32))
    measured = drift(reference[:1], logits[:1])
    assert float(measured["kl"]) == pytest.approx(np.log(2) - np.log(3) / 2, rel=1e-3)
    assert drift(reference[1:], logits[1:])["top1"] == "0.0000"


def test_shift_of_all_logits_is_no_divergence() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    measured = drift(logits, logits + 3)
    assert float(measured["kl"]) < 1e-10 and float(measured["max_abs"]) == pytest.approx(3, rel=1e-3)


def test_nan_is_not_a_small_difference() -> None:
    logits = np.zeros((2, 3), np.float32)
    broken = logits.copy()
    broken[1, 1] = np.nan
    assert not float(drift(logits, broken)["max_abs"]) <= 1e-3


@pytest.mark.parametrize(("error", "fine"), [(4e-3, True), (2e-2, False), (float("nan"), False)])
def test_float64judgeds_where_float32_is_not_exact_enough(error: float, fine: bool) -> None:
    """A stand-in network that is off by 3e-3 in float32 and exact in float64."""
    from types import SimpleNamespace

    torch = pytest.importorskip("torch")
    from sparseport.verify.numerics import judged, logits_of

    class Network:
        noise = 3e-3

        def double(self) -> Network:
            self.noise = 0.0
            return self

        def __call__(self, ids: object) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(1, 2, 3) + self.noise)

    network = Network()
    reference = logits_of(network, [1, 2])
    judged = judged(network, [1, 2], reference, np.full((2, 3), error, np.float32))
    assert (float(judged["judged_max_abs"]) <= float(judged["allowed"])) == fine
