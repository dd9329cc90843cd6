"""What onnxruntime-genai's model builder has to be told about some models, or has to do differently for them.

The builder is a script for many architectures. It is left as it is, and single methods and the classes that it asks for
a model's settings are exchanged while it runs (`builder`).
"""

from __future__ import annotations

import math
from typing import Any


def build_heads_layer_by_layer(model: Any, heads: list[tuple[int, int]]) -> None:
    """Give the builder the heads of each block while it makes that block; it knows one number for all."""
    plain, names = model.make_layer, ("num_attn_heads", "num_kv_heads", "q_size", "kv_size")
    whole = [getattr(model, name) for name in names]

    def make_layer(layer_id: int, layer: Any) -> None:
        own = heads[layer_id]
        for name, value in zip(names, [*own, *(number * model.head_size for number in own)], strict=True):
            setattr(model, name, value)
        plain(layer_id, layer)
        for name, value in zip(names, whole, strict=True):  # genai_config.json gets the whole model's
            setattr(model, name, value)

    model.make_layer = make_layer


def scale_embedding_exactly(model: Any) -> None:
    """Gemma's scale of the embedding, the square root of the hidden size, which the builder rounds to two decimals."""
    exact = math.sqrt(model.hidden_size)
    if model.embed_attrs["scale"] == round(exact, 2):
        model.embed_attrs["scale"] = exact


class JoinedLayers:
    """Layers that a model has joined (Phi-3) and that the builder takes apart and joins again.

    It joins the parts in the order in which it cut them, so the node that it makes is the model's own layer.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._whole: dict[str, Any] = {}

    @staticmethod
    def has_gate_up(network: Any) -> str:
        """Whether gate and up projection are one layer, as the builder's option is spelled."""
        return str(any(name.endswith(".gate_up_proj") for name, _ in network.named_modules())).lower()

    def changes(self) -> dict[str, Any]:
        """Methods of the builder that remember the layer that they take apart."""
        attention = self._base.Model.make_attention_unpacked_regular
        mlp = self._base.Model.make_mlp_unpacked_regular

        def make_attention(model: Any, layer_id: int, owner: Any, whole: Any, *args: Any, **kwargs: Any) -> None:
            self._whole[f"/model/layers.{layer_id}/attn/qkv_proj/MatMul"] = whole
            attention(model, layer_id, owner, whole, *args, **kwargs)

        def make_mlp(model: Any, layer_id: int, owner: Any, whole: Any, *args: Any, **kwargs: Any) -> None:
            self._whole[f"/model/layers.{layer_id}/mlp/gate_up_proj/MatMul"] = whole
            mlp(model, layer_id, owner, whole, *args, **kwargs)

        return {"make_attention_unpacked_regular": make_attention, "make_mlp_unpacked_regular": make_mlp}

    def parts(self, node: str) -> list[Any] | None:
        """The one layer that a node stands for, if the model has it joined."""
        return [self._whole[node]] if node in self._whole else None


def with_mean(plain: Any) -> Any:
    """OLMo's norms subtract the mean; the builder makes norms that do not."""

    def make_layernorm(self: Any, layer_id: int, layernorm: Any, skip: bool, simple: bool, location: str) -> None:
        del simple
        plain(self, layer_id, layernorm, skip, False, location)

    return make_layernorm


class TokenizerOrNone:
    """Stands for `AutoTokenizer`: the builder looks for special tokens in the vocabulary, and can do without."""

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError):
            return cls()

    def get_vocab(self) -> dict[str, int]:
        return {}


class ConfigWithOldNames:
    """Stands for `AutoConfig`: the builder reads a few keys by names that transformers 5 no longer uses."""

    @staticmethod
    def from_pretrained(folder: str, **options: Any) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, **options)
        rope = getattr(config, "rope_parameters", None) or {}
        if "full_attention" in rope and "sliding_attention" in rope:  # Gemma 3: two thetas
            config.rope_theta = rope["full_attention"]["rope_theta"]
            config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
            # The builder looks for the kind of scaling beside the two, where older versions have it.
            config.rope_parameters = {"rope_type": rope["full_attention"]["rope_type"], **rope}
        if "partial_rotary_factor" in rope:  # Phi
            config.partial_rotary_factor = rope["partial_rotary_factor"]
        if not hasattr(config, "rms_norm_eps"):
            # Norms that are no RMS norms have their own name for it, and OLMo none at all: it always takes 1e-5.
            config.rms_norm_eps = getattr(config, "layer_norm_eps", 1e-5)
        if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):  # Mistral
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        if config.eos_token_id is None:
            config.eos_token_id = 0  # the builder insists; `folder.write_genai_config` writes the model's own
        return config
