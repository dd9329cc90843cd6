"""Write one OpenVINO folder: store weights as they come, then swap them into the skeleton and save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.child import Child
from sparseport.targets.model_files import copy_tokenizer_files, write_config, write_generation_config, write_json_file
from sparseport.targets.openvino.adapter import ADAPTER, write_adapter_file
from sparseport.targets.openvino.branches import StoredLowRank, insert_branches
from sparseport.targets.openvino.constants import swap_constants
from sparseport.targets.openvino.store import StoredDense, StoredQuantized, WeightStore
from sparseport.targets.writer import f16_or_f32, plus_one_facts, without_place
from sparseport.weights.branch import in_order
from sparseport.weights.layouts import GroupLayout, in_layout
from sparseport.weights.linear import Array, DenseWeight, LowRankBranch, QuantizedWeight

XML = "openvino_model.xml"


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
        dtype: str,
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
            dtype: what `openvino_config.json` says of the weights: int4, int8, fp16 or fp32.
            branches: where un-merged adapters go: `graph`, or `adapter` for a file of their own.

        Raises:
            BadInput: a small tensor is not finite.
        """
        self.folder = folder
        self.scratch = scratch
        self.versions: dict[str, str] = {}
        self.left_out: list[str] = []
        self.notes: list[str] = []
        self.around: dict[str, Any] = {}
        self._small = dict(small)
        self._plus_one: list[str] = []
        self._dtype = dtype
        write_config(config, folder)
        write_generation_config(base, config, folder)
        if tokenizer:
            copy_tokenizer_files(base, folder)
        specs = [spec_of(name, f16_or_f32(values, name)) for name, values in small.items()]
        write_safetensors(scratch / "small.safetensors", specs)
        self._store = WeightStore(scratch / "weights.pack")
        self._stored: dict[str, StoredDense | StoredQuantized] = {}
        self._branches: dict[str, StoredLowRank] = {}
        self._adapter = branches == "adapter"
        self._orders: dict[str, npt.NDArray[np.int32] | None] = {}
        """Module -> order of its columns, which a branch in an adapter's file has to follow."""
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

    def add_linear(self, module: str, weight: QuantizedWeight | DenseWeight, layout: GroupLayout | None) -> None:
        """Store a linear layer's weight; a quantised one in the groups of `layout`."""
        if isinstance(weight, QuantizedWeight):
            assert layout is not None
            laid_out = in_layout(weight, layout)
            self._orders[module] = laid_out.input_order
            self._stored[f"{module}.weight"] = self._store.add_quantized(laid_out)
        else:
            self._stored[f"{module}.weight"] = self._store.add_dense(weight.values)

    def add_branch(self, module: str, branch: LowRankBranch) -> None:
        """Store an un-merged branch."""
        # GenAI gives a branch what the product takes, which is gathered where columns lie in another order.
        a = in_order(branch.a, self._orders.get(module)) if self._adapter else branch.a
        stored = self._store.add_dense(a), self._store.add_dense(branch.b)
        self._branches[module] = StoredLowRank(*stored, branch.scaling)

    def add_tensor(self, name: str, values: Array) -> dict[str, Any]:
        """Store an embedding, head or other matrix as it is; INT8 is NNCF's, after the graph is written."""
        self._stored[name] = self._store.add_dense(values)
        return {}

    def certified(self) -> dict[str, dict[str, Any]]:
        """Which norms are stored plus 1; the traced graph itself names the place of every weight."""
        return {name: plus_one_facts(self._small[name]) for name in self._plus_one}

    def save(self) -> None:
        """Wait for the graph, put the weights in and write the IR and its config files."""
        import openvino as ov

        answer = self._child.result()
        self.versions = answer["versions"]
        self.left_out = without_place(self._small, set(answer["constants"]))
        skeleton = self.scratch / "skeleton"
        model = ov.Core().read_model(skeleton / XML)
        beside = {} if self._adapter else self._branches
        alive = insert_branches(model, answer["constants"], beside, self._store)
        self._plus_one = list(answer["plus_one"])
        alive += swap_constants(model, answer["constants"], self._stored, self._store, self._plus_one)
        ov.save_model(model, self.folder / XML, compress_to_fp16=False)
        del model, alive
        if self._adapter:
            write_adapter_file(self.folder / ADAPTER, self._branches, self._store)
        for path in sorted(skeleton.iterdir()):
            if path.name.startswith(("openvino_tokenizer", "openvino_detokenizer")):
                path.rename(self.folder / path.name)
        # Optimum reads this file: weights are in place, nothing is to be quantised on load.
        settings = {"dtype": self._dtype, "input_info": None, "quantization_config": None, "save_onnx_model": False}
        write_json_file(settings, self.folder / "openvino_config.json")
