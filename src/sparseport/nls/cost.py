"""What a model and its sub-networks cost: parameters, multiply-accumulates and bytes, from shapes alone.

A multiply-accumulate (MAC) is counted once; FLOPs, where two are counted for each, are twice the figure. Counted are
the matrix products: linear layers, un-merged branches, queries by keys, probabilities by values, and the head.
Attention is counted over all pairs of positions: what the usual runtimes compute, also where the causal mask discards
half. Embedding look-up, norms, activations, softmax and rotary angles are not counted.

Published figures need care. Table 1 of LoNAS gives 1.7 TFLOPs for LLaMA-7B and does not say for how many tokens, nor
whether a MAC is one or two: 6.6e9 MACs per token fit 256 tokens counted once as well as 128 counted twice. The ratios
between its rows do not depend on that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput, Unsupported
from sparseport.merge.subnetwork import SubNetwork, head_counts

Shape = tuple[int, int]
Form = Literal["fp32", "fp16", "int8", "int4"]
_FLOAT_BYTES = {"fp32": 4, "fp16": 2}
# Scales in the formats that are written here are float16.
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Heads:
    """An attention module's heads: those of the queries, those of keys and values, elements of each."""

    query: int
    key_value: int
    size: int


@dataclass(frozen=True)
class Architecture:
    """The shapes of a decoder model; everything below is computed from them.

    linears    module -> [out, in] of every linear layer but the head
    attention  attention module -> its heads
    embedding  [vocabulary, hidden]
    head       [vocabulary, hidden] of a head of its own, None if the embedding is used
    others     tensor -> elements, of norms and biases
    branches   module -> rank of the low-rank branch that stays beside the layer; merged ones are not named
    """

    linears: Mapping[str, Shape]
    attention: Mapping[str, Heads]
    embedding: Shape
    head: Shape | None = None
    others: Mapping[str, int] = field(default_factory=dict)
    branches: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        strange = sorted(set(self.branches) - set(self.linears))
        if strange:
            raise BadInput("a branch beside a layer that the model does not have", where=strange[0])

    def with_branches(self, ranks: Mapping[str, int]) -> Architecture:
        """The same model with these low-rank branches left beside its layers: module -> rank.

        Raises:
            BadInput: a module that the model does not have.
        """
        return replace(self, branches=dict(ranks))

    def cut(self, sub: SubNetwork) -> Architecture:
        """What a sub-network leaves of the model, under the names that it has there."""
        linears = {sub.name(name): sub.shape(name, shape) for name, shape in self.linears.items()}
        attention = {
            sub.name(name): replace(
                heads,
                query=heads.query // heads.key_value * sub.heads.get(name, heads.key_value),
                key_value=sub.heads.get(name, heads.key_value),
            )
            for name, heads in self.attention.items()
        }
        others = {sub.name(name): _kept(name, count, sub) for name, count in self.others.items()}
        branches = {sub.name(name): rank for name, rank in self.branches.items()}
        return Architecture(
            {name: shape for name, shape in linears.items() if name is not None},
            {name: heads for name, heads in attention.items() if name is not None},
            self.embedding,
            self.head,
            {name: count for name, count in others.items() if name is not None},
            {name: rank for name, rank in branches.items() if name is not None},
        )


def architecture_of(folder: ModelFolder) -> Architecture:
    """The shapes of a checkpoint, in any format that exports; nothing but headers and config is read.

    Raises:
        BadInput: config and tensors contradict each other.
        Unsupported: the heads cannot be told from q_proj, k_proj and the config.
    """
    stored = open_linears(folder)
    shapes = {name: stored.format_of(name).shape for name in folder.linear_names()}
    head = None if folder.tied_head else shapes.pop(folder.head_name or "", None)
    rows, columns = folder.info(f"{folder.embedding_name}.weight").shape
    parts = stored.part_names()
    others = {}
    for name in folder.names():
        shape = folder.info(name).shape
        if name not in parts and len(shape) < 2:
            others[name] = shape[0] if shape else 1
    inner = folder.config.get("text_config")
    config = {**folder.config, **inner} if isinstance(inner, dict) else folder.config
    attention = {
        name.removesuffix(".q_proj"): _heads(name.removesuffix(".q_proj"), shapes, config)
        for name in shapes
        if name.endswith(".q_proj")
    }
    if not attention:
        raise Unsupported("cannot tell the attention heads of this model", where=folder.path, expected="q_proj, k_proj")
    return Architecture(shapes, attention, (rows, columns), head, others)


def _heads(attention: str, shapes: Mapping[str, Shape], config: Mapping[str, object]) -> Heads:
    query, key = (shapes.get(f"{attention}.{leaf}", (0, 0))[0] for leaf in ("q_proj", "k_proj"))
    size, key_value, shared = head_counts(query, key, config, attention)
    return Heads(key_value * shared, key_value, size)


