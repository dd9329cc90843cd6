"""Attention with a KV cache, and rotary positions, in primitive standard operators.

The attention mask int64 [batch, past + new] alone says which token stands where: a token's position is the number of
real tokens before it in its row. ONNX Runtime's GroupQueryAttention counts the same way, from the sums of the mask's
rows, and it packs the real tokens of a row; here the cache is simply continued (present = past + new along the
sequence), and padding keys, wherever they are, are masked. Results at real tokens are the same.

    mask    [0 0 1 1 1]  ->  positions [0 0 0 1 2]      left padding
    mask    [1 1 1 0 1]  ->  positions [0 1 2 3 3]      right padding, then one more token

A key is visible if it is real and stands at or before the query, and inside the layer's window if it has one. A query
that is padding sees real keys of its row, so that no row of the softmax is empty.
"""

from __future__ import annotations

from typing import Any

from sparseport.targets.onnx.standard_nodes import NodeWriter, named, read_attributes, refuse

_SCOPE = "/standard/attention"
# The position of a padding key, behind every query; runtimes that keep integers in 32 bits hold it too.
_NOWHERE = 1 << 30
# Ends a Slice at the end of its axis.
_END = (1 << 31) - 1
# Added to the scores of keys that may not be seen: the lowest float32.
_HIDDEN = -3.4028234663852886e38
_PAST, _PRESENT = "past_sequence_length", "total_sequence_length"


