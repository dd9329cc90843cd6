"""One-shot pruning: the weights that count least, row by row, on what the pruned layers before put out.

The default metric is Wanda's, weight magnitude times input norm (Sun et al. 2023, arXiv 2306.11695, eq. 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparseport.errors import BadInput, Unsupported, UsageError
from sparseport.nls.calibration import evaluating, observe_inputs, propagate, trace_layers
from sparseport.nls.importance import MAGNITUDE, METRICS, WANDA, find_metric, importance
from sparseport.nls.linears import decoder_layers, layer_linears
from sparseport.weights.linear import Mask

if TYPE_CHECKING:
    from torch import Tensor, nn

UNSTRUCTURED = "unstructured"
# N:M patterns: N of every M consecutive input columns are zero.
N_M = {"2:4": (2, 4), "4:8": (4, 8)}

# Called as on_progress(module name, modules done, modules in all).
Progress = Callable[[str, int, int], None]


class InputNorms:
    """Running mean, over calibration samples, of the sum over tokens of x_i^2.

    squared   float32 [in], or None before the first sample
    samples   samples seen
    """

    def __init__(self) -> None:
        self.squared: Tensor | None = None
        self.samples = 0

    def add(self, inputs: Tensor) -> None:
        """Take the inputs of a linear layer: [samples, tokens, in], or [tokens, in] for one sample."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        new = inputs.shape[0] if inputs.dim() > 2 else 1
        total = self.samples + new
        sums = rows.square().sum(dim=0)
        if self.squared is None:
            self.squared = sums / total
        else:
            self.squared = self.squared * (self.samples / total) + sums / total
        self.samples = total


def wanda_mask(
    weight: Tensor, input_sq_norms: Tensor, *, sparsity: float = 0.5, pattern: str = UNSTRUCTURED, where: str = "weight"
) -> Tensor:
    """Choose the weights to keep by |W_ij| * ||X_j||_2; see `prune_mask`.

    Args:
        weight: [out, in], any float dtype.
        input_sq_norms: float32 [in], squared input norms.
        sparsity: see `prune_mask`.
        pattern: see `prune_mask`.
        where: name for error messages.

    Returns:
        bool [out, in], True = kept.

    Raises:
        UsageError, Unsupported: see `prune_mask`.
        BadInput: the norms do not fit the weight, or either holds NaN or Inf.
    """
    check_request(sparsity, pattern)
    values = importance(WANDA, METRICS[WANDA], weight, input_sq_norms, where)
    return prune_mask(values, sparsity=sparsity, pattern=pattern, where=where)


def prune_mask(values: Tensor, *, sparsity: float = 0.5, pattern: str = UNSTRUCTURED, where: str = "weight") -> Tensor:
    """Choose the weights to keep by their importance. Equal ones are pruned from the left (stable sort).

    Args:
        values: finite importance of each weight, [out, in]; the smallest are pruned.
        sparsity: fraction to prune. Unstructured: the int(in * sparsity) smallest of every output row.
        pattern: "unstructured", "2:4" or "4:8"; N:M prunes the N smallest of every M consecutive input columns.
        where: name for error messages.

    Returns:
        bool [out, in], True = kept.

    Raises:
        UsageError: unknown pattern, sparsity outside 0..1, or a sparsity that is not N/M.
        Unsupported: M does not divide `in`.
    """
    import torch

    check_request(sparsity, pattern)
    out, cols = values.shape
    if pattern == UNSTRUCTURED:
        block, pruned = cols, int(cols * sparsity)
    else:
        pruned, block = N_M[pattern]
        _check_blocks(cols, pattern, where)
    order = values.reshape(out, -1, block).argsort(dim=2, stable=True)
    mask = torch.ones_like(order, dtype=torch.bool)
    mask.scatter_(2, order[:, :, :pruned], False)
    return mask.reshape(out, cols)


