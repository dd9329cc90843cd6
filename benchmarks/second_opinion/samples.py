"""What the scripts for the tools share. They run in the tools' own environments, so they know nothing of sparseport.

Each script is called as  SCRIPT SOURCES SAMPLES VALUES [SHARED]  and writes, for each sample:

    SAMPLES/<name>/                   the folder as the tool saved it, without tokenizer and logs
    SAMPLES/<name>/expected.json      SHA-256 of every linear weight as the tool's own code dequantises it
    VALUES/<name>.safetensors         those weights, float32 [out, in]

A hash is over the weight as little-endian C-order float32, [out, in], with -0 made 0. `dtype` is the dtype in which the
tool computed it. Where the tool can also be asked for float32, `float32_sha256` is the hash of that.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

KEPT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "quantization_config.json",
    "quantize_config.json",
)
LEAVES = (".weight", ".qweight", ".weight_packed", ".compressed")
# Nothing of the machine or of the moment belongs in a sample.
SCRUBBED = ("_name_or_path", "offload_to_disk_path")
HOST_PATH = re.compile(rb"(?<![\w.:/])/(?:tmp|home|root|work|usr|var|opt|mnt|Users)/")


@dataclass(frozen=True)
class Paths:
    """Folders given on the command line."""

    sources: Path
    samples: Path
    values: Path
    shared: Path | None

    def fresh(self, name: str) -> Path:
        """An output folder that does not exist yet, inside one that does."""
        folder = self.samples / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class Dequantised:
    """A linear weight as the tool sees it.

    own      [out, in] in the dtype of the tool's own arithmetic
    float32  [out, in] where the tool was asked for float32 as well
    """

    own: torch.Tensor
    float32: torch.Tensor | None = None


def paths() -> Paths:
    sources, samples, values, *shared = (Path(argument).resolve() for argument in sys.argv[1:])
    values.mkdir(parents=True, exist_ok=True)
    return Paths(sources, samples, values, shared[0] if shared else None)


def calibration(count: int = 16, length: int = 64) -> list[list[int]]:
    """Random token ids, the same on every run and in every vocabulary: a random model has nothing better to say."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (length,), generator=generator).tolist() for _ in range(count)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def modules_with(stored: dict[str, torch.Tensor], leaf: str) -> list[str]:
    """Modules that have a tensor `<module>.<leaf>`."""
    return [name.removesuffix(f".{leaf}") for name in stored if name.endswith(f".{leaf}")]


def finish(where: Paths, name: str, layers: dict[str, Dequantised], *, tool: str, version: str, how: str) -> None:
    """Strip the sample, add the linear layers that the tool left alone, and write expected.json and the values.

    Raises:
        RuntimeError: a linear layer without a value, or a path of this machine in a file.
    """
    folder = where.samples / name
    for path in folder.iterdir():
        if path.name not in KEPT:
            path.unlink()
            continue
        path.chmod(0o644)
        if path.suffix == ".json":
            path.write_text(json.dumps(scrubbed(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n")
        if HOST_PATH.search(path.read_bytes()):
            raise RuntimeError(f"{name}/{path.name} holds a path of this machine")
    write_expected(folder / "expected.json", where.values / name, tensors(folder), layers, tool=tool, version=version,
                   how=how)  # fmt: skip
    print(f"{name}: {sum(path.stat().st_size for path in folder.iterdir())} bytes", flush=True)


def write_expected(
    path: Path, values: Path, stored: dict[str, torch.Tensor], layers: dict[str, Dequantised], *, tool: str,
    version: str, how: str,
) -> None:  # fmt: skip
    """Hashes to `path`, values to `values`.safetensors; `stored` are the sample's own tensors.

    Raises:
        RuntimeError: a linear layer without a value.
    """
    layers = dict(layers)
    for tensor_name, tensor in stored.items():
        leaf = next((leaf for leaf in LEAVES if tensor_name.endswith(leaf)), None)
        if leaf is None or "norm" in tensor_name or "embed" in tensor_name:
            continue
        module = tensor_name.removesuffix(leaf)
        if module not in layers:
            if leaf != ".weight":
                raise RuntimeError(f"{values.name}: {module} was not dequantised")
            layers[module] = Dequantised(tensor)
    record: dict[str, dict[str, object]] = {}
    for module, layer in sorted(layers.items()):
        record[module] = {
            "dtype": str(layer.own.dtype).removeprefix("torch."),
            "shape": list(layer.own.shape),
            "sha256": digest(layer.own),
        }
        if layer.float32 is not None:
            record[module]["float32_sha256"] = digest(layer.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tool": tool, "version": version, "how": how, "layers": record}, indent=2) + "\n")
    kept = {f"{module}.own": plain(layer.own) for module, layer in layers.items()}
    kept |= {f"{module}.float32": plain(v.float32) for module, v in layers.items() if v.float32 is not None}
    save_file(kept, values.with_name(f"{values.name}.safetensors"))


def plain(values: torch.Tensor) -> torch.Tensor:
    """float32, contiguous, and 0 for -0: whether a zero has a sign depends on how a tool multiplies."""
    return (values.detach().to("cpu", torch.float32) + 0.0).contiguous()


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(plain(values).numpy().astype("<f4").tobytes()).hexdigest()


def scrubbed(value: object) -> object:
    if isinstance(value, dict):
        return {key: scrubbed(inner) for key, inner in value.items() if key not in SCRUBBED}
    return [scrubbed(inner) for inner in value] if isinstance(value, list) else value
