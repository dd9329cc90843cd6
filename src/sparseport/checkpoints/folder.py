"""A model folder in the Hugging Face layout: config.json beside safetensors files, read one tensor at a time."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.layers import DIGITS, check_heads, check_layer_tensors
from sparseport.checkpoints.leaves import MAIN
from sparseport.checkpoints.paths import bare_file, file_sha256
from sparseport.checkpoints.safetensors import SafeTensorsFile, TensorInfo
from sparseport.checkpoints.shards import Weights, open_weights
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import Array

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "token_type_embeddings")
HEADS = ("lm_head", "embed_out")
# Families whose config class keeps the head apart unless config.json says otherwise.
_UNTIED_BY_DEFAULT = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi", "phi3")
_COMPANIONS = (
    "generation_config.json",
    "quantize_config.json",
    "quantization_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPARE_BYTES = 16 << 20


class ModelFolder:
    """A checkpoint folder, opened and checked; tensors are read on demand.

    path      the folder
    config    config.json, without keys that start with an underscore (transformers keeps private state in those)
    warnings  what is odd but harmless, one sentence each
    """

    def __init__(self, path: Path, config: dict[str, Any], weights: Weights, warnings: list[str]) -> None:
        self.path = path
        self.config = config
        self.warnings = warnings
        self._weights = weights

    @classmethod
    def open(cls, path: Path | str, *, allow_pickle: bool = False, ignore_extra: bool = False) -> ModelFolder:
        """Open a folder and check config, index and every header; no tensor is read.

        allow_pickle  read `.bin` weights too, as plain tensors in a process of their own (needs torch)
        ignore_extra  leave out shard tensors that the index does not name, instead of refusing them

        Raises:
            BadInput: the folder, its config, its index or a weight file is damaged or missing.
            Unsupported: the config asks for code that comes with the model (`auto_map`).
        """
        path = Path(path)
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise BadInput(
                "no model folder", where=path, expected="a folder with config.json", found=found, code="E_MISSING"
            )
        config = read_json(bare_file(path, "config.json", "config.json"), what="config.json")
        warnings: list[str] = []
        if not config:
            raise BadInput("config.json is an empty object", where=path / "config.json", code="E_CONFIG")
        config = _without_private(config, str(path / "config.json"), warnings)
        weights = open_weights(path, allow_pickle=allow_pickle, ignore_extra=ignore_extra)
        return cls(path, config, weights, warnings + list(weights.warnings))

    def names(self) -> list[str]:
        """All tensor names, layer 2 before layer 10."""
        return sorted(self._weights.home, key=natural)

    def has(self, name: str) -> bool:
        return name in self._weights.home

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor.

        Raises:
            BadInput: there is no such tensor.
        """
        return self._file_of(name).info(name)

    def read(self, name: str) -> Array:
        """A tensor in its stored dtype, as a read-only array over the file.

        Raises:
            BadInput: there is no such tensor.
            Unsupported: numpy has no type for its dtype.
        """
        return self._file_of(name).read(name)

    def linear_names(self) -> list[str]:
        """Linear layers, as module paths: those with a 2-D `.weight` or a packed one (`.qweight`, `.compressed`, ...).

        Embeddings are left out; the head is there only if it is stored on its own (not tied).
        """
        found = []
        for name in self.names():
            module, _, leaf = name.rpartition(".")
            if leaf not in MAIN or (leaf == "weight" and len(self.info(name).shape) != 2):
                continue
            last = module.rpartition(".")[2]
            if last in EMBEDDINGS + POSITIONS or (last in HEADS and self.tied_head):
                continue
            found.append(module)
        return found

    @cached_property
    def embedding_name(self) -> str:
        """Module path of the token embedding (`model.embed_tokens`).

        Raises:
            BadInput: none of the known names is there.
        """
        for last in EMBEDDINGS:
            for name in self.names():
                if name.endswith(f"{last}.weight") and name[: -len(".weight")].rpartition(".")[2] == last:
                    return name[: -len(".weight")]
        raise BadInput("no token embedding found", where=self.path, expected=" or ".join(EMBEDDINGS), code="E_TENSOR")

    @cached_property
    def head_name(self) -> str | None:
        """Module path of the output head as stored (`lm_head`), or None if no head is stored."""
        for name in self.names():
            module, _, leaf = name.rpartition(".")
            if leaf in MAIN and module.rpartition(".")[2] in HEADS:
                return module
        return None

    @cached_property
    def tied_head(self) -> bool:
        """Whether the head is the embedding: declared so, and no other head is stored.

        Raises:
            BadInput: config.json and the tensors contradict each other.
        """
        declared = self._text_config().get("tie_word_embeddings")
        if declared is not None and not isinstance(declared, bool):
            raise BadInput(
                "tie_word_embeddings is not true or false",
                where=self.path / "config.json",
                found=repr(declared),
                code="E_CONFIG",
            )
        if self.head_name is None:
            if declared is False or (declared is None and self.config.get("model_type") in _UNTIED_BY_DEFAULT):
                raise BadInput(
                    "config.json says the head is not tied to the embedding, but no head is stored",
                    where=f"{self.path}, tensor lm_head.weight",
                    expected="a head tensor, or tie_word_embeddings true",
                    fix='add "tie_word_embeddings": true if the model ties them',
                    code="E_TIED",
                )
            return True
        if not declared:
            return False
        if not self._equal(f"{self.head_name}.weight", f"{self.embedding_name}.weight"):
            raise BadInput(
                "config.json says the head is tied to the embedding, but the stored head differs",
                where=f"{self.path}, tensor {self.head_name}.weight",
                fix='remove the head tensor, or set "tie_word_embeddings": false',
                code="E_TIED",
            )
        return True

    def check_layers(self) -> None:
        """Check that the layers are those the config speaks of, each with the same modules.

        Raises:
            BadInput: missing or extra layers or tensors (first three named), or attention heads that do not divide.
        """
        text = self._text_config()
        check_heads(text, str(self.path / "config.json"))
        check_layer_tensors(self.names(), text, str(self.path))

    def input_files(self) -> list[Path]:
        """Every file of the folder that has a say in the result: config, index, weights, tokenizer."""
        files = [self.path / "config.json"]
        files += [self._weights.index] if self._weights.index else []
        files += list(self._weights.sources)
        for name in _COMPANIONS:
            if (self.path / name).exists() or (self.path / name).is_symlink():
                files.append(bare_file(self.path, name, name))
        return files

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 (hex) of every input file."""
        return {path.name: file_sha256(path) for path in self.input_files()}

    def release(self) -> None:
        """Give the memory of tensors read so far back to the system."""
        for file in self._weights.files:
            file.release()

    def close(self) -> None:
        self._weights.close()

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file_of(self, name: str) -> SafeTensorsFile:
        try:
            return self._weights.home[name]
        except KeyError:
            raise BadInput("tensor is missing", where=f"{self.path}, tensor {name}", code="E_TENSOR") from None

    def _text_config(self) -> dict[str, Any]:
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, dict) else self.config

    def _equal(self, left: str, right: str) -> bool:
        if not self.has(left) or not self.has(right):
            return False
        a, b = self.info(left), self.info(right)
        if (a.stored, a.shape) != (b.stored, b.shape):
            return False
        x, y = self._file_of(left).read_bytes(left), self._file_of(right).read_bytes(right)
        return all(
            np.array_equal(x[i : i + _COMPARE_BYTES], y[i : i + _COMPARE_BYTES])
            for i in range(0, x.size, _COMPARE_BYTES)
        )


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `layers.2` before `layers.10`; digits too many for a layer's number count as text."""
    parts = name.split(".")
    return [(0, int(part), "") if part.isdecimal() and len(part) <= DIGITS else (1, 0, part) for part in parts]


def _without_private(config: dict[str, Any], where: str, warnings: list[str]) -> dict[str, Any]:
    """The config without private keys, at every depth.

    Raises:
        Unsupported: a key that makes a loader import code from the folder.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("auto_map", "custom_pipelines") and value:
            raise Unsupported(
                f"config.json asks for code that comes with the model ({key})",
                where=where,
                fix="sparseport never runs code from a checkpoint; use a model that transformers supports by itself",
                code="E_REMOTE_CODE",
            )
        if key.startswith("_"):
            # Names of origin are text that nobody acts on; other private keys can steer a loader.
            if not key.endswith("name_or_path"):
                warnings.append(f"config.json: private key {key!r} is ignored")
            continue
        result[key] = _without_private(value, where, warnings) if isinstance(value, dict) else value
    return result
