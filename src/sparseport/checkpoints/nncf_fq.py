"""Checkpoints of NNCF's quantisation-aware tuning with absorbable adapters: FQ_LORA and FQ_LORA_NLS.

nncf_checkpoint.pth is a torch pickle of

    {"nncf_state_dict": {"post_hooks.<parameter, ':' for '.'>__<port>.<hook>.<name>": tensor},
     "nncf_config": {"compression_state": [{"hook_names_in_model", "module_path", "module_cls_name", "module_config"}]},
     "model_state": {...}}                                                              (the last one only for AWQ)

and stands beside a base model that is not in it. Each 4-bit layer has lora_A [rank, in] and lora_B [out, rank] in
bfloat16, and the range of its fake quantiser in float32 [out, groups, 1]: input_low and input_range, or scale.
Embedding and head have an 8-bit quantiser with one range per row and no adapter.

A checkpoint of FQ_LORA_NLS holds the super-adapter. The ranks of the sub-adapter that was chosen are not in it (the
active_lora_rank it names is always the maximum), but in result.json; see `read_nls_ranks`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from sparseport.checkpoints.folder import HEADS, ModelFolder, natural
from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.nncf_hooks import MODEL, STATE, Hook, pointer, read_hooks
from sparseport.checkpoints.paths import bare_file, file_sha256, open_regular
from sparseport.checkpoints.pickles import convert_nested_pickle
from sparseport.checkpoints.safetensors import SafeTensorsFile
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.digest import value_digest
from sparseport.weights.fake_quantizer import FakeQuantizer
from sparseport.weights.linear import F32, Array

CHECKPOINT, RESULT = "nncf_checkpoint.pth", "result.json"
_HOOKS_IN_MODEL = "__nncf_hooks."
# The one class in nncf_config that is no plain data: an enumeration of texts.
_ENUMS = ("nncf.common.quantization.structs.QuantizationScheme",)
_LAYER = re.compile(r"(?:^|\.)layers\.(?P<index>\d{1,6})\.")


class NncfCheckpoint:
    """An NNCF checkpoint, opened and checked; tensors are read on demand.

    path         as given
    source       the pickle file
    result_json  result.json in the given folder, beside the pickle, or above its folder `last`; or None
    warnings     what is odd but harmless
    """

    def __init__(self, path: Path, source: Path, plain: dict[str, Any], file: SafeTensorsFile) -> None:
        self.path, self.source = path, source
        self.warnings: list[str] = []
        # NNCF's example writes OUTPUT/result.json and OUTPUT/last/nncf_checkpoint.pth.
        above = [source.parent.parent] if source.parent.name == "last" else []
        folders = [folder for folder in (path, source.parent, *above) if (folder / RESULT).is_file()]
        self.result_json = bare_file(folders[0], RESULT, RESULT) if folders else None
        self._file = file
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._hooks = read_hooks(plain, file, source)
        self._model_state = list(plain.get(MODEL, ()))
        self._base_checked = False

    @classmethod
    def open(cls, path: Path | str, *, allow_pickle: bool = False) -> NncfCheckpoint:
        """Open a checkpoint and check its structure; values are checked by `quantizer`.

        path          the .pth file, the folder that holds nncf_checkpoint.pth, or the training output with last/ in it
        allow_pickle  read the pickle as plain tensors in a process of its own (needs torch)

        Raises:
            BadInput: E_PICKLE without allow_pickle, and for a damaged or contradicting file.
            Unsupported: hooks or options beyond weight quantisers with adapters; named in the message.
        """
        path = Path(path)
        source = _find(path)
        if not allow_pickle:
            raise BadInput(
                "an NNCF checkpoint is a pickle file, which can run code when it is read",
                where=source,
                code="E_PICKLE",
                fix="pass --allow-pickle to have it read as plain tensors in a separate process",
            )
        temporary = tempfile.TemporaryDirectory(prefix="sparseport-pickle-")
        try:
            target = Path(temporary.name) / "checkpoint.safetensors"
            plain = convert_nested_pickle(source, target, text_enums=_ENUMS)
            file = SafeTensorsFile.open(target)
            try:
                checkpoint = cls(path, source, plain, file)
            except BaseException:
                file.close()
                raise
        except BaseException:
            temporary.cleanup()
            raise
        checkpoint._temporary = temporary
        return checkpoint

    @property
    def has_model_state(self) -> bool:
        """Whether the checkpoint brings weights of its own, so that nothing can be read before `check_base`."""
        return bool(self._model_state)

    def modules(self) -> list[str]:
        """Quantised modules by their name in the base checkpoint, embedding and head among them."""
        return sorted(self._hooks, key=natural)

    def ranks(self) -> dict[str, int]:
        """Module -> trained rank, of modules with an adapter."""
        return {module: self._hooks[module].rank for module in self.modules() if self._hooks[module].rank}

    def elastic_ranks(self) -> dict[str, int]:
        """The part of `ranks` whose rank can be chosen: 4-bit modules of FQ_LORA_NLS."""
        elastic = {module for module, hook in self._hooks.items() if hook.elastic and hook.bits == 4}
        return {module: rank for module, rank in self.ranks().items() if module in elastic}

    def shape(self, module: str) -> tuple[int, int | None]:
        """[out, in] of the weight that a quantiser is for; `in` is None where only the base knows it.

        Raises:
            BadInput: the checkpoint has no such module.
        """
        hook = self._hook(module)
        return hook.rows, hook.columns

    def quantizer(self, module: str) -> FakeQuantizer:
        """The fake quantiser of a module at its trained rank, with the dtypes that nncf.torch.load_from_config gives.

        Raises:
            BadInput: there is no such module, or a tensor holds NaN or infinity.
            Unsupported: an adapter that NNCF itself would round when it loads the file.
            ValueError: the checkpoint brings weights of its own, and `check_base` has not compared them.
        """
        if self._model_state and not self._base_checked:
            raise ValueError("a checkpoint with model_state needs check_base first")
        hook = self._hook(module)

        def grid(name: str) -> F32:
            values: F32 = self._read(hook, name).astype(np.float32).reshape(hook.rows, hook.groups)
            return values

        return FakeQuantizer(
            bits=hook.bits,
            symmetric=hook.symmetric,
            group_size=-1 if hook.columns is None else hook.columns // hook.groups,
            input_low=None if hook.symmetric else grid("input_low"),
            input_range=None if hook.symmetric else grid("input_range"),
            scale=grid("scale") if hook.symmetric else None,
            a=self._adapter(hook, "lora_A") if hook.rank else None,
            b=self._adapter(hook, "lora_B") if hook.rank else None,
        ).check(f"{self.source}, hook {hook.name}")

    def check_base(self, base: ModelFolder) -> None:
        """Check that the checkpoint belongs to a base: every module is there in floating point with the right shape.

        Weights that the checkpoint brings along (model_state, written when AWQ folded scales into them) have to be
        those of the base. Other ones are refused: they reach norms and other tensors that have no quantiser, so the
        base folder would not be the model that was tuned.

        Raises:
            BadInput: names the first module that does not fit.
            Unsupported: model_state changes the base.
        """
        for module in self.modules():
            hook = self._hooks[module]
            name = f"{module}.weight"
            found = base.info(name).shape if base.has(name) else None
            if found is None or len(found) != 2 or found[0] != hook.rows or hook.columns not in (None, found[1]):
                raise BadInput(
                    "the checkpoint quantises a weight that the base does not have in this shape",
                    where=f"{self.source}, hook {hook.name}",
                    expected=f"{name} {hook.rows} x {hook.columns or 'any'} in {base.path}",
                    found="no such tensor" if found is None else found,
                    fix="use the floating-point base model that was compressed and tuned",
                    code="E_PAIRING",
                )
        for key in self._model_state:
            self._check_same(key, base)
        self._base_checked = True
        if plain := [module for module in base.linear_names() if module not in self._hooks]:
            self.warnings.append(f"{len(plain)} linear layers have no quantiser and stay as they are ({plain[0]}, ...)")

    def input_files(self) -> list[Path]:
        """The files that have a say in the result."""
        return [self.source] + ([self.result_json] if self.result_json else [])

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

    def __enter__(self) -> NncfCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hook(self, module: str) -> Hook:
        try:
            return self._hooks[module]
        except KeyError:
            raise BadInput(
                "the checkpoint has no quantiser for this module",
                where=f"{self.source}, module {module}",
                expected=", ".join(self.modules()[:3]) + ", ...",
                code="E_NNCF",
            ) from None

    def _read(self, hook: Hook, name: str) -> Array:
        return self._file.read(pointer(STATE, f"{hook.name}.{name}"))

    def _adapter(self, hook: Hook, name: str) -> Array:
        stored = self._read(hook, name)
        if stored.dtype == ml_dtypes.bfloat16:
            return stored
        with np.errstate(over="ignore"):
            values: Array = stored.astype(ml_dtypes.bfloat16)
        same = values.astype(np.float32) == stored.astype(np.float32)
        if not (same | ~np.isfinite(stored.astype(np.float32))).all():  # NaN and infinity are reported by check
            raise Unsupported(
                f"the adapter holds {stored.dtype} numbers that NNCF would round to bfloat16 when it loads them",
                where=f"{self.source}, tensor {STATE}/{hook.name}.{name}",
                expected="numbers that are exact in bfloat16",
                found=f"{int((~same).sum())} others",
                fix="round the adapter to bfloat16 and save the checkpoint again",
                code="E_DTYPE",
            )
        return values

    def _check_same(self, key: str, base: ModelFolder) -> None:
        """Check that a tensor of model_state is the base's, or one of the hooks again."""
        where = f"{self.source}, tensor {MODEL}/{key}"
        own = self._file.read(pointer(MODEL, key))
        if key.startswith(_HOOKS_IN_MODEL):
            name = pointer(STATE, key.removeprefix(_HOOKS_IN_MODEL))
            other = self._file.read(name) if name in self._file else None
        else:
            tied = key.removesuffix(".weight").rpartition(".")[2] in HEADS and base.tied_head
            name = f"{base.embedding_name}.weight" if tied and not base.has(key) else key
            other = base.read(name) if base.has(name) else None
        if other is None or value_digest(own) != value_digest(other):
            raise Unsupported(
                "the checkpoint brings model weights that are not those of the base",
                where=where,
                found="no such tensor in the base" if other is None else "other numbers",
                fix="save the model with these weights as a folder (save_pretrained), and give that as --base",
                code="E_MODEL_STATE",
            )


