"""The weight files of a model folder: one safetensors file, or shards named by an index."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.paths import bare_file
from sparseport.checkpoints.pickles import convert_pickle
from sparseport.checkpoints.safetensors import SafeTensorsFile
from sparseport.errors import BadInput

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# What a trainer leaves beside a checkpoint; no weights in it.
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
# A shard by its name, unless it is the only one.
_OF_SEVERAL = re.compile(r"-\d+-of-(?!0*1\.)\d+\.safetensors$")


@dataclass(frozen=True)
class Weights:
    """Where every tensor of a folder lies.

    home       tensor name -> open file that holds it
    files      the weight files, open, in name order
    sources    the weight files as the user gave them (pickles, where they were converted)
    index      the index file, if there is one
    warnings   what is odd but harmless
    temporary  folder of converted pickles, removed by `close`
    """

    home: dict[str, SafeTensorsFile]
    files: tuple[SafeTensorsFile, ...]
    sources: tuple[Path, ...]
    index: Path | None = None
    warnings: tuple[str, ...] = ()
    temporary: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        for file in self.files:
            file.close()
        if self.temporary is not None:
            self.temporary.cleanup()


def open_weights(directory: Path, *, allow_pickle: bool = False, ignore_extra: bool = False) -> Weights:
    """Open the weights of a folder: `model.safetensors`, else the shards of its index, else the only safetensors file.

    allow_pickle  where there are only `.bin` files, convert them in a process of their own
    ignore_extra  skip, with a warning, shard tensors that the index does not name

    Raises:
        BadInput: no weights, only pickles (E_PICKLE), or an index that does not match its shards.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES) and not n.startswith(_TRAINING_STATE)]
    warnings = [f"{name} is not used: safetensors files are present" for name in pickles]
    if SINGLE in names:
        if INDEX in names:
            warnings.append(f"{INDEX} is not used: {SINGLE} is present")
        file = SafeTensorsFile.open(bare_file(directory, SINGLE, "weight file"))
        return Weights(dict.fromkeys(file.names(), file), (file,), (file.path,), warnings=tuple(warnings))
    if INDEX in names:
        return _open_index(directory, ignore_extra, warnings)
    if pickles and allow_pickle:
        return _open_pickles(directory, pickles)
    found = [n for n in names if n.endswith(".safetensors")]
    if pickles:
        other = f"; or rename {found[0]} to {SINGLE} if it holds the weights" if len(found) == 1 else ""
        raise BadInput(
            "the weights are only there as pickle files, which can run code when they are read",
            where=directory,
            expected=SINGLE,
            found=", ".join(pickles[:3]),
            code="E_PICKLE",
            fix="convert them in an environment you trust: load with transformers, then save_pretrained(folder), which "
            "writes safetensors; or pass --allow-pickle to have them read as plain tensors in a separate process"
            + other,
        )
    if len(found) == 1 and not _OF_SEVERAL.search(found[0]) and not found[0].startswith("adapter_"):
        file = SafeTensorsFile.open(bare_file(directory, found[0], "weight file"))
        note = f"{found[0]} is taken for {SINGLE}: it is the only safetensors file in the folder"
        return Weights(dict.fromkeys(file.names(), file), (file,), (file.path,), warnings=(note,))
    raise BadInput(
        "the folder holds no weights",
        where=directory,
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(found[:3]) or "no safetensors file",
        code="E_MISSING",
        fix="download the folder again, with its index if the weights come in shards",
    )


def _open_index(directory: Path, ignore_extra: bool, warnings: list[str]) -> Weights:
    path = bare_file(directory, INDEX, "index")
    index = read_json(path, what="index")
    by_shard = _tensors_by_shard(index, path)
    # All names are checked before the first shard is opened.
    paths = {}
    for shard, tensors in by_shard.items():
        try:
            paths[shard] = bare_file(directory, shard, f"shard in {INDEX}")
        except BadInput as error:
            error.what += f" (needed first by tensor {tensors[0]})"
            raise
    home: dict[str, SafeTensorsFile] = {}
    files: list[SafeTensorsFile] = []
    try:
        for shard, tensors in sorted(by_shard.items()):
            file = SafeTensorsFile.open(paths[shard])
            files.append(file)
            _match(file, tensors, ignore_extra, warnings)
            home.update(dict.fromkeys(tensors, file))
    except BaseException:
        for file in files:
            file.close()
        raise
    total = sum(home[name].info(name).nbytes for name in home)
    declared = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    if declared is not None and declared != total:
        warnings.append(f"{INDEX}: metadata.total_size is {declared!r}, the tensors have {total} bytes")
    return Weights(home, tuple(files), tuple(file.path for file in files), path, tuple(warnings))


def _open_pickles(directory: Path, names: list[str]) -> Weights:
    temporary = tempfile.TemporaryDirectory(prefix="sparseport-pickle-")
    home: dict[str, SafeTensorsFile] = {}
    files: list[SafeTensorsFile] = []
    sources: list[Path] = []
    try:
        for number, name in enumerate(names):
            source = bare_file(directory, name, "weight file")
            target = Path(temporary.name) / f"{number}.safetensors"
            convert_pickle(source, target)
            file = SafeTensorsFile.open(target)
            files.append(file)
            sources.append(source)
            for tensor in file.names():
                if tensor in home:
                    raise BadInput(
                        "two pickle files hold the same tensor",
                        where=f"{source}, tensor {tensor}",
                        fix="keep one set of weight files in the folder",
                        code="E_PICKLE",
                    )
                home[tensor] = file
    except BaseException:
        Weights(home, tuple(files), tuple(sources), temporary=temporary).close()
        raise
    note = f"{', '.join(names[:3])} read as plain tensors in a process of its own"
    return Weights(home, tuple(files), tuple(sources), warnings=(note,), temporary=temporary)


def _tensors_by_shard(index: dict[str, Any], path: Path) -> dict[str, list[str]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput("index has no weight_map", where=path, expected="tensor name -> shard file", code="E_INDEX")
    by_shard: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise BadInput(
                "index maps a tensor to something that is no file name",
                where=f"{path}, tensor {tensor}",
                found=repr(shard)[:80],
                code="E_PATH",
            )
        by_shard.setdefault(shard, []).append(tensor)
    return by_shard


def _match(file: SafeTensorsFile, tensors: Iterable[str], ignore_extra: bool, warnings: list[str]) -> None:
    mapped = set(tensors)
    for name in sorted(mapped):
        if name not in file:
            raise BadInput(
                f"the index maps tensor {name} to a shard that does not hold it",
                where=file.path,
                fix="download the index and the shards again, together",
                code="E_INDEX",
            )
    extra = sorted(set(file.names()) - mapped)
    if extra and not ignore_extra:
        raise BadInput(
            f"{len(extra)} tensors of a shard are not in the index for it",
            where=f"{file.path}, tensor {extra[0]}",
            fix="download the index again, or pass --ignore-extra to leave them out",
            code="E_INDEX",
        )
    if extra:
        count = f"{len(extra)} tensors are not in the index and are left out"
        warnings.append(f"{file.path.name}: {count} ({extra[0]}, ...)")
