"""Write one ONNX folder: store weights as they come, then put them into the builder's graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.child import Child
from sparseport.errors import Unsupported
from sparseport.recipe import OnnxRecipe
from sparseport.targets.model_files import copy_tokenizer_files, write_config, write_generation_config
from sparseport.targets.onnx.adapter import ADAPTER, write_adapter_file
from sparseport.targets.onnx.branches import StoredLowRank, store_branch
from sparseport.targets.onnx.builder import SKELETON
from sparseport.targets.onnx.folder import token_ids, write_genai_config
from sparseport.targets.onnx.graph import Written, write_model
from sparseport.targets.onnx.products import EXACT_LEVEL, FAST_LEVEL
from sparseport.targets.onnx.store import Layout, OnnxStore, Stored, StoredNBits
from sparseport.targets.writer import f16_or_f32, plus_one_facts, without_place
from sparseport.weights.digest import digest
from sparseport.weights.layouts import MATMULNBITS_BLOCKS, PORTABLE_BLOCKS, GroupLayout, in_layout, matmulnbits_layout
from sparseport.weights.linear import Array, DenseWeight, LowRankBranch, QuantizedWeight
from sparseport.weights.rounding import choose_qparams_minmax, error_in_steps, quantize_to_grid

ACCURACY_LEVELS = {"exact": EXACT_LEVEL, "fast": FAST_LEVEL}

# Rows quantised at a time, so that a large embedding is never widened whole.
_ROWS = 4096


class OnnxWriter:
    """Takes merged weights one at a time and writes a folder.

    The builder's process starts at once and runs beside the merge.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        base: Path,
        config: dict[str, Any],
        small: Mapping[str, Array],
        tokenizer: bool,
        embedding: str,
        settings: OnnxRecipe,
        branches: str = "graph",
    ) -> None:
        """Start writing.

        Args:
            folder: folder to fill.
            scratch: folder for intermediate files.
            base: folder of the base model, for its tokenizer and generation config.
            config: the base's config.json.
            small: every tensor of fewer than two dimensions, by name.
            tokenizer: whether the folder gets a tokenizer.
            embedding: how embedding and head are stored: fp16, fp32 or int8.
            settings: format and accuracy.
            branches: where un-merged adapters go: `graph`, or `adapter` for a file of their own.

        Raises:
            BadInput: a small tensor is not finite, or the model names no end token.
        """
        self.folder = folder
        self.scratch = scratch
        self.versions: dict[str, str] = {}
        self.left_out: list[str] = []
        self.notes: list[str] = []
        self.around: dict[str, Any] = {}
        self._settings, self._embedding = settings, embedding
        self._small = {name: f16_or_f32(values, name) for name, values in small.items()}
        write_config(config, folder)
        write_generation_config(base, config, folder)
        self._ids = token_ids(folder, base.name)
        if tokenizer:
            copy_tokenizer_files(base, folder)
        self._store = OnnxStore(scratch / "weights.pack", _layout(settings))
        self._stored: dict[str, Stored] = {}
        self._branches: dict[str, StoredLowRank] = {}
        self._adapter: dict[str, LowRankBranch] | None = {} if branches == "adapter" else None
        self._labels: dict[str, str] = {}  # module -> name in the certificate
        self._written: Written | None = None
        request = {
            "config": str(folder / "config.json"),
            "output": str(scratch / "graph"),
            "tokenizer": str(base) if tokenizer else None,
        }
        self._child = Child("sparseport.targets.onnx.builder", request)

    def __enter__(self) -> OnnxWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()
        self._store.close()

    def add_linear(self, module: str, weight: QuantizedWeight | DenseWeight, layout: GroupLayout | None) -> None:
        """Store a linear layer's weight; a quantised one in the groups of `layout`."""
        self._labels[module] = module
        if isinstance(weight, QuantizedWeight):
            assert layout is not None
            self._stored[module] = self._store.add_quantized(module, in_layout(weight, layout))
        else:
            self._stored[module] = self._store.add_dense(f"{module}.weight", weight.values)

    def add_branch(self, module: str, branch: LowRankBranch) -> None:
        """Store an un-merged branch; one that goes into a file of its own stays in memory."""
        self._branches[module] = store_branch(self._store, module, branch, slot=self._adapter is not None)
        if self._adapter is not None:
            self._adapter[module] = branch

    def add_tensor(self, name: str, values: Array) -> dict[str, Any]:
        """Store an embedding, head or other matrix, in 8 bits if that was asked for."""
        module = name.removesuffix(".weight")
        self._labels[module] = name
        if self._embedding != "int8":
            self._stored[module] = self._store.add_dense(name, values)
            return {}
        weight = quantize_rows(values, _table_group(values.shape[1], self._settings, name))
        self._stored[module] = self._store.add_quantized(name, weight)
        largest, mean = error_in_steps(weight, values)
        return {
            "bits": weight.bits,
            "group_size": weight.group_size,
            "stored": f"u8 g{weight.group_size}",
            "compressed_sha256": digest(weight),
            "compression_error_steps": {"max": f"{largest:.3f}", "mean": f"{mean:.3f}"},
        }

    def save(self) -> None:
        """Wait for the graph, put the weights in and write the model and `genai_config.json`."""
        answer = self._child.result()
        self.versions, self.notes = answer["versions"], answer["notes"]
        placed = {str(piece[0]) for pieces in answer["small"].values() for piece in pieces}
        self.left_out = without_place(self._small, placed)
        built = self.scratch / "graph"
        level = ACCURACY_LEVELS[self._settings.accuracy]
        self._written = write_model(
            built / SKELETON, self.folder, answer, self._stored, self._small, self._store, level, self._branches
        )
        if self._adapter is not None:
            write_adapter_file(self.folder / ADAPTER, self._adapter)
        self.around = {"graph_sha256": self._written.graph_sha256, "accuracy_levels": self._levels(level)}
        write_genai_config(
            built,
            self.folder,
            self._ids,
            shared_cache=self._settings.format == "nbits",
            fold=self._store.layout is Layout.ROWS,
        )

    def _levels(self, level: int) -> list[int]:
        """The accuracy levels that the graph has to ask for: one, if any layer is a MatMulNBits."""
        fast = level == FAST_LEVEL
        kernels = [
            part
            for part in self._stored.values()
            if isinstance(part, StoredNBits) and part.layout is Layout.NBITS and (part.bits == 4 or fast)
        ]
        return [level] if kernels else []

    def certified(self) -> dict[str, dict[str, Any]]:
        """Where the graph uses each matrix, as the builder laid it out, and which norms are stored plus 1."""
        assert self._written is not None
        facts: dict[str, dict[str, Any]] = {
            self._labels[module]: {"places": sorted(places)} for module, places in self._written.places.items()
        }
        return facts | {name: plus_one_facts(self._small[name]) for name in self._written.plus_one}


