"""Does the written graph compute the model? Logits of its runtime against a torch model of the read-back weights.

Two answers are given and never mixed. At full precision (float32, no quantisation of activations or KV cache) the two
must agree closely; at the settings that applications get they may drift, and the drift is reported.
Run as a child process, because it loads torch, transformers and the whole dequantised model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.sub_config import block_of, in_whole_model, kept_blocks, whole_config
from sparseport.errors import FidelityError
from sparseport.targets.empty_model import config_of, empty_model, read_settings
from sparseport.targets.read_back import GraphReader, open_reader
from sparseport.verify.branched import attach
from sparseport.verify.runs import DECODE_TOKENS, PREFILL_TOKENS, runs_of
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.rounding import dequantize

TOLERANCE = 1e-3
"""Largest allowed |difference of logits| at full precision."""

SAMPLE_TEXT = (
    "The lighthouse keeper counted 27 ships before noon. Each carried salt, timber or wool, and each paid its toll in "
    "copper. When the fog came in from the north he lit the lamp, wrote the hour in his book, and waited. "
    "def toll(ships, rate):\n    return sum(s.weight * rate for s in ships)\n\n"
    "Question: why does ice float on water? Answer: because water expands when it freezes, so ice is less dense. "
    "The next morning the harbour was quiet again, and the keeper wrote only two words in his book: all well."
)

F32 = npt.NDArray[np.float32]


def compare_logits(folder: str, target: str = "openvino", portable: bool = False) -> dict[str, Any]:
    """Run reference and folder on the same tokens and compare.

    Args:
        folder: a written folder (the tokenizer in it is used; without one, fixed pseudo-random tokens are).
        target: what it was written for.
        portable: whether OpenVINO has to run the ONNX folder as well.

    Returns:
        `full_precision` and `default`, and where there are other settings to choose a key for each of those: each with
        `max_abs`, `kl`, `top1` as decimal strings and the settings used; for full precision also `judged_max_abs` and
        `allowed`; `tokens`, `prefill_tokens` and `text`.
    """
    path = Path(folder)
    tokens, from_text = sample_tokens(path)
    network = reference_of(path, open_reader(target, path))
    reference = logits_of(network, tokens)
    compared: dict[str, dict[str, Any]] = {}
    for run in runs_of(target, path, portable):
        logits = run.logits(tokens)
        compared[run.label] = {**drift(reference, logits), "settings": dict(run.settings)}
        if run.judged:
            compared[run.label] |= judged(network, tokens, reference, logits)
    return {
        **compared,
        "tokens": len(tokens),
        "prefill_tokens": PREFILL_TOKENS,
        "text": "sample" if from_text else "pseudo-random",
    }


def judged(network: Any, tokens: list[int], reference: F32, logits: F32) -> dict[str, str]:
    """The largest difference that is allowed, and against what it is measured.

    Some models have a token whose activations are huge; there float32 itself is off by more than the tolerance, torch's
    as well as the runtime's. Then the reference is run once more in float64, and the runtime may be as far from it as
    twice torch's float32 is.
    """
    largest = float(np.abs(reference - logits).max())
    if not largest > TOLERANCE:  # also when it is NaN, which the caller refuses
        return {"judged_against": "float32", "judged_max_abs": f"{largest:.3e}", "allowed": f"{TOLERANCE:.3e}"}
    exact = logits_of(network.double(), tokens)
    noise = float(np.abs(exact - reference).max())
    return {
        "judged_against": "float64",
        "judged_max_abs": f"{float(np.abs(exact - logits).max()):.3e}",
        "allowed": f"{max(TOLERANCE, 2 * noise):.3e}",
        "float32_noise": f"{noise:.3e}",
    }


def drift(reference: F32, logits: F32) -> dict[str, str]:
    """How far logits [tokens, vocabulary] are from a reference: max |difference|, mean KL in nats, top-1 agreement."""
    ref = _log_softmax(reference)
    got = _log_softmax(logits)
    kl = float((np.exp(ref) * (ref - got)).sum(axis=1).mean())
    top1 = float((reference.argmax(axis=1) == logits.argmax(axis=1)).mean())
    return {
        "max_abs": f"{float(np.abs(reference - logits).max()):.3e}",
        "kl": f"{max(kl, 0.0):.3e}",
        "top1": f"{top1:.4f}",
    }


def logits_of(network: Any, tokens: list[int]) -> F32:
    """Logits float32 [tokens, vocabulary] of a torch model, computed in the model's own precision."""
    import torch

    with torch.no_grad():
        return np.asarray(network(torch.tensor([tokens])).logits[0].float().numpy())


