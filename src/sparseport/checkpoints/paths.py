"""Open what the user pointed at, and nothing else: names found in files are bare file names inside one folder."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from sparseport.errors import BadInput, EnvironmentProblem

_CHUNK = 1 << 20


def bare_file(directory: Path, name: object, what: str) -> Path:
    """The path of a regular file that lies directly in `directory`.

    directory  folder that the user named
    name       file name as found in an input file; anything but a bare name is refused before the disk is touched
    what       what the name stands for, for the message ("shard in model.safetensors.index.json")

    A symbolic link may stay inside the folder, or point from `snapshots/<revision>/` to `blobs/` of the same Hugging
    Face cache entry. Any other link is refused.

    Raises:
        BadInput: E_PATH for a name that is no bare file name, a link that leaves the folder, or something that is no
            regular file; E_MISSING when there is no such file.
    """
    if not isinstance(name, str) or not _is_bare(name):
        raise BadInput(
            f"{what} is not a bare file name",
            where=directory,
            expected="a file name without folders",
            found=repr(name),
            fix="put the file beside the others and name it without a path",
            code="E_PATH",
        )
    path = directory / name
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise BadInput(f"{what} is missing", where=path, fix="download the folder again", code="E_MISSING") from None
    except OSError as error:
        raise _cannot_read(path, error) from None
    if stat.S_ISLNK(status.st_mode):
        _check_link(directory, path, what)
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(
            f"{what} is not a regular file",
            where=path,
            expected="a regular file",
            found=_kind(status.st_mode),
            code="E_PATH",
        )
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never blocks on a FIFO or a device.

    Raises:
        BadInput: E_MISSING or E_PATH.
        EnvironmentProblem: the file is there but may not be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise BadInput("file is missing", where=path, code="E_MISSING") from None
    except OSError as error:
        raise _cannot_read(path, error) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise BadInput("not a regular file", where=path, expected="a regular file", found=_kind(mode), code="E_PATH")
    return os.fdopen(descriptor, "rb")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as lowercase hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_bare(name: str) -> bool:
    if name in ("", ".", "..") or len(name.encode("utf-8", "surrogatepass")) > 255:
        return False
    if any(c in name for c in "/\\:") or any(not c.isprintable() for c in name):
        return False
    return name == name.strip()


def _check_link(directory: Path, path: Path, what: str) -> None:
    try:
        target = path.resolve(strict=True)
        root = directory.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadInput(f"{what} is a link that leads nowhere", where=path, code="E_PATH") from None
    inside = target.is_relative_to(root)
    # Hugging Face cache: <entry>/snapshots/<revision>/<file> -> <entry>/blobs/<hash>
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not inside and not cached:
        raise BadInput(
            f"{what} is a link that leaves its folder",
            where=path,
            expected=f"a file inside {root}",
            fix="copy the file into the folder",
            code="E_PATH",
        )


def _kind(mode: int) -> str:
    names = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in names if test(mode)), "something else")


def _cannot_read(path: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        "cannot read a file", where=path, found=error.strerror, fix="check its permissions", code="E_READ"
    )