def _table_group(columns: int, settings: OnnxRecipe, name: str) -> int:
    """Columns per group of a table in 8 bits: the most that a row can be divided into without being filled up.

    Raises:
        Unsupported: there is no such number.
    """
    layout = matmulnbits_layout(columns, name, PORTABLE_BLOCKS if settings.portable else MATMULNBITS_BLOCKS)
    if layout.block != layout.part:
        raise Unsupported(
            "an embedding of this width cannot be stored in 8 bits",
            where=name,
            expected="a multiple of 16, or of 32 with --onnx-portable",
            found=columns,
            fix="give --embedding fp16",
            code="E_GROUP",
        )
    return layout.part


def quantize_rows(values: Array, group_size: int) -> QuantizedWeight:
    """An embedding in 8 bits: per group of columns, from the group's least to its largest value, rounded to nearest.

    Args:
        values: [vocabulary, hidden], any float dtype.
        group_size: columns per group.
    """
    parts = []
    for start in range(0, values.shape[0], _ROWS):
        rows = values[start : start + _ROWS].astype(np.float32)
        scales, zero_points = choose_qparams_minmax(rows, group_size, False, np.float32, bits=8)
        parts.append((quantize_to_grid(rows, scales, zero_points, group_size, bits=8), scales, zero_points))
    codes, scales, zero_points = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return QuantizedWeight(codes, scales, zero_points, group_size, bits=8)


def _layout(settings: OnnxRecipe) -> Layout:
    """ONNX Runtime fuses DequantizeLinear by columns, and then computes in int8; by rows it leaves it as it is."""
    if settings.format == "nbits":
        return Layout.NBITS
    return Layout.COLUMNS if settings.accuracy == "fast" else Layout.ROWS