def reference_of(folder: Path, graph: GraphReader) -> Any:
    """The Hugging Face model of `config.json` in float32, filled with the weights of a graph, its branches un-merged.

    For a sub-network that is the whole model it was cut from, with zeros wherever something was cut away: the graph is
    compared with the masked model itself, not with another one that was cut in the same way.

    Raises: as `reference_model`, and VerificationError if the graph cannot be read back.
    """
    settings = read_settings(folder / "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in _empty_network(settings).named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        if parameter.dim() == 2:
            shapes[name.removesuffix(".weight")] = tuple(parameter.shape)
    network = _filled(settings, ((item.name, item.weight, item.added) for item in graph.weights(shapes)))
    for beside in graph.branches():
        attach(network, in_whole_model(beside.module, kept_blocks(settings)), beside.branch)
    return network


def reference_model(folder: Path, weights: Iterable[tuple[str, QuantizedWeight | DenseWeight]]) -> Any:
    """The Hugging Face model of `config.json` in float32, filled with given weights.

    weights  (tensor name or module name, weight); names that the model does not have are left out

    Raises:
        FidelityError: the weights are not all of the model's parameters.
    """
    return _filled(read_settings(folder / "config.json"), ((name, weight, 0) for name, weight in weights))


def _empty_network(settings: dict[str, Any]) -> Any:
    """The model on the meta device: nothing is initialised only to be overwritten."""
    return empty_model(config_of(settings, "config.json"), dtype="float32", attention="eager")


def _filled(settings: dict[str, Any], weights: Iterable[tuple[str, QuantizedWeight | DenseWeight, int]]) -> Any:
    """Fill the whole model layer by layer; the third of each is what the graph holds more than the model."""
    import torch

    blocks = kept_blocks(settings)
    network = _empty_network(whole_config(settings))
    state = dict(network.named_parameters())
    for given, weight, added in weights:
        name = in_whole_model(given, blocks)
        name = name if name in state else f"{name}.weight"
        if name not in state:
            continue
        values = weight.values if isinstance(weight, DenseWeight) else dequantize(weight)
        values = _within(np.array(values, np.float32) - np.float32(added), tuple(state[name].shape))
        _put(network, name, torch.from_numpy(values))
    network.tie_weights()
    for name, parameter in list(network.named_parameters()):
        if parameter.is_meta and blocks and block_of(name) not in (None, *blocks):
            _put(network, name, torch.zeros(parameter.shape))
    missing = [name for name, value in network.named_parameters() if value.is_meta]
    if missing:
        raise FidelityError("the graph does not hold all parameters of the model", where=missing[0], found=len(missing))
    return network.eval()


def _put(network: Any, name: str, values: Any) -> None:
    import torch

    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))


def _within(values: F32, whole: tuple[int, ...]) -> F32:
    """The values in the whole tensor's shape; those of a cut tensor at the beginning, followed by zeros."""
    if values.size == np.prod(whole):
        return values.reshape(whole)
    result = np.zeros(whole, np.float32)
    cut = values.reshape([length for length in values.shape if length != 1])
    result[tuple(slice(length) for length in cut.shape)] = cut
    return result


def sample_tokens(folder: Path) -> tuple[list[int], bool]:
    """Tokens to compare logits on: of `SAMPLE_TEXT`, or pseudo-random ones without a tokenizer; and whether of it."""
    import json

    wanted = PREFILL_TOKENS + DECODE_TOKENS
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SAMPLE_TEXT, add_special_tokens=False).ids
        if len(ids) >= wanted:
            return list(ids[:wanted]), True
    vocabulary = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    # A linear congruential generator (Numerical Recipes): the same tokens on every machine, without a seed file.
    state, tokens = 1, []
    for _ in range(wanted):
        state = (1664525 * state + 1013904223) % 2**32
        tokens.append((state >> 8) % vocabulary)
    return tokens, False


def _log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


if __name__ == "__main__":
    from sparseport.child import serve

    serve(compare_logits)
