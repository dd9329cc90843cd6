"""Which packages are installed, in which versions, and what they ask of each other. Reads metadata, imports nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from sparseport.extras import EXTRAS

_PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;]+)")
_TESTED = Path(__file__).with_name("tested.txt")

# What is named in the report: what sparseport asks for itself. The others are there because these want them.
NAMED = (
    *("ml-dtypes", "numpy", "pydantic", "pyyaml", "rich"),
    *("torch", "transformers", "safetensors", "tokenizers", "accelerate", "peft", "gguf"),
    *("openvino", "openvino-genai", "openvino-tokenizers", "optimum", "optimum-intel", "nncf"),
    *("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai"),
    *("pymoo", "matplotlib", "ray", "huggingface-hub", "zstandard"),
    *("mkdocs", "mkdocs-material"),
)

PURPOSES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("export to OpenVINO, verify such folders", EXTRAS["openvino"], "openvino"),
    ("chat with OpenVINO folders", ("openvino_genai", "openvino_tokenizers"), "openvino"),
    ("export to ONNX Runtime, verify such folders", EXTRAS["onnx"], "onnx"),
    ("chat with ONNX folders", ("onnxruntime_genai",), "onnx"),
    ("sparsify, quantize, finetune, evaluate", ("safetensors", "torch", "transformers"), "train"),
    ("search by evolution, with pictures", EXTRAS["search"], "search"),
    ("search on several machines", EXTRAS["distributed"], "distributed"),
    ("push to a hub", EXTRAS["hub"], "hub"),
    ("pack and unpack", EXTRAS["pack"], "pack"),
    ("build the documentation", ("mkdocs", "material"), "docs"),
)
"""What one may want to do, the packages that it needs by the names of imports, and the extra that brings them."""


@dataclass(frozen=True)
class Installed:
    """The installed distributions.

    versions      canonical name -> version
    requirements  canonical name -> its `Requires-Dist` lines
    doubled       canonical name -> all versions, where metadata of more than one is found
    """

    versions: Mapping[str, str]
    requirements: Mapping[str, tuple[str, ...]]
    doubled: Mapping[str, tuple[str, ...]]


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_installed() -> Installed:
    """What Python finds on its path; where a distribution is there twice, the first one counts, as for imports."""
    versions: dict[str, str] = {}
    requirements: dict[str, tuple[str, ...]] = {}
    doubled: dict[str, list[str]] = {}
    for distribution in metadata.distributions():
        found, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if not found or not version:  # a folder that a broken uninstall left behind
            continue
        name = canonical(found)
        if name in versions:
            if version != versions[name]:
                doubled.setdefault(name, [versions[name]]).append(version)
            continue
        versions[name], requirements[name] = version, tuple(distribution.requires or ())
    return Installed(versions, requirements, {name: tuple(found) for name, found in doubled.items()})


def read_tested() -> dict[str, str]:
    """The versions that sparseport was tested with, by canonical name: a copy of the repository's constraints.txt."""
    found = map(_PIN.match, _TESTED.read_text(encoding="utf-8").splitlines())
    return {canonical(pin["name"]): pin["version"] for pin in found if pin}


def unmet(installed: Installed) -> list[tuple[str, str, str]] | None:
    """What `pip check` finds: (package, its requirement, the version that is there, or `absent`).

    Extras are not looked at: nobody knows which were asked for. None if `packaging`, which reads requirements, is not
    installed; then hardly anything is that has any.
    """
    try:
        from packaging.requirements import InvalidRequirement, Requirement
        from packaging.version import InvalidVersion, Version
    except ModuleNotFoundError:
        return None
    found = []
    for owner, lines in sorted(installed.requirements.items()):
        for line in lines:
            try:
                wanted = Requirement(line)
                if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                    continue
                version = installed.versions.get(canonical(wanted.name))
                if version is None or not wanted.specifier.contains(Version(version), prereleases=True):
                    plain = f"{wanted.name}{wanted.specifier}"
                    found.append((owner, plain, version or "absent"))
            except (InvalidRequirement, InvalidVersion):
                continue  # metadata that pip does not read either
    return found


def abilities() -> list[dict[str, object]]:
    """For each purpose: whether its packages are there, which are not, and what brings them."""
    return [
        {
            "purpose": purpose,
            "ready": not (absent := _absent(names)),
            "missing": absent,
            "install": f"pip install 'sparseport[{extra}]'",
        }
        for purpose, names, extra in PURPOSES
    ]


def _absent(names: Iterable[str]) -> list[str]:
    return [name for name in names if find_spec(name) is None]
