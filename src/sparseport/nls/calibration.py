"""Calibration data, and how it travels through a model one decoder layer at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseport.errors import BadInput, UsageError
from sparseport.nls.linears import decoder_layers

if TYPE_CHECKING:
    from torch import Tensor, nn


def calibration_batches(
    tokenizer: Any, texts: Sequence[str], *, samples: int, sequence_length: int, seed: int
) -> list[Tensor]:
    """Cut texts into token windows of one length, the same ones for the same arguments.

    The texts are shuffled, tokenised without special tokens, joined with EOS where the tokenizer has one, and cut into
    windows that do not overlap.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: documents.
        samples: number of windows.
        sequence_length: tokens per window.
        seed: seed of the shuffle.

    Returns:
        `samples` tensors int64 [1, sequence_length].

    Raises:
        UsageError: `samples` or `sequence_length` is below 1.
        BadInput: the texts are too short.
    """
    import torch

    if samples < 1 or sequence_length < 1:
        raise UsageError(
            "calibration needs at least one sample of one token",
            expected=">= 1",
            found=f"samples {samples}, sequence length {sequence_length}",
        )
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    wanted = samples * sequence_length
    stream: list[int] = []
    for index in order:
        ids = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
        if not ids:
            continue
        stream.extend(ids)
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= wanted:
            break
    if len(stream) < wanted:
        raise BadInput(
            "the calibration texts are too short",
            expected=f"{wanted} tokens ({samples} x {sequence_length})",
            found=len(stream),
            fix="give more text, fewer samples or a shorter sequence",
            code="E_CALIBRATION",
        )
    windows = torch.tensor(stream[:wanted], dtype=torch.int64).reshape(samples, 1, sequence_length)
    return list(windows)


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with beside the hidden states (masks, positions), for one batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after the layer, [batch, tokens, hidden]."""
        result = layer(hidden, *self.args, **self.kwargs)
        return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Trace:
    """The start of a pass that goes layer by layer.

    hidden  input of the first decoder layer per batch, [batch, tokens, hidden]
    calls   calls[layer][batch]: layers may differ in their masks (sliding windows)
    """

    hidden: list[Tensor]
    calls: list[list[LayerCall]]


class _Stop(Exception):
    """Ends a forward pass whose rest nobody needs."""


def trace_layers(model: nn.Module, batches: Sequence[Tensor]) -> Trace:
    """Run the model once per batch, up to the last decoder layer, and note what its layers are called with.

    Raises:
        BadInput: there are no batches.
    """
    import torch

    if not batches:
        raise BadInput("no calibration batches", expected="at least one", found=0, code="E_CALIBRATION")
    _, layers = decoder_layers(model)
    trace = Trace([], [[] for _ in layers])

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            if index == 0:
                trace.hidden.append(hidden.detach())
            trace.calls[index].append(LayerCall(args[1:], rest))
            if index + 1 == len(layers):
                raise _Stop

        return hook

    handles = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            for batch in batches:
                with suppress(_Stop):
                    model(batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def observe_inputs(
    layer: nn.Module,
    linears: Mapping[str, nn.Linear],
    observers: Mapping[str, Any],
    hidden: Sequence[Tensor],
    calls: Sequence[LayerCall],
) -> None:
    """Run a layer over all batches and give the input of each linear to its observer's `add`."""

    def note(name: str) -> Any:
        return lambda _module, args, _output: observers[name].add(args[0])

    handles = [linear.register_forward_hook(note(name)) for name, linear in linears.items()]
    try:
        propagate(layer, hidden, calls)
    finally:
        for handle in handles:
            handle.remove()


def propagate(layer: nn.Module, hidden: Sequence[Tensor], calls: Sequence[LayerCall]) -> list[Tensor]:
    """Hidden states of every batch after the layer."""
    import torch

    with torch.no_grad():
        return [call.run(layer, states) for states, call in zip(hidden, calls, strict=True)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout), then back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
