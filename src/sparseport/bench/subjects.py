"""What a path is, and which engines can run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sparseport.checkpoints.json_files import read_json
from sparseport.errors import BadInput, UsageError
from sparseport.verify.certificate import FILE_NAME, TARGETS

Kind = Literal["openvino", "onnx", "checkpoint", "gguf"]

ENGINES: dict[Kind, tuple[str, ...]] = {
    "openvino": ("openvino-genai", "openvino", "torch"),
    "onnx": ("onnxruntime-genai", "torch"),
    "checkpoint": ("torch",),
    "gguf": ("llama.cpp",),
}
"""Which engines run what, the one that applications use first."""

# So many parts of a path tell folders of one name apart; after that they are numbered.
_DEEPEST = 4
_LOOKED_FOR = "openvino_model.xml, genai_config.json, model.safetensors or a .gguf file"


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    path     a folder, or a GGUF file
    kind     what it is
    label    how a result calls it: the name of the folder, never its path
    """

    path: Path
    kind: Kind
    label: str

    @property
    def certified(self) -> bool:
        """Whether sparseport exported it."""
        return (self.path / FILE_NAME).is_file()

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def vocabulary(self) -> int | None:
        """How many tokens the model knows; None for a GGUF file, whose engine says it."""
        if self.kind == "gguf":
            return None
        config = read_json(self.path / "config.json", what="model config")
        text = config.get("text_config")
        size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
        if type(size) is not int or size < 1:
            raise BadInput("the model's config has no vocabulary size", where=self.path / "config.json", found=size)
        return size


@dataclass(frozen=True)
class Contender:
    """A row of a result: a subject, run by an engine with settings, on a device."""

    subject: Subject
    engine: str
    device: str = "CPU"
    settings: dict[str, Any] = field(default_factory=dict)
    name: str | None = None

    @property
    def label(self) -> str:
        """What the row is called."""
        if self.name is not None:
            return self.name
        settings = ", ".join(f"{key}={value}" for key, value in sorted(self.settings.items()))
        device = "" if self.device == "CPU" else f" on {self.device}"
        return f"{self.subject.label}, {self.engine}{device}" + (f" ({settings})" if settings else "")


def subjects_at(paths: Sequence[Path | str | Subject]) -> list[Subject]:
    """The subjects at several paths, each with a label of its own; a subject is taken as it is.

    Raises:
        BadInput: there is nothing that an engine runs; or a path is named twice.
    """
    found = [one for path in paths for one in ([path] if isinstance(path, Subject) else subjects_of(Path(path)))]
    places = [one.path.resolve() for one in found]
    for one, place in zip(found, places, strict=True):
        if places.count(place) > 1:
            raise BadInput("a path is named twice", where=one.path)
    for depth in range(2, _DEEPEST + 1):
        labels = [one.label for one in found]
        found = [
            one if labels.count(one.label) == 1 else replace(one, label="/".join(place.parts[1:][-depth:]))
            for one, place in zip(found, places, strict=True)
        ]
    labels = [one.label for one in found]
    return [
        one if labels.count(one.label) == 1 else replace(one, label=f"{one.label} ({number})")
        for number, one in enumerate(found, 1)
    ]


def subjects_of(path: Path) -> list[Subject]:
    """The subject at a path; two of them for a folder that holds one folder for each target.

    Raises:
        BadInput: there is nothing that an engine runs.
    """
    if not path.exists():
        raise BadInput("no such file or folder", where=path, code="E_MISSING")
    name = path.absolute().name
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInput("this file is no model", where=path, expected=_LOOKED_FOR)
        return [Subject(path, "gguf", name)]
    inside = [path / target for target in TARGETS if (path / target).is_dir() and _kind(path / target)]
    kind = _kind(path)
    if kind is not None:
        return [Subject(path, kind, name)]
    if not inside:
        raise BadInput("nothing here that can be run", where=path, expected=_LOOKED_FOR)
    return [Subject(part, kind, f"{name}/{part.name}") for part in inside if (kind := _kind(part))]


def contenders(subjects: list[Subject], engines: list[str] | None) -> list[Contender]:
    """Every subject with each engine that was asked for and runs it; with its usual one if none was asked for.

    Raises:
        UsageError: an engine is unknown, or runs none of the subjects; or a subject is run by none of the engines.
    """
    known = sorted({name for names in ENGINES.values() for name in names})
    for name in engines or ():
        if name not in known:
            raise UsageError("no such engine", found=name, expected=", ".join(known))
    found = [
        Contender(subject, engine)
        for subject in subjects
        for engine in ENGINES[subject.kind]
        if engine in (engines or ENGINES[subject.kind][:1])
    ]
    for subject in subjects:
        if not any(one.subject is subject for one in found):
            raise UsageError(
                "none of the engines runs this",
                where=subject.path,
                expected=", ".join(ENGINES[subject.kind]),
                found=", ".join(engines or ()),
            )
    unused = sorted(set(engines or ()) - {one.engine for one in found})
    if unused:
        raise UsageError("an engine runs none of these", found=", ".join(unused))
    return found


def _kind(folder: Path) -> Kind | None:
    if (folder / "openvino_model.xml").is_file():
        return "openvino"
    if (folder / "genai_config.json").is_file():
        return "onnx"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "checkpoint"
    return None
