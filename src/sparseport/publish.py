"""Output that appears whole or not at all: a locked temporary folder beside the target, then one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseport.errors import EnvironmentProblem, OutputExists, UsageError

TEMP_PREFIX = ".sparseport-tmp-"


@contextmanager
def staged_output(output: Path, overwrite: bool = False, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a fresh folder beside `output`; rename it to `output` if the block ends without an error.

    A failed or interrupted block leaves `output` as it was and removes the temporary folder. What a killed process left
    behind is removed by the next run on the same output.

    Args:
        output: folder to make.
        overwrite: replace an existing folder.
        ours: tells whether a folder is one that may be replaced, so that a mistyped path cannot cost somebody their
            files; an empty folder may always be.

    Raises:
        UsageError: the output's name is one that temporary folders have.
        OutputExists: `output` is there and may not be replaced, or another process is writing it.
        EnvironmentProblem: the parent is not a writable folder, or the disk fills up.
    """
    output = _place_for(output)
    parent = output.parent
    # The role comes before the name: with the name first, the stage of `m.old` would be what is set aside for `m`.
    stage, aside, lock = (parent / f"{TEMP_PREFIX}{role}-{output.name}" for role in ("stage", "aside", "lock"))
    with locked(lock, output):
        if aside.exists() and not output.exists() and (ours is None or ours(aside)):
            # A run was killed between its two renames: the old output is still whole. Unrecognised it is what
            # another killed run had begun to delete.
            aside.rename(output)
        if output.exists() and not output.is_dir():
            raise OutputExists("output is a file, not a folder", where=output, fix="choose another --output")
        if output.exists() and not overwrite:
            raise OutputExists("output exists already", where=output, fix="choose another --output or give --overwrite")
        if output.exists() and ours and any(output.iterdir()) and not ours(output):
            raise OutputExists(
                "the folder to overwrite was not made by sparseport",
                where=output,
                expected="a folder that holds what this command writes",
                fix="choose another --output, or remove the folder yourself",
            )
        for leftover in (stage, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with _disk_problems(parent):
                stage.mkdir()
                yield stage
                _sync_tree(stage)
                if output.exists():
                    output.rename(aside)
                stage.rename(output)
                sync_folder(parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            if aside.exists():
                if output.exists():
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    aside.rename(output)


def copy_linked(folder: Path, stage: Path) -> None:
    """Fill a stage with the files of a finished folder, as links where the file system has them.

    A file that is to be changed has to be removed from the stage first: a link is the old folder's file.
    """
    shutil.copytree(folder, stage, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def staged_file(output: Path, overwrite: bool = False, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield the path of a file beside `output` that is not there yet; it becomes `output` if the block ends well.

    As `staged_output`, for one file.

    Raises:
        UsageError: the output's name is one that temporary files have.
        OutputExists: `output` is there and may not be replaced, or another process is writing it.
        EnvironmentProblem: the parent is not a writable folder, or the disk fills up.
    """
    output = _place_for(output)
    parent = output.parent
    stage, lock = (parent / f"{TEMP_PREFIX}{role}-{output.name}" for role in ("file", "lock"))
    with locked(lock, output, "process"):
        if output.is_dir():
            raise OutputExists("output is a folder, not a file", where=output, fix="choose another --output")
        if output.exists() and not overwrite:
            raise OutputExists("output exists already", where=output, fix="choose another --output or give --overwrite")
        if output.exists() and ours and not ours(output):
            raise OutputExists(
                "the file to overwrite was not made by this command",
                where=output,
                fix="choose another --output, or remove the file yourself",
            )
        stage.unlink(missing_ok=True)
        try:
            with _disk_problems(parent):
                yield stage
                with stage.open("rb") as file:
                    os.fsync(file.fileno())
                stage.replace(output)
                sync_folder(parent)
        finally:
            stage.unlink(missing_ok=True)


def _place_for(output: Path) -> Path:
    """The absolute path of an output whose folder is there and can be written to.

    Raises:
        UsageError, EnvironmentProblem: as `staged_output`.
    """
    output = Path(output).absolute()
    if output.is_symlink() and not output.exists():
        raise EnvironmentProblem("output is a dangling symbolic link", where=output, fix="choose another --output")
    output = output.resolve()
    parent = output.parent
    if output.name.startswith(TEMP_PREFIX):
        raise UsageError("this name is kept for temporary folders", where=output, fix="choose another --output")
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem("cannot make the folder for the output", where=parent, found=error.strerror) from error
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EnvironmentProblem("the output's folder is not writable", where=parent)
    return output


@contextmanager
def _disk_problems(parent: Path) -> Iterator[None]:
    """What the disk refuses, as an error that says so.

    Raises:
        EnvironmentProblem: the disk is full, or cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(parent).free >> 20
            raise EnvironmentProblem(
                "no space left for the output",
                where=parent,
                code="E_NOSPC",
                found=f"{free} MiB free",
                fix="free some space or choose another --output",
            ) from error
        if error.errno in (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM):
            raise EnvironmentProblem(
                "cannot write the output", where=error.filename or parent, found=error.strerror
            ) from error
        raise


def check_space(output: Path, needed: int) -> None:
    """Refuse early if the disk cannot hold the output and its scratch file.

    Raises:
        EnvironmentProblem: fewer than `needed` bytes are free.
    """
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise EnvironmentProblem(
            "not enough disk space",
            where=parent,
            expected=f"{needed >> 20} MiB",
            found=f"{free >> 20} MiB free",
            code="E_NOSPC",
            fix="free some space or choose another --output",
        )


@contextmanager
def locked(lock: Path, output: Path, what: str = "export") -> Iterator[None]:
    """Hold an advisory lock that dies with the process.

    Args:
        lock: file to lock; made, and removed at the end.
        output: what only one process may write, for the message.
        what: what that process does, for the message.

    Raises:
        OutputExists: E_LOCKED, another process holds the lock.
        EnvironmentProblem: the lock file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows: an exclusive file instead
        with _exclusive_file(lock, output, what):
            yield
        return
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EnvironmentProblem("cannot lock the output", where=lock, found=error.strerror) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise OutputExists(f"another {what} is writing this output", where=output, code="E_LOCKED") from error
        if _is_at(handle, lock):
            break
        os.close(handle)  # its owner removed the file between our open and our lock: lock the new one
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            lock.unlink()  # while it is still held, see above
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that now stands at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _exclusive_file(lock: Path, output: Path, what: str) -> Iterator[None]:
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise OutputExists(
            f"another {what} is writing this output",
            where=output,
            code="E_LOCKED",
            fix=f"if no {what} is running, delete {lock.name}",
        ) from error
    try:
        yield
    finally:
        os.close(handle)
        lock.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Put the names of new files in a folder on disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