def read_nls_ranks(path: Path | str, modules: Mapping[str, int]) -> dict[str, int]:
    """Module -> rank of a sub-adapter, from the result.json of NNCF's example or from a list of one's own.

    path     result.json, whose finetuning_results.best_heuristic_rank_config has one rank per decoder layer; or a JSON
             array of such ranks
    modules  module -> trained rank of the modules to choose for (`NncfCheckpoint.elastic_ranks`)

    Raises:
        BadInput: no such list, another number of layers, or a rank that was not trained.
    """
    path = Path(path)
    if not modules:
        raise BadInput(
            "the adapters have one rank only",
            where=path,
            expected="a checkpoint of FQ_LORA_NLS",
            fix="leave the choice of ranks away",
            code="E_ELASTIC",
        )
    content = read_json(path, what="rank choice", allow_list=True)
    results = content.get("finetuning_results") if isinstance(content, dict) else None
    chosen = content if isinstance(content, list) else None
    if isinstance(results, dict):
        chosen = results.get("best_heuristic_rank_config")
    if not isinstance(chosen, list) or any(type(rank) is not int for rank in chosen):
        raise BadInput(
            "the file holds no list of ranks",
            where=path,
            expected="finetuning_results.best_heuristic_rank_config, or an array with one rank per layer",
            found=repr(chosen)[:80],
            fix="write the ranks of your choice into a file, for example [32, 24, 16]",
            code="E_ELASTIC",
        )
    layers = {module: _layer(module, path) for module in modules}
    count = len(set(layers.values()))
    if len(chosen) != count or set(layers.values()) != set(range(count)):
        raise BadInput(
            "the list of ranks does not fit the model's layers",
            where=path,
            expected=f"{count} ranks, for layers {', '.join(map(str, sorted(set(layers.values()))[:3]))}, ...",
            found=f"{len(chosen)} ranks",
            code="E_ELASTIC",
        )
    for module, layer in layers.items():
        if not 1 <= chosen[layer] <= modules[module]:
            raise BadInput(
                "rank was not trained",
                where=f"{path}, layer {layer}, module {module}",
                expected=f"1..{modules[module]}",
                found=chosen[layer],
                code="E_ELASTIC",
            )
    return {module: chosen[layer] for module, layer in layers.items()}


def _layer(module: str, path: Path) -> int:
    match = _LAYER.search(f"{module}.")
    if match is None:
        raise BadInput(
            "ranks are chosen per decoder layer, and this module is in none",
            where=f"{path}, module {module}",
            expected="a name with layers.<number>",
            code="E_ELASTIC",
        )
    return int(match["index"])


def _find(path: Path) -> Path:
    if not path.is_dir():
        with open_regular(path):
            return path
    folder = path if (path / CHECKPOINT).exists() or not (path / "last").is_dir() else path / "last"
    return bare_file(folder, CHECKPOINT, "NNCF checkpoint")
