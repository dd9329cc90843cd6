"""The ground floor: weights as plain numpy data, and the named conventions of packing and rounding them."""
