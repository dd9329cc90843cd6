"""Write one OpenVINO folder: store weights as they come, then swap them into the skeleton and save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.child import Child
from sparseport.errors import BadInput, Unsupported
from sparseport.targets.openvino.constants import swap_constants
from sparseport.targets.openvino.folder import (
    copy_tokenizer_files,
    write_config,
    write_generation_config,
    write_openvino_config,
)
from sparseport.targets.openvino.store import StoredDense, StoredQuantized, WeightStore
from sparseport.weights.grouping import for_openvino
from sparseport.weights.linear import Array, DenseWeight, QuantizedWeight

XML = "openvino_model.xml"
# Rows converted at a time, so that a large embedding is never copied whole.
_ROWS = 1024


class OpenVinoWriter:
    """Takes merged weights one at a time and writes a folder.

    The frontend process (graph and tokenizer) starts at once and runs beside the merge.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        base: Path,
        config: dict[str, Any],
        small: Mapping[str, Array],
        tokenizer: bool,
    ) -> None:
        """Start writing.

        Args:
            folder: folder to fill.
            scratch: folder for intermediate files.
            base: folder of the base model, for its tokenizer and generation config.
            config: the base's config.json.
            small: every tensor of fewer than two dimensions, by name.
            tokenizer: whether the folder gets a tokenizer.

        Raises:
            BadInput: a small tensor is not finite.
        """
        self.folder = folder
        self.scratch = scratch
        self.versions: dict[str, str] = {}
        self.left_out: list[str] = []
        self._small = dict(small)
        write_config(config, folder)
        write_generation_config(base, config, folder)
        if tokenizer:
            copy_tokenizer_files(base, folder)
        specs = [spec_of(name, _as_f16_or_f32(values, name)) for name, values in small.items()]
        write_safetensors(scratch / "small.safetensors", specs)
        self._store = WeightStore(scratch / "weights.pack")
        self._stored: dict[str, StoredDense | StoredQuantized] = {}
        self._child = Child(
            "sparseport.targets.openvino.frontend",
            {
                "config": str(folder / "config.json"),
                "small_tensors": str(scratch / "small.safetensors"),
                "output": str(scratch / "skeleton"),
                "tokenizer": str(base) if tokenizer else None,
            },
        )

    def __enter__(self) -> OpenVinoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()
        self._store.close()

    def add_linear(self, module: str, weight: QuantizedWeight | DenseWeight, stored_group: int | None) -> None:
        """Store a linear layer's weight; a quantised one in groups of `stored_group` (see `openvino_layout`)."""
        if isinstance(weight, QuantizedWeight):
            assert stored_group is not None
            self._stored[f"{module}.weight"] = self._store.add_quantized(for_openvino(weight, stored_group))
        else:
            self._stored[f"{module}.weight"] = self._store.add_dense(weight.values)

    def add_tensor(self, name: str, values: Array) -> None:
        """Store an embedding, head or other matrix as it is."""
        self._stored[name] = self._store.add_dense(values)

    def save(self, dtype: str) -> None:
        """Wait for the graph, put the weights in and write the IR and its config files."""
        import openvino as ov

        answer = self._child.result()
        self.versions = answer["versions"]
        self._check_small(answer["constants"])
        skeleton = self.scratch / "skeleton"
        model = ov.Core().read_model(skeleton / XML)
        alive = swap_constants(model, answer["constants"], self._stored, self._store)
        ov.save_model(model, self.folder / XML, compress_to_fp16=False)
        del model, alive
        for path in sorted(skeleton.iterdir()):
            if path.name.startswith(("openvino_tokenizer", "openvino_detokenizer")):
                path.rename(self.folder / path.name)
        write_openvino_config(self.folder, dtype)

    def _check_small(self, constants: dict[str, str]) -> None:
        """Every small tensor of the checkpoint has a place in the graph, or changes nothing.

        AutoGPTQ writes a bias of zeros for layers that have none; such a tensor is left out, with a note.

        Raises:
            Unsupported: the graph has no place for a tensor that is not all zeros.
        """
        for name, values in self._small.items():
            if name in constants:
                continue
            if name.endswith(".bias") and not values.any():
                self.left_out.append(name)
                continue
            raise Unsupported(
                "the model has no place for this tensor",
                where=name,
                fix="check that config.json belongs to the weights",
            )


def as_stored(values: Array, precision: str, name: str) -> tuple[Array, int]:
    """An embedding or head as it will be stored, and how many of its values that changes.

    Args:
        values: [vocabulary, hidden], any float dtype.
        precision: fp16, fp32, or int8 (which starts from fp16).
        name: tensor name, for messages.

    Raises:
        BadInput: a value is not finite, or overflows float16.
    """
    if values.dtype == np.float16 or precision == "fp32":
        stored = values if values.dtype == np.float16 and precision != "fp32" else values.astype(np.float32)
        _check_finite(stored, name)
        return stored, 0
    stored = np.empty(values.shape, np.float16)
    changed = 0
    for start in range(0, values.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        wide = values[rows].astype(np.float32)
        _check_finite(wide, name)
        with np.errstate(over="ignore", under="ignore"):
            stored[rows] = wide.astype(np.float16)
        if not np.isfinite(stored[rows]).all():
            raise BadInput("tensor overflows float16", where=name, fix="give --embedding fp32", code="E_OVERFLOW")
        changed += int(np.count_nonzero(stored[rows].astype(np.float32) != wide))
    return stored, changed


def _check_finite(values: Array, name: str) -> None:
    for start in range(0, values.shape[0], _ROWS):
        if not np.isfinite(values[start : start + _ROWS].astype(np.float32)).all():
            raise BadInput("tensor holds NaN or Inf", where=name, code="E_NAN", fix="download or train the base again")


def _as_f16_or_f32(values: Array, name: str) -> Array:
    if not np.isfinite(values.astype(np.float32)).all():
        raise BadInput("tensor holds NaN or Inf", where=name, code="E_NAN")
    return values if values.dtype == np.float16 else values.astype(np.float32)
