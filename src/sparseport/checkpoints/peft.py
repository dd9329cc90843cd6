"""LoRA adapters in the folder layout of PEFT and SQFT: adapter_config.json and adapter_model.safetensors.

delta W = scaling * (B @ A), with scaling = lora_alpha / r from the config: an extracted SQFT sub-adapter has tensors of
lower rank, and keeps the scaling of its super-adapter. rank_pattern, alpha_pattern and use_rslora are followed; every
other option that would change this formula is refused by name.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sparseport.checkpoints.folder import ModelFolder, natural
from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.checkpoints.paths import bare_file, file_sha256
from sparseport.checkpoints.peft_options import (
    alphas_by_module,
    check_options,
    lora_scaling,
    ranks_by_module,
    read_alpha,
    read_flag,
    read_rank,
    read_rslora,
    read_targets,
)
from sparseport.checkpoints.pickles import convert_pickle
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.weights.linear import Array, LowRankBranch

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Files beside an adapter that hold its search space: our own (`elastic`), SQFT's, and that of its first releases.
SEARCH_SPACE_FILES = ("search_space.json", "elastic_adapter_config.json", "nncf_config.json")
PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
}
_FLOATS = ("F16", "BF16", "F32")


class AdapterFolder:
    """A LoRA adapter, opened and checked; tensors are read on demand.

    r, alpha            as in the config, for modules that no pattern names
    use_rslora          scalings are alpha / sqrt(r), not alpha / r
    scaling             of modules that no pattern names, whatever the tensors' ranks; `scaling_of` is the exact one
    sparse_adapter      SQFT: the update is masked by the sparse base (SparsePEFT)
    quantization_aware  SQFT: the merge requantises on the base's scales (QA-SparsePEFT)
    target_modules      the config's list; one entry when the config holds a pattern
    base_model_name     text only; never opened
    warnings            what is odd but harmless
    """

    def __init__(self, path: Path, config: dict[str, Any], file: SafeTensorsFile, source: Path) -> None:
        where = str(path / CONFIG)
        self.path, self.config = path, config
        self.r, self.alpha = read_rank(config, where), read_alpha(config, where)
        self.use_rslora = read_rslora(config, where)
        self.scaling = lora_scaling(self.alpha, self.r, self.use_rslora)
        self.sparse_adapter = read_flag(config, "sparse_adapter", where)
        self.quantization_aware = read_flag(config, "quantization_aware", where)
        self.target_modules = read_targets(config, where)
        name = config.get("base_model_name_or_path")
        self.base_model_name = name if isinstance(name, str) else ""
        self.warnings: list[str] = []
        self._file, self._source = file, source
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._tensors = _pairs(file, source)
        self._declared = ranks_by_module(config, self._tensors, where)
        self._alphas = alphas_by_module(config, self._tensors, where)
        self._check_shapes()
        used = self.search_space_file()
        for name in SEARCH_SPACE_FILES:
            if used is not None and name != used.name and (path / name).exists():
                self.warnings.append(f"{name} is not used: {used.name} is present")

    @classmethod
    def open(cls, path: Path | str, *, allow_pickle: bool = False) -> AdapterFolder:
        """Open an adapter folder and check config and shapes; values are checked by `branch`.

        allow_pickle  read adapter_model.bin where there is no safetensors file, as plain tensors in its own process

        Raises:
            BadInput: damaged, empty or contradicting files.
            Unsupported: an option or a tensor that plain LoRA arithmetic does not cover; named in the message.
        """
        path = Path(path)
        if not path.is_dir():
            raise BadInput("no adapter folder", where=path, expected=f"a folder with {CONFIG}", code="E_MISSING")
        config = read_json(bare_file(path, CONFIG, CONFIG), what=CONFIG)
        check_options(config, str(path / CONFIG))
        pickle = path / PICKLE
        if (path / WEIGHTS).exists() or not pickle.exists():
            source = bare_file(path, WEIGHTS, "adapter weight file")
            adapter = _built(cls, path, config, SafeTensorsFile.open(source), source)
            if pickle.exists():
                adapter.warnings.append(f"{PICKLE} is not used: {WEIGHTS} is present")
            return adapter
        if not allow_pickle:
            raise BadInput(
                "the adapter is only there as a pickle file, which can run code when it is read",
                where=pickle,
                expected=WEIGHTS,
                code="E_PICKLE",
                fix="convert it to safetensors in an environment you trust, or pass --allow-pickle to have it read as "
                "plain tensors in a separate process",
            )
        source = bare_file(path, PICKLE, "adapter weight file")
        temporary = tempfile.TemporaryDirectory(prefix="sparseport-pickle-")
        try:
            target = Path(temporary.name) / WEIGHTS
            convert_pickle(source, target)
            adapter = _built(cls, path, config, SafeTensorsFile.open(target), source)
        except BaseException:
            temporary.cleanup()
            raise
        adapter._temporary = temporary
        return adapter

    def modules(self) -> list[str]:
        """Adapted modules by their name in the base checkpoint (`model.layers.0.self_attn.q_proj`)."""
        return sorted(self._tensors, key=natural)

    def ranks(self) -> dict[str, int]:
        """Module -> rank of its tensors."""
        return {module: self._file.info(self._tensors[module]["A"]).shape[0] for module in self.modules()}

    def scaling_of(self, module: str) -> float:
        """The factor of a module's update: alpha / r (with use_rslora alpha / sqrt(r)) of the module's own alpha and r,
        also where an extracted sub-adapter has tensors of lower rank.

        Raises:
            BadInput: the adapter has no such module.
        """
        self._pair(module)
        return lora_scaling(self._alphas[module], self._declared[module], self.use_rslora)

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of the weight that the module's update is for.

        Raises:
            BadInput: the adapter has no such module.
        """
        pair = self._pair(module)
        return self._file.info(pair["B"]).shape[0], self._file.info(pair["A"]).shape[1]

    def branch(self, module: str) -> LowRankBranch:
        """The low-rank update of a module, in the stored dtype.

        Raises:
            BadInput: there is no such module, or a tensor holds NaN or infinity.
        """
        pair = self._pair(module)
        arrays = {}
        for side, name in pair.items():
            array = self._file.read(name)
            bad = ~np.isfinite(array.astype(np.float32) if array.dtype.itemsize < 4 else array)
            if bad.any():
                first = tuple(int(i) for i in np.argwhere(bad)[0])
                raise BadInput(
                    f"{int(bad.sum())} adapter values are NaN or infinite",
                    where=f"{self._source}, tensor {name}",
                    expected="finite numbers",
                    found=f"{array[first]} at {first}",
                    code="E_FINITE",
                    fix="the training run diverged; use an earlier checkpoint of the adapter",
                )
            arrays[side] = array
        return LowRankBranch(arrays["A"], arrays["B"], self.scaling_of(module))

    def no_op(self) -> bool:
        """Whether every B is zero, so that the adapter changes nothing."""
        return not any(self._file.read(pair["B"]).any() for pair in self._tensors.values())

    def check_base(self, base: ModelFolder) -> None:
        """Check that the adapter belongs to a base by its names: every module is there, and every linear layer that the
        config targets has its tensors. Shapes are for the reader of the base's layers to know.

        Raises:
            BadInput: names the first module that does not fit.
        """
        linear = set(base.linear_names())
        way_out = f"use the base that the adapter was trained on ({self.base_model_name!r})"
        for module in self.modules():
            where = f"{self._source}, tensor {self._tensors[module]['A']}"
            if module not in linear:
                raise BadInput(
                    "the adapter targets a module that the base does not have",
                    where=where,
                    expected=f"{module} in {base.path}",
                    fix=way_out,
                    code="E_PAIRING",
                )
        if any(self.config.get(key) for key in ("layers_to_transform", "exclude_modules")):
            return
        for module in sorted(linear - set(self._tensors), key=natural):
            if self._targets(module):
                raise BadInput(
                    "the adapter's config targets a module for which it holds no tensors",
                    where=f"{self._source}, tensor {PREFIX}{module}.lora_A.weight",
                    code="E_ADAPTER",
                    fix="export the adapter again",
                )

    def input_files(self) -> list[Path]:
        """The files that have a say in the result."""
        space = self.search_space_file()
        return [self.path / CONFIG, self._source] + ([space] if space else [])

    def search_space_file(self) -> Path | None:
        """The file beside the adapter that holds its search space, or None."""
        for name in SEARCH_SPACE_FILES:
            if (self.path / name).exists():
                return bare_file(self.path, name, name)
        return None

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 (hex)."""
        return {path.name: file_sha256(path) for path in self.input_files()}

    def release(self) -> None:
        """Give the memory of tensors read so far back to the system."""
        self._file.release()

    def close(self) -> None:
        self._file.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> AdapterFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pair(self, module: str) -> dict[str, str]:
        try:
            return self._tensors[module]
        except KeyError:
            raise BadInput(
                "the adapter has no such module",
                where=f"{self._source}, module {module}",
                expected=", ".join(self.modules()[:3]) + ", ...",
                code="E_ADAPTER",
            ) from None

    def _targets(self, module: str) -> bool:
        # A pattern (target_modules given as text) never equals a module name, so it targets nothing here.
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)

    def _check_shapes(self) -> None:
        for module, pair in self._tensors.items():
            for side in ("A", "B"):
                if side not in pair:
                    present = next(iter(pair.values()))
                    raise BadInput(
                        f"module {module} has no lora_{side}",
                        where=f"{self._source}, tensor {present}",
                        fix="export the adapter again",
                        code="E_ADAPTER",
                    )
            a, b = self._file.info(pair["A"]), self._file.info(pair["B"])
            for info in (a, b):
                if info.stored not in _FLOATS or len(info.shape) != 2 or 0 in info.shape:
                    raise BadInput(
                        "adapter tensor has the wrong dtype or shape",
                        where=f"{self._source}, tensor {info.name}",
                        expected=f"{' or '.join(_FLOATS)}, two axes, not empty",
                        found=f"{info.stored} {info.shape}",
                        code="E_ADAPTER",
                    )
            if a.shape[0] != b.shape[1]:
                raise BadInput(
                    "lora_A and lora_B have different ranks",
                    where=f"{self._source}, tensor {b.name}",
                    expected=a.shape[0],
                    found=b.shape[1],
                    code="E_ADAPTER",
                )
            if a.shape[0] > self._declared[module]:
                raise BadInput(
                    "the tensor's rank is above the config's r, or above what rank_pattern gives the module",
                    where=f"{self._source}, tensor {a.name}",
                    expected=f"at most {self._declared[module]}",
                    found=a.shape[0],
                    code="E_ADAPTER",
                )
            if a.shape[0] > min(a.shape[1], b.shape[0]):
                self.warnings.append(f"{module}: rank {a.shape[0]} is above both features {b.shape[0]} x {a.shape[1]}")
            if isinstance(self.config.get("target_modules"), list) and not self._targets(module):
                raise BadInput(
                    "the adapter holds a module that its config does not target",
                    where=f"{self._source}, tensor {a.name}",
                    expected=", ".join(self.target_modules),
                    found=module,
                    code="E_ADAPTER",
                )


def write_adapter(
    directory: Path | str,
    branches: Mapping[str, LowRankBranch],
    *,
    r: int,
    alpha: float,
    target_modules: Sequence[str],
    base_model_name: str,
    sparse_adapter: bool = False,
    quantization_aware: bool = False,
    dropout: float = 0.0,
) -> None:
    """Write an adapter folder that PEFT loads too (as plain LoRA, if all branches have rank r).

    branches  base module name -> branch; ranks up to r, scaling alpha / r

    Raises:
        FidelityError: a branch does not fit r and alpha, or there is none.
    """
    directory = Path(directory)
    if not branches:
        raise FidelityError("an adapter without modules cannot be written", where=directory)
    arrays: dict[str, Array] = {}
    for module in sorted(branches, key=natural):
        branch = branches[module]
        if branch.rank > r or not math.isclose(branch.scaling, alpha / r, rel_tol=1e-12):
            raise FidelityError(
                "branch does not fit the adapter's r and alpha",
                where=f"{directory}, module {module}",
                expected=f"rank <= {r}, scaling {alpha / r}",
                found=f"rank {branch.rank}, scaling {branch.scaling}",
            )
        arrays[f"{PREFIX}{module}.lora_A.weight"] = branch.a
        arrays[f"{PREFIX}{module}.lora_B.weight"] = branch.b
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS, [spec_of(name, array) for name, array in arrays.items()])
    whole = int(alpha) if float(alpha).is_integer() else alpha
    write_json(
        directory / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name,
            "r": r,
            "lora_alpha": whole,
            "lora_dropout": dropout,
            "target_modules": sorted(target_modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "sparse_adapter": sparse_adapter,
            "quantization_aware": quantization_aware,
        },
    )


def _built(
    cls: type[AdapterFolder], path: Path, config: dict[str, Any], file: SafeTensorsFile, source: Path
) -> AdapterFolder:
    try:
        return cls(path, config, file, source)
    except BaseException:
        file.close()
        raise


def _pairs(file: SafeTensorsFile, source: Path) -> dict[str, dict[str, str]]:
    pairs: dict[str, dict[str, str]] = {}
    for name in file.names():
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is None:
            raise Unsupported(
                "adapter tensor is not part of plain LoRA on linear layers",
                where=f"{source}, tensor {name}",
                expected="*.lora_A.weight, *.lora_B.weight",
                code="E_ADAPTER_OPTION",
            )
        if not name.startswith(PREFIX):
            raise BadInput(
                "adapter tensor has an unknown prefix",
                where=f"{source}, tensor {name}",
                expected=PREFIX,
                code="E_ADAPTER",
            )
        module = name[len(PREFIX) : -len(suffix)]
        if _SUFFIXES[suffix] in pairs.setdefault(module, {}):
            raise BadInput(
                "two tensors stand for the same side of a module",
                where=f"{source}, tensor {name}",
                found=pairs[module][_SUFFIXES[suffix]],
                code="E_ADAPTER",
            )
        pairs[module][_SUFFIXES[suffix]] = name
    if not pairs:
        raise BadInput("the adapter holds no tensors", where=source, fix="export the adapter again", code="E_ADAPTER")
    return pairs
