"""The random Llamas that every tool gets. Run by benchmarks/second_opinion.py: source_models.py OUTPUT

    two-layers  hidden 64, intermediate 192, 2 layers, 4 heads over 2, vocabulary 256, head not tied, float16
    one-layer   the same with one layer and vocabulary 128
    pruned      one-layer, smaller half of every linear weight set to zero
    pruned-24   one-layer, two of each four set to zero
    odd         one layer with 60 and 84 input features and 30, 60 and 84 outputs, which fill no whole words of eight
    odd-pruned  odd, smaller half of every linear weight set to zero

Each linear layer has a row of positive weights, a row of negative ones and a row of zeros: there asymmetric quantisers
choose the zero-points 0 and 15, and a scale for nothing at all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALL_POSITIVE, ALL_NEGATIVE, ALL_ZERO = 0, 1, 2


def main() -> None:
    output = Path(sys.argv[1])
    save(random_llama(layers=2), output / "two-layers")
    save(small_llama(), output / "one-layer")
    save(prune(small_llama(), half_of_all), output / "pruned")
    save(prune(small_llama(), two_of_four), output / "pruned-24")
    save(odd_llama(), output / "odd")
    save(prune(odd_llama(), half_of_all), output / "odd-pruned")


def random_llama(
    *, layers: int, hidden: int = 64, intermediate: int = 192, heads: int = 4, vocabulary: int = 256
) -> Any:
    """The same weights on every run."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # norms that are all 1 would hide a norm that got lost
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
        for linear in linears(model):
            linear[ALL_POSITIVE] = linear[ALL_POSITIVE].abs() + 0.02
            linear[ALL_NEGATIVE] = -linear[ALL_NEGATIVE].abs() - 0.02
            linear[ALL_ZERO] = 0
    return model.half()


def small_llama() -> Any:
    return random_llama(layers=1, vocabulary=128)


def odd_llama() -> Any:
    return random_llama(layers=1, hidden=60, intermediate=84, heads=2, vocabulary=64)


def linears(model: Any) -> list[torch.Tensor]:
    """Weights [out, in] of the linear layers of the decoder."""
    return [parameter for name, parameter in model.named_parameters() if "_proj." in name]


def prune(model: Any, choose: Any) -> Any:
    with torch.no_grad():
        for linear in linears(model):
            linear[choose(linear.abs())] = 0
    return model


def half_of_all(size: torch.Tensor) -> torch.Tensor:
    """bool [out, in], True for the smaller half of all entries."""
    order = size.flatten().argsort(stable=True)
    chosen = torch.zeros(size.numel(), dtype=torch.bool)
    chosen[order[: size.numel() // 2]] = True
    return chosen.reshape(size.shape)


def two_of_four(size: torch.Tensor) -> torch.Tensor:
    """bool [out, in], True for the two smaller ones of each block of four."""
    blocks = size.reshape(-1, 4)
    order = blocks.argsort(dim=1, stable=True)
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, order[:, :2], True).reshape(size.shape)


def save(model: Any, folder: Path) -> None:
    """The model, and a tokenizer for which every byte is a token: two of the tools insist on one."""
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0], pad_token=alphabet[0]).save_pretrained(
        folder
    )


if __name__ == "__main__":
    main()