def _kept(name: str, count: int, sub: SubNetwork) -> int:
    owner, _, leaf = name.rpartition(".")
    return sub.rows.get(owner, count) if leaf == "bias" else count


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates by where they are spent."""

    linears: int
    branches: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.branches + self.attention + self.head


def macs(model: Architecture, tokens: int, *, past: int = 0, predicted: int | None = None) -> Macs:
    """Multiply-accumulates of reading tokens at once; a decoding step is `tokens=1` with the `past` it looks back on.

    Args:
        model: the shapes.
        tokens: tokens that are read, the prefill's length.
        past: tokens in the KV cache before them.
        predicted: positions whose logits are computed; None: all, as a plain forward does. Runtimes that only
            generate need 1.

    Raises:
        BadInput: a count below 1 (`past`: below 0), or more predictions than tokens.
    """
    predicted = tokens if predicted is None else predicted
    if tokens < 1 or past < 0 or not 0 <= predicted <= tokens:
        raise BadInput(
            "tokens to count are 1 or more, past and predicted ones 0 or more",
            found=f"tokens {tokens}, past {past}, predicted {predicted}",
        )
    rows, columns = model.head or model.embedding
    return Macs(
        linears=tokens * sum(out * into for out, into in model.linears.values()),
        branches=tokens * _branch_weights(model),
        # Queries by keys, then probabilities by values.
        attention=2 * tokens * (past + tokens) * sum(heads.query * heads.size for heads in model.attention.values()),
        head=predicted * rows * columns,
    )


def parameters(model: Architecture) -> int:
    """Parameters, a tied embedding counted once, un-merged branches included."""
    return nonzero_parameters(model, {})


def nonzero_parameters(model: Architecture, nonzero: Mapping[str, int]) -> int:
    """Parameters that are not zero.

    Args:
        model: the shapes.
        nonzero: module -> weights that are not zero, for layers that were pruned; all others count whole.

    Raises:
        BadInput: a module that the model does not have, or more non-zero weights than weights.
    """
    for name, count in nonzero.items():
        if name not in model.linears or not 0 <= count <= _elements(model.linears[name]):
            raise BadInput(
                "not a number of non-zero weights",
                where=name,
                expected=f"0 to {_elements(model.linears[name])}" if name in model.linears else "a linear layer",
                found=count,
            )
    return (
        sum(nonzero.get(name, _elements(shape)) for name, shape in model.linears.items())
        + _elements(model.embedding)
        + (0 if model.head is None else _elements(model.head))
        + sum(model.others.values())
        + _branch_weights(model)
    )


def model_bytes(
    model: Architecture,
    form: Form,
    *,
    group_size: int = 64,
    symmetric: bool = False,
    embedding: Form = "fp16",
) -> int:
    """Bytes of all weights as they are stored, without what a file format adds around them.

    Args:
        model: the shapes.
        form: how the linear layers are stored, the head apart.
        group_size: columns per group of INT4; -1 is one group per row.
        symmetric: whether integers have no zero-points.
        embedding: how embedding and head are stored. Norms, biases and branches are in float16.
    """
    tables = [model.embedding] + ([] if model.head is None else [model.head])
    return (
        sum(weight_bytes(shape, form, group_size, symmetric) for shape in model.linears.values())
        + sum(weight_bytes(shape, embedding, group_size, symmetric) for shape in tables)
        + _FLOAT_BYTES["fp16"] * (sum(model.others.values()) + _branch_weights(model))
    )


def weight_bytes(
    shape: Shape, form: Form, group_size: int = 64, symmetric: bool = False, nonzero: int | None = None
) -> int:
    """Bytes of one stored matrix [out, in].

        fp32, fp16  4 and 2 per weight
        int8        1 per weight, and for each row a float16 scale and a zero-point of 1
        int4        half per weight, and for each group of a row a float16 scale and a zero-point of half

    With `nonzero` only the weights that are not zero are stored, beside one bit per weight that says which they are
    (the bitmask layouts of compressed-tensors, without their row offsets).

    Raises:
        BadInput: a group size that is neither -1 nor above 0.
    """
    rows, columns = shape
    kept = _elements(shape) if nonzero is None else nonzero
    mask = 0 if nonzero is None else -(-_elements(shape) // 8)
    if form in _FLOAT_BYTES:
        return _FLOAT_BYTES[form] * kept + mask
    if form == "int8":
        return kept + rows * (_SCALE_BYTES + (0 if symmetric else 1)) + mask
    if group_size != -1 and group_size < 1:
        raise BadInput("not a group size", expected="-1, or 1 or more", found=group_size)
    groups = rows * (1 if group_size == -1 else -(-columns // group_size))
    return -(-kept // 2) + groups * _SCALE_BYTES + (0 if symmetric else -(-groups // 2)) + mask


def cache_bytes(model: Architecture, tokens: int, element_bytes: int = 2) -> int:
    """Bytes of the KV cache of so many tokens."""
    return 2 * tokens * element_bytes * sum(heads.key_value * heads.size for heads in model.attention.values())


def _elements(shape: Shape) -> int:
    return shape[0] * shape[1]


def _branch_weights(model: Architecture) -> int:
    return sum(rank * sum(model.linears[name]) for name, rank in model.branches.items())
