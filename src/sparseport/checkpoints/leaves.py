"""What the tensors of a linear layer's weight are called, in every dialect: the last part of `<module>.<leaf>`."""

from __future__ import annotations

# The leaf that makes a layer a packed one, and whose settings tell how to read it.
PACKED = {"qweight": "gptq or awq", "weight_packed": "compressed-tensors", "compressed": "compressed-tensors"}
# Leaves that make sense only as parts of a packed layer.
PARTS = (
    *PACKED,
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "bitmask",
    "row_offsets",
    "shape",
)
# Every linear layer has one of these.
MAIN = ("weight", *PACKED)
# Everything that a weight can be made of.
WEIGHT_PARTS = ("weight", *PARTS)
