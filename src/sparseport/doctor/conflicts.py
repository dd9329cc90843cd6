"""The table of known conflicts: which packages in which versions break what, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparseport.doctor.versions import matches, release

Level = Literal["broken", "warning", "note"]
"""`broken`: something that sparseport does fails or is wrong. `warning`: it costs, or something beside it fails."""


@dataclass(frozen=True)
class Problem:
    """Something that stands in the way.

    name   stable, for scripts
    found  what it was recognised by
    fix    the way out
    """

    level: Level
    name: str
    what: str
    found: str
    fix: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"level": self.level, "name": self.name, "what": self.what, "found": self.found, "fix": self.fix}


@dataclass(frozen=True)
class Rule:
    """One line of the table. It applies if every condition that it has holds.

    when          distribution -> specifier: all installed, each in such a version ("": any)
    absent        distributions of which none is installed
    more_than_one distributions of which two or more are installed
    same_release  distributions of which those installed differ in the first three numbers of their versions
    fact          name of something that is no package; see `report.facts`
    fix           `{name}` stands for the tested version of a distribution
    """

    name: str
    level: Level
    what: str
    fix: str
    when: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    more_than_one: tuple[str, ...] = ()
    same_release: tuple[str, ...] = ()
    fact: str | None = None


_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")
_GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
_OPENVINO = ("openvino", "openvino-tokenizers", "openvino-genai")

RULES = (
    Rule(
        name="openvino-releases",
        level="broken",
        what="OpenVINO, its tokenizers and its GenAI are of different releases; their libraries are built for one "
        "another, and tokenizers or pipelines fail to load",
        fix="pip install openvino=={openvino} openvino-tokenizers=={openvino-tokenizers} "
        "openvino-genai=={openvino-genai}",
        same_release=_OPENVINO,
    ),
    Rule(
        name="onnxruntime-twice",
        level="broken",
        what="several builds of ONNX Runtime are installed into one folder, where each overwrote files of the others",
        fix="pip uninstall -y onnxruntime onnxruntime-gpu onnxruntime-openvino onnxruntime-directml onnxruntime-qnn, "
        "then pip install onnxruntime=={onnxruntime}",
        more_than_one=_RUNTIMES,
    ),
    Rule(
        name="onnxruntime-genai-twice",
        level="broken",
        what="several builds of onnxruntime-genai are installed into one folder, where each overwrote files of the "
        "others",
        fix="pip uninstall -y onnxruntime-genai onnxruntime-genai-cuda onnxruntime-genai-directml, "
        "then pip install onnxruntime-genai=={onnxruntime-genai}",
        more_than_one=_GENAI,
    ),
    Rule(
        name="onnxruntime-genai-runtime",
        level="broken",
        what="onnxruntime-genai 0.18 asks for ONNX Runtime 1.31 or newer",
        fix="pip install onnxruntime=={onnxruntime} onnxruntime-genai=={onnxruntime-genai}",
        when={"onnxruntime-genai": ">=0.18", "onnxruntime": "<1.31"},
    ),
    Rule(
        name="optimum-intel-torchvision",
        level="warning",
        what="optimum-intel 2.2 asks for torchvision, which has to be of torch's own build and release; the one that "
        "pip takes from the default index can bring another torch with it",
        fix="pip install optimum-intel=={optimum-intel}, or torchvision from the index that torch came from",
        when={"optimum-intel": ">=2.2"},
        absent=("torchvision",),
    ),
    Rule(
        name="optimum-intel-safetensors",
        level="broken",
        what="optimum-intel 2.1 asks for safetensors before 0.8",
        fix="pip install safetensors=={safetensors}",
        when={"optimum-intel": "<2.2", "safetensors": ">=0.8"},
    ),
    Rule(
        name="optimum-intel-transformers",
        level="broken",
        what="optimum-intel 2.1 and 2.2 ask for transformers before 5.6",
        fix="pip install transformers=={transformers}",
        when={"optimum-intel": "<2.3", "transformers": ">=5.6"},
    ),
    Rule(
        name="optimum-onnx-transformers",
        level="broken",
        what="optimum-onnx 0.1 asks for transformers before 4.58, sparseport for 5 or newer",
        fix="give optimum-onnx a virtual environment of its own; folders are exchanged as files",
        when={"optimum-onnx": "<0.2", "transformers": ">=4.58"},
    ),
    Rule(
        name="optimum-onnx-optimum-intel",
        level="broken",
        what="optimum-onnx 0.1 asks for optimum 2.1, optimum-intel for optimum 2.3",
        fix="give optimum-onnx a virtual environment of its own; folders are exchanged as files",
        when={"optimum-onnx": "<0.2", "optimum-intel": ">=2.1"},
    ),
    Rule(
        name="olive-model-builder",
        level="warning",
        what="Olive's pass ModelBuilder does not find the builder of onnxruntime-genai 0.15 and newer; sparseport does "
        "not use Olive",
        fix="give Olive a virtual environment of its own, with onnxruntime-genai==0.14.1",
        when={"olive-ai": "", "onnxruntime-genai": ">=0.15"},
    ),
    Rule(
        name="nncf-numpy",
        level="broken",
        what="NNCF 3.4 asks for numpy before 2.5",
        fix="pip install numpy=={numpy}",
        when={"nncf": "<3.5", "numpy": ">=2.5"},
    ),
    Rule(
        name="nncf-torchao",
        level="note",
        what="nncf.strip() imports torchao without asking for it; sparseport merges NNCF's checkpoints without it",
        fix="pip install torchao, if you call nncf.strip() yourself",
        when={"nncf": ""},
        absent=("torchao",),
    ),
    Rule(
        name="torch-cuda-without-gpu",
        level="warning",
        what="this PyTorch is built for CUDA and there is no NVIDIA GPU: it works, and carries gigabytes for nothing",
        fix="reinstall torch=={torch} from PyTorch's index of CPU wheels",
        fact="torch_cuda_without_gpu",
    ),
    Rule(
        name="torch-cpu-with-gpu",
        level="note",
        what="there is an NVIDIA GPU, and this PyTorch is built for CPUs: training does not use the GPU",
        fix="install the CUDA build of torch=={torch}",
        fact="torch_cpu_with_gpu",
    ),
)


def judge(versions: Mapping[str, str], facts: Mapping[str, str], tested: Mapping[str, str]) -> list[Problem]:
    """The rules that apply.

    Args:
        versions: installed distributions by canonical name.
        facts: what holds beside them -> what it was recognised by.
        tested: tested versions by canonical name, for the ways out.
    """
    problems = []
    for rule in RULES:
        found = _applies(rule, versions, facts)
        if found is not None:
            problems.append(Problem(rule.level, rule.name, rule.what, found, rule.fix.format_map(tested)))
    return problems


def packages_of(rule: Rule) -> set[str]:
    """Distributions that a rule speaks of."""
    return {*rule.when, *rule.absent, *rule.more_than_one, *rule.same_release}


def _applies(rule: Rule, versions: Mapping[str, str], facts: Mapping[str, str]) -> str | None:
    """What a rule was recognised by; None if it does not apply."""
    found: list[str] = []
    for name, specifier in rule.when.items():
        if name not in versions or not _fits(versions[name], specifier):
            return None
        found.append(f"{name} {versions[name]}")
    if any(name in versions for name in rule.absent):
        return None
    found += [f"no {name}" for name in rule.absent]
    if rule.more_than_one:
        there = [name for name in rule.more_than_one if name in versions]
        if len(there) < 2:
            return None
        found += [f"{name} {versions[name]}" for name in there]
    if rule.same_release:
        there = [name for name in rule.same_release if name in versions]
        if len({_release(versions[name]) for name in there}) < 2:
            return None
        found += [f"{name} {versions[name]}" for name in there]
    if rule.fact is not None:
        if rule.fact not in facts:
            return None
        found.append(facts[rule.fact])
    return ", ".join(found)


def _fits(version: str, specifier: str) -> bool:
    try:
        return matches(version, specifier)
    except ValueError:  # a version of somebody's own: only rules for any version apply to it
        return not specifier


def _release(version: str) -> tuple[int, ...] | str:
    try:
        return release(version, 3)
    except ValueError:
        return version
