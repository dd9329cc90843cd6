"""What verification looks for beyond digests: weights in their own place, and none that nobody certified."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparseport.errors import VerificationError
from sparseport.targets.openvino.readback import OpenVinoReader
from sparseport.verify.bits import digest_graph

ov = pytest.importorskip("openvino")

FACTS = {"layer": {"shape": [4, 8], "group_size": None}}


def _graph(place: str = "__module.layer/matmul", *, transpose: bool = True, extra: str | None = None) -> Any:
    from openvino import opset13 as ops

    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    x = ops.parameter([-1, 8], np.float32, name="x")
    weight = ops.constant(values if transpose else values.T.copy(), name="layer.weight")
    y = ops.matmul(x, weight, False, transpose, name=place)
    if extra is not None:
        y = ops.matmul(y, ops.constant(np.ones((3, 4), np.float32), name=extra), False, True)
    return OpenVinoReader(ov.Model([y], [x], "graph"))


def test_a_weight_in_its_place_is_digested() -> None:
    found = digest_graph(_graph(), FACTS, {})
    assert set(found.linears) == {"layer"} and found.unproven == []


@pytest.mark.parametrize("place", ["__module.other/matmul", "__module.layer2/matmul", "matmul"])
def test_a_weight_in_another_layer_is_refused(place: str) -> None:
    with pytest.raises(VerificationError, match="another layer"):
        digest_graph(_graph(place), FACTS, {})


def test_a_weight_used_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(VerificationError, match="does not feed a linear layer"):
        digest_graph(_graph(transpose=False), FACTS, {})


@pytest.mark.parametrize("name", ["stray.weight", "Constant_7"])
def test_a_matrix_that_nobody_certified_is_named(name: str) -> None:
    assert digest_graph(_graph(extra=name), FACTS, {}).unproven == [name]


def test_two_constants_of_one_name_are_refused() -> None:
    with pytest.raises(VerificationError, match="one name"):
        digest_graph(_graph(extra="layer.weight"), FACTS, {})