def group_query_attention(node: Any, writer: NodeWriter) -> None:
    """com.microsoft.GroupQueryAttention -> MatMul, Softmax, MatMul, with rotary positions if it has them.

    Query heads that share a key head become more rows of the same product, so that keys and values are never copied:
    q [batch, kv_heads, group * new, head] x k [batch, kv_heads, head, past + new].

    Raises:
        Unsupported: an input, output or attribute that is not understood, or a size that the graph does not say.
    """
    attributes = read_attributes(
        node,
        {
            "num_heads": 0,
            "kv_num_heads": 0,
            "scale": 0.0,
            "softcap": 0.0,
            "local_window_size": -1,
            "do_rotary": 0,
            "rotary_interleaved": 0,
            "qk_norm_epsilon": 0.0,  # of weights that are refused below
        },
        {
            "causal": (1,),
            "smooth_softmax": (0, -1),
            "qk_output": (0,),
            "k_quant_type": (b"NONE",),
            "v_quant_type": (b"NONE",),
            # Such a cache drops what the window has passed. Here the cache keeps it, and the mask hides it.
            "sliding_window_cache": (0, 1),
        },
    )
    for index in range(9, len(node.input)):
        if node.input[index]:
            raise refuse(node, f"input {index} ({node.input[index]}) has no counterpart")
    if named(node.output, 3):
        raise refuse(node, f"output 3 ({node.output[3]}) has no counterpart")
    query, key, value, past_key, past_value, lengths = (named(node.input, index) for index in range(6))
    if not past_key or not past_value:
        raise refuse(node, "needs past_key and past_value")
    heads, kv_heads = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    size = _head_size(node, writer, heads, kv_heads)
    mask = _mask_behind(node, writer, lengths)
    group = heads // kv_heads

    if key:
        q, k, v = (
            writer.add("Reshape", [x, writer.ints([0, 0, count, size])])
            for x, count in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
    else:
        packed = writer.add("Reshape", [query, writer.ints([0, 0, heads + 2 * kv_heads, size])])
        q, k, v = writer.split(packed, [heads, kv_heads, kv_heads], axis=2)
    if attributes["do_rotary"]:
        positions = _new_positions(writer, mask, past_key)
        tables = named(node.input, 7), named(node.input, 8)
        q, k = (rotate(node, writer, x, positions, tables, size, attributes["rotary_interleaved"]) for x in (q, k))

    keys = _continued(writer, past_key, k, named(node.output, 1))
    values = _continued(writer, past_value, v, named(node.output, 2))
    if group == 1:
        q = writer.add("Transpose", [q], perm=[0, 2, 1, 3])
    else:
        q = writer.add("Reshape", [q, writer.ints([0, 0, kv_heads, group, size])])
        q = writer.add("Transpose", [q], perm=[0, 2, 3, 1, 4])
        q = writer.add("Reshape", [q, writer.ints([0, kv_heads, -1, size])])
    q = writer.add("Mul", [q, writer.number(float(attributes["scale"] or size**-0.5))])
    scores = writer.add("MatMul", [q, writer.add("Transpose", [keys], perm=[0, 1, 3, 2])])
    if cap := float(attributes["softcap"]):
        scores = writer.add("Tanh", [writer.add("Div", [scores, writer.number(cap)])])
        scores = writer.add("Mul", [scores, writer.number(cap)])
    bias = _bias(writer, mask, past_key, int(attributes["local_window_size"]), group)
    weights = writer.add("Softmax", [writer.add("Add", [scores, bias])], axis=-1)
    mixed = writer.add("MatMul", [weights, values])
    if group == 1:
        mixed = writer.add("Transpose", [mixed], perm=[0, 2, 1, 3])
    else:
        mixed = writer.add("Reshape", [mixed, writer.ints([0, kv_heads, group, -1, size])])
        mixed = writer.add("Transpose", [mixed], perm=[0, 3, 1, 2, 4])
    writer.add("Reshape", [mixed, writer.ints([0, 0, heads * size])], node.output[0])


def rotary_embedding(node: Any, writer: NodeWriter) -> None:
    """com.microsoft.RotaryEmbedding of [batch, new, heads * head] with positions [batch, new].

    Raises:
        Unsupported: another layout, an attribute that is not understood, or a size that the graph does not say.
    """
    attributes = read_attributes(
        node,
        {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0},
        {"scale": (1.0,), "is_packed_batching": (0,)},
    )
    x, positions, cos, sin = node.input[:4]
    shape, rank = writer.shape(x), len(writer.shape(positions) or ())
    if shape is None or len(shape) != 3 or rank != 2:
        raise refuse(node, "ranks", expected="input 3, position_ids 2", found=f"{shape and len(shape)}, {rank or None}")
    size = _half(node, writer, cos) * 2
    if attributes["rotary_embedding_dim"]:
        if shape[-1] is None or not attributes["num_heads"]:
            raise refuse(node, "the graph does not say the head size")
        size = shape[-1] // int(attributes["num_heads"])
    split = writer.add("Reshape", [x, writer.ints([0, 0, -1, size])])
    turned = rotate(node, writer, split, positions, (cos, sin), size, attributes["interleaved"])
    writer.add("Reshape", [turned, writer.ints([0, 0, -1])], node.output[0])


def rotate(
    node: Any, writer: NodeWriter, x: str, positions: str, tables: tuple[str, str], size: int, interleaved: int
) -> str:
    """Rotary positions: pairs (a, b) of each head become (a cos - b sin, b cos + a sin).

    Args:
        node: the node that is being replaced.
        writer: takes the new nodes.
        x: float32 [batch, new, heads, size].
        positions: int64 [batch, new].
        tables: cosines and sines, float32 [longest, turned / 2]; `turned` of the `size` values of a head are turned.
        size: length of a head.
        interleaved: pairs are neighbours, not values of the first and the second half.

    Returns:
        Name of the turned tensor, shaped as x: x * cos + (b, a) * (-sin, sin).
    """
    half = _half(node, writer, tables[0])
    rest = size - 2 * half
    if rest < 0:
        raise refuse(node, "rotary tables are wider than a head", expected=size, found=2 * half)
    key = (positions, tables, size, bool(interleaved))

    def wide(name: str, signed: bool) -> str:
        rows = writer.add("Gather", [name, positions], axis=0)
        other = rows
        if signed:
            other, rows = rows, writer.add("Neg", [rows])
        both = writer.add("Concat", [rows, other], axis=-1)
        if interleaved:
            order = [n // 2 + n % 2 * half for n in range(2 * half)]
            both = writer.add("Gather", [both, writer.ints(order)], axis=-1)
        if rest:  # values that are not turned: times 1, plus 0
            pads = [0, 0, 0, 0, 0, rest]
            both = writer.add("Pad", [both, writer.ints(pads), writer.number(0.0 if signed else 1.0)])
        return writer.add("Unsqueeze", [both, writer.ints([2])])

    cos = writer.shared(("cos", *key), f"{_SCOPE}/cos", lambda: wide(tables[0], False))
    sin = writer.shared(("sin", *key), f"{_SCOPE}/sin", lambda: wide(tables[1], True))
    if interleaved:
        order = [n ^ 1 for n in range(2 * half)] + list(range(2 * half, size))
        swapped = writer.add("Gather", [x, writer.ints(order)], axis=-1)
    else:
        first, second, *others = writer.split(x, [half, half, *([rest] if rest else [])], axis=-1)
        swapped = writer.add("Concat", [second, first, *others], axis=-1)
    return writer.add("Add", [writer.add("Mul", [x, cos]), writer.add("Mul", [swapped, sin])])


def window_dimensions(node: Any) -> dict[str, str]:
    """Names of caches that no longer end at a window -> the name of their sequence length."""
    if any(attribute.name == "sliding_window_cache" and attribute.i for attribute in node.attribute):
        return {**dict.fromkeys(node.input[3:5], _PAST), **dict.fromkeys(node.output[1:3], _PRESENT)}
    return {}


def _continued(writer: NodeWriter, past: str, new: str, output: str) -> str:
    """Cache [batch, kv_heads, past, head] with [batch, new, kv_heads, head] at its end."""
    return writer.add("Concat", [past, writer.add("Transpose", [new], perm=[0, 2, 1, 3])], output, axis=2)


def _positions(writer: NodeWriter, mask: str) -> str:
    """int64 [batch, past + new]: how many real tokens stand before each."""
    return writer.shared(
        ("positions", mask),
        f"{_SCOPE}/positions",
        lambda: writer.add("CumSum", [mask, writer.number(1)], exclusive=1),
    )


def _new_positions(writer: NodeWriter, mask: str, past: str) -> str:
    """int64 [batch, new]: the same for the tokens behind the cache. All caches are equally long."""

    def make() -> str:
        start = writer.add("Shape", [past], start=2, end=3)
        return writer.add("Slice", [_positions(writer, mask), start, writer.ints([_END]), writer.ints([1])])

    return writer.shared(("new positions", mask), f"{_SCOPE}/new_positions", make)


def _bias(writer: NodeWriter, mask: str, past: str, window: int, group: int) -> str:
    """float32 [batch, 1, group * new, past + new]: 0 where the key may be seen, else the lowest number."""
    import onnx

    def keys() -> str:
        real = writer.add("Cast", [mask], to=onnx.TensorProto.BOOL)
        places = writer.add("Where", [real, _positions(writer, mask), writer.number(_NOWHERE)])
        return writer.add("Unsqueeze", [places, writer.ints([1])])

    def make() -> str:
        places = writer.shared(("keys", mask), f"{_SCOPE}/keys", keys)
        own = _new_positions(writer, mask, past)
        if group > 1:
            own = writer.add("Tile", [own, writer.ints([1, group])])
        own = writer.add("Unsqueeze", [own, writer.ints([2])])
        seen = writer.add("LessOrEqual", [places, own])
        if window > 0:
            before = writer.add("Sub", [own, writer.number(window)])
            seen = writer.add("And", [seen, writer.add("Greater", [places, before])])
        bias = writer.add("Where", [seen, writer.number(0.0), writer.number(_HIDDEN)])
        return writer.add("Unsqueeze", [bias, writer.ints([1])])

    scope = f"{_SCOPE}/mask" + (f"/window_{window}" if window > 0 else "")
    return writer.shared(("bias", mask, max(window, 0), group), scope, make)


def _mask_behind(node: Any, writer: NodeWriter, lengths: str) -> str:
    """The attention mask int64 whose row sums, less one, are `seqlens_k`."""
    import onnx

    maker = writer.producer(lengths)
    while maker is not None and maker.op_type == "Cast":
        maker = writer.producer(maker.input[0])
    if maker is not None and maker.op_type == "Sub" and writer.integers(maker.input[1]) == [1]:
        maker = writer.producer(maker.input[0])
        if maker is not None and maker.op_type == "ReduceSum" and writer.integers(named(maker.input, 1)) in ([1], [-1]):
            mask = str(maker.input[0])
            if writer.element_type(mask) == onnx.TensorProto.INT64:
                return mask
    raise refuse(node, f"seqlens_k ({lengths}) is not made from the row sums of an int64 attention mask")


def _head_size(node: Any, writer: NodeWriter, heads: int, kv_heads: int) -> int:
    count = heads if named(node.input, 1) else heads + 2 * kv_heads
    if width := writer.width(node.input[0]):
        if width % count == 0 and heads % kv_heads == 0:
            return width // count
        raise refuse(node, "the query does not divide into heads", expected=f"a multiple of {count}", found=width)
    if width := writer.width(node.input[3]):
        return width
    raise refuse(node, "the graph does not say the head size")


def _half(node: Any, writer: NodeWriter, table: str) -> int:
    width = writer.width(table) if table else None
    if not width:
        raise refuse(node, "the graph does not say how wide the rotary tables are", found=table or None)
    return width