def prune_model(
    model: nn.Module,
    batches: Sequence[Tensor] | None,
    *,
    sparsity: float = 0.5,
    pattern: str = UNSTRUCTURED,
    metric: str = WANDA,
    on_progress: Progress | None = None,
) -> dict[str, Mask]:
    """Prune every linear layer inside the decoder layers, in place; embeddings and head stay dense.

    Goes layer by layer: a layer is measured on what the pruned layers before it put out.

    Args:
        model: a causal language model of transformers.
        batches: token ids int64 [batch, tokens], see `calibration_batches`; not read by the metric "magnitude".
        sparsity: see `prune_mask`.
        pattern: see `prune_mask`.
        metric: "wanda", "magnitude", or `package.module:function`; see `sparseport.nls.importance`.
        on_progress: called after every linear layer as (module name, done, total).

    Returns:
        Masks bool [out, in] by module name; pruned weights in the model are exactly 0.

    Raises:
        BadInput: no batches, inputs that are not finite, or a linear layer that no calibration token reached.
        UsageError, Unsupported: see `prune_mask`, `find_metric` and `decoder_layers`. The model is not changed then.
    """
    import torch

    check_request(sparsity, pattern)
    measure = find_metric(metric)
    if metric != MAGNITUDE and not batches:
        raise BadInput("no calibration batches", expected="at least one", found=0, code="E_CALIBRATION")
    prefix, layers = decoder_layers(model)
    linears = [layer_linears(layer, f"{prefix}.{index}") for index, layer in enumerate(layers)]
    for group in linears:
        for name, linear in group.items():
            _check_blocks(linear.in_features, pattern, name)
    total = sum(len(group) for group in linears)
    masks: dict[str, Mask] = {}
    with evaluating(model):
        trace = trace_layers(model, batches) if batches and metric != MAGNITUDE else None
        hidden = trace.hidden if trace else []
        for index, layer in enumerate(layers):
            norms = {name: InputNorms() for name in linears[index]}
            if trace:
                observe_inputs(layer, linears[index], norms, hidden, trace.calls[index])
            for name, linear in linears[index].items():
                squared = _reached(norms[name], name) if trace else torch.zeros(linear.in_features)
                values = importance(metric, measure, linear.weight, squared, name)
                mask = prune_mask(values, sparsity=sparsity, pattern=pattern, where=name)
                # Assigned, not multiplied: a product would leave -0 behind.
                linear.weight.data[~mask] = 0
                masks[name] = mask.cpu().numpy()
                if on_progress:
                    on_progress(name, len(masks), total)
            if trace and index + 1 < len(layers):
                hidden = propagate(layer, hidden, trace.calls[index])
    return masks


def check_request(sparsity: float, pattern: str) -> None:
    """Refuse a sparsity or a pattern that does not exist.

    Raises:
        UsageError: see `wanda_mask`.
    """
    if pattern != UNSTRUCTURED and pattern not in N_M:
        raise UsageError("unknown sparsity pattern", expected=" | ".join([UNSTRUCTURED, *N_M]), found=pattern)
    if not 0 <= sparsity < 1:
        raise UsageError("sparsity outside the possible range", expected="0 <= sparsity < 1", found=sparsity)
    if pattern in N_M and sparsity != N_M[pattern][0] / N_M[pattern][1]:
        n, m = N_M[pattern]
        raise UsageError(f"{pattern} has a fixed sparsity", expected=n / m, found=sparsity)


def _check_blocks(columns: int, pattern: str, where: str) -> None:
    if pattern in N_M and columns % N_M[pattern][1]:
        block = N_M[pattern][1]
        raise Unsupported(
            f"{pattern} needs input features in blocks of {block}",
            where=where,
            expected=f"a multiple of {block}",
            found=columns,
            fix="use unstructured sparsity",
        )


def _reached(norms: InputNorms, name: str) -> Tensor:
    if norms.squared is None:
        raise BadInput(
            "no calibration token reached this layer",
            where=name,
            fix="give more calibration text",
            code="E_CALIBRATION",
        )
    return norms.squared
