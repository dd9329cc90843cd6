"""Output is whole or absent: after errors, signals, a killed process, a full disk, and under concurrency."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparseport import publish
from sparseport.errors import EnvironmentProblem, OutputExists, UsageError
from sparseport.publish import TEMP_PREFIX, check_space, staged_output

CHILD = """
import signal, sys, time
from pathlib import Path
from sparseport import cli
from sparseport.publish import staged_output

def run(options):
    with staged_output(options.folder, overwrite=True) as stage:
        (stage / "new.txt").write_text("new")
        print("ready", flush=True)
        time.sleep(60)
    return 0

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
cli._run_verify = run  # the verb does not matter: handlers and unwinding are those of the command line
sys.exit(cli.main(["verify", sys.argv[1]]))
"""


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder with the digest of its content."""
    content = {path: path.read_bytes() if path.is_file() else b"folder" for path in sorted(folder.rglob("*"))}
    return {path.relative_to(folder).as_posix(): hashlib.sha256(data).hexdigest() for path, data in content.items()}


def fill(folder: Path, text: str = "old") -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(text)
    (folder / "deep" / "b.txt").write_text(text)
    return folder


@pytest.fixture(params=["absent", "there"])
def output(request, tmp_path):
    """An output path: nothing there, or an older output."""
    return fill(tmp_path / "out") if request.param == "there" else tmp_path / "out"


@pytest.fixture
def child(repo_root, tmp_path):
    """Start a process that holds the output and waits in the middle of writing."""
    started = []

    def start(output: Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(repo_root / "src")}
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def certified(folder: Path) -> bool:
    return (folder / "sparseport.json").is_file()


def write_new(output: Path, overwrite: bool = True) -> None:
    with staged_output(output, overwrite) as stage:
        fill(stage / "sub", "new")


def test_the_output_appears_at_the_end_and_alone(output):
    existed = output.exists()
    with staged_output(output, overwrite=True) as stage:
        assert stage.parent == output.parent and stage.name.startswith(TEMP_PREFIX) and not any(stage.iterdir())
        fill(stage / "sub", "new")
        assert output.exists() == existed and not (output / "sub").exists()
    assert sorted(tree(output)) == ["sub", "sub/a.txt", "sub/deep", "sub/deep/b.txt"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_missing_parents_are_made(tmp_path):
    write_new(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "sub" / "a.txt").read_text() == "new"


def test_a_relative_output_stays_where_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged_output(Path("out")) as stage:
        (stage / "f").write_text("x")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out" / "f").is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError, MemoryError])
def test_an_error_leaves_everything_as_it_was(output, error):
    before = tree(output.parent)
    with pytest.raises(error), staged_output(output, overwrite=True) as stage:
        fill(stage / "sub", "new")
        raise error
    assert tree(output.parent) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_and_leaves_everything_as_it_was(output, monkeypatch, number):
    before = tree(output.parent)
    with pytest.raises(EnvironmentProblem, match="no space left") as caught, staged_output(output, True) as stage:
        fill(stage / "sub", "new")
        raise OSError(number, os.strerror(number))
    assert caught.value.code == "E_NOSPC" and caught.value.exit_code == 8
    assert tree(output.parent) == before

    def full(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)  # delayed allocation: the disk turns out to be full at the very end
    with pytest.raises(EnvironmentProblem, match="no space left"):
        write_new(output)
    assert tree(output.parent) == before


def test_a_real_write_over_the_limit_is_named(tmp_path, repo_root):
    code = (
        "import resource, sys; from pathlib import Path; from sparseport.publish import staged_output\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with staged_output(Path(sys.argv[1])) as stage: (stage / 'f').write_bytes(bytes(5000))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(repo_root / "src")},
    )
    assert "no space left for the output" in done.stderr
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_a_device_that_fails_is_named(output, number):
    before = tree(output.parent)
    with pytest.raises(EnvironmentProblem, match="cannot write the output") as caught, staged_output(output, True):
        raise OSError(number, os.strerror(number), "some.bin")
    assert "some.bin" in str(caught.value)
    assert tree(output.parent) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_everything_as_it_was(output, child, number, status):
    before = tree(output.parent)
    process = child(output)
    assert tree(output.parent) != before  # it is writing
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == "" and "Traceback" not in err
    assert tree(output.parent) == before


def test_what_a_killed_process_left_is_removed_by_the_next_run(output, child):
    before = tree(output.parent)
    process = child(output)
    process.kill()
    process.communicate()
    left = tree(output.parent)
    assert any(name.startswith(TEMP_PREFIX) for name in left)
    assert {name: value for name, value in left.items() if not name.startswith(TEMP_PREFIX)} == before
    write_new(output)
    assert [path.name for path in output.parent.iterdir()] == ["out"] and (output / "sub").is_dir()
    assert not (output / "new.txt").exists()


def killed_between_renames(parent: Path) -> dict[str, str]:
    """The state between `output -> aside` and `stage -> output`."""
    old = fill(parent / "expected")
    content = tree(old)
    old.rename(parent / f"{TEMP_PREFIX}aside-out")
    fill(parent / f"{TEMP_PREFIX}stage-out", "new")
    return content


def test_a_run_killed_between_its_renames_is_replaced(tmp_path):
    killed_between_renames(tmp_path)
    write_new(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "sub").is_dir()


def test_a_run_killed_between_its_renames_keeps_the_old_output_without_overwrite(tmp_path):
    content = killed_between_renames(tmp_path)
    with pytest.raises(OutputExists):
        write_new(tmp_path / "out", overwrite=False)
    assert tree(tmp_path / "out") == content


def test_a_run_killed_between_its_renames_keeps_the_old_output_when_the_next_fails(tmp_path):
    content = killed_between_renames(tmp_path)
    with pytest.raises(ValueError), staged_output(tmp_path / "out", True):
        raise ValueError
    assert tree(tmp_path / "out") == content and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_had_begun_to_delete_is_not_brought_back(tmp_path):
    """The old output was set aside, replaced and half deleted; then somebody removed the new one."""
    fill(tmp_path / f"{TEMP_PREFIX}aside-out")
    with staged_output(tmp_path / "out", ours=certified) as stage:
        (stage / "new").write_text("x")
    assert sorted(tree(tmp_path)) == ["out", "out/new"]


def test_an_output_with_the_marker_is_brought_back(tmp_path):
    old = fill(tmp_path / f"{TEMP_PREFIX}aside-out")
    (old / "sparseport.json").write_text("{}")
    content = tree(old)
    with pytest.raises(ValueError), staged_output(tmp_path / "out", True, ours=certified):
        raise ValueError
    assert tree(tmp_path / "out") == content and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("other", ["m.old", "m.lock", "stage-m", "aside-m", "lock-m"])
def test_a_killed_run_on_a_similar_name_leaves_no_mark_on_ours(tmp_path, child, other):
    process = child(tmp_path / other)
    process.kill()
    process.communicate()
    left = tree(tmp_path)
    write_new(tmp_path / "m", overwrite=False)  # nothing of the other run may stand there as `m`
    assert sorted(tree(tmp_path / "m")) == ["sub", "sub/a.txt", "sub/deep", "sub/deep/b.txt"]
    assert {name: value for name, value in tree(tmp_path).items() if name in left} == left


@pytest.mark.parametrize("other", ["m.old", "m.lock", "stage-m", "aside-m", "lock-m"])
@pytest.mark.parametrize("there", [False, True])
def test_a_running_export_to_a_similar_name_is_not_disturbed(tmp_path, child, other, there):
    if there:
        fill(tmp_path / "m")
    child(tmp_path / other)
    running = {name: value for name, value in tree(tmp_path).items() if name.startswith(TEMP_PREFIX)}
    assert any(name.endswith("/new.txt") for name in running)
    write_new(tmp_path / "m")
    assert sorted(tree(tmp_path / "m")) == ["sub", "sub/a.txt", "sub/deep", "sub/deep/b.txt"]
    after = tree(tmp_path)
    assert {name: after.get(name) for name in running} == running


def test_the_names_of_temporary_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="temporary"):
        write_new(tmp_path / f"{TEMP_PREFIX}stage-m")
    assert tree(tmp_path) == {}


def test_a_second_rename_that_fails_brings_the_old_output_back(tmp_path, monkeypatch):
    output = fill(tmp_path / "out")
    before = tree(tmp_path)
    rename = Path.rename

    def failing(self, target):
        if self.name == f"{TEMP_PREFIX}stage-out":
            raise OSError(errno.EIO, "gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EnvironmentProblem):
        write_new(output)
    assert tree(tmp_path) == before


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    synced: set[str] = set()
    fsync, rename = os.fsync, Path.rename

    def noting(handle):
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def checking(self, target):
        if self.name == f"{TEMP_PREFIX}stage-out":
            files = {str(path) for path in self.rglob("*") if path.is_file()}
            assert len(files) == 2 and files <= synced and str(self) in synced
        return rename(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name open files")
    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", checking)
    write_new(tmp_path / "out")
    assert str(tmp_path) in synced  # the rename itself


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    output = fill(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match="--overwrite") as caught:
        write_new(output, overwrite=False)
    assert caught.value.exit_code == 6 and caught.value.code == "E_EXISTS"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match="not a folder"):
        write_new(tmp_path / "out", overwrite)
    assert tree(tmp_path) == before


def test_overwrite_swaps(tmp_path):
    output = fill(tmp_path / "out")
    write_new(output)
    assert sorted(tree(output)) == ["sub", "sub/a.txt", "sub/deep", "sub/deep/b.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_refused_at_once(output, child):
    process = child(output)
    before = tree(output.parent)
    started = time.monotonic()
    with pytest.raises(OutputExists, match="another export") as caught:
        write_new(output)
    assert time.monotonic() - started < 5 and caught.value.code == "E_LOCKED" and caught.value.exit_code == 6
    assert tree(output.parent) == before
    write_new(output.parent / "other")  # another output is free
    process.kill()
    process.communicate()
    write_new(output)
    assert (output / "sub").is_dir()


def held(lock: Path) -> bool:
    handle = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_a_lock_file_removed_under_our_hands_is_locked_again(tmp_path, monkeypatch):
    lock = tmp_path / f"{TEMP_PREFIX}lock-out"
    flock, calls = fcntl.flock, []

    def racing(handle, how):
        calls.append(handle)
        if len(calls) == 1:
            lock.unlink()  # its owner finished between our open and our lock
        elif len(calls) == 2:
            lock.unlink()
            lock.touch()  # and here a third process made a new one
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", racing)
    with staged_output(tmp_path / "out") as stage:
        (stage / "f").write_text("x")
        assert len(calls) == 3
        monkeypatch.undo()
        assert held(lock)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_writers_never_mix(tmp_path):
    output = tmp_path / "out"
    wins, refusals, strange = [], [], []

    def work(name: str) -> None:
        for turn in range(15):
            try:
                with staged_output(output, True) as stage:
                    for file in "abc":
                        (stage / file).write_text(f"{name} {turn}")
                wins.append(name)
            except OutputExists as error:
                refusals.append(error.code)
            except BaseException as error:
                strange.append(error)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert strange == [] and set(refusals) <= {"E_LOCKED"} and len(wins) + len(refusals) == 60 and wins
    assert len({(output / file).read_text() for file in "abc"}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EnvironmentProblem, match="not writable") as caught:
            write_new(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.exit_code == 8 and tree(tmp_path) == {}


def test_a_parent_without_write_permission_is_named_for_root_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(EnvironmentProblem, match="not writable"):
        write_new(tmp_path / "out")
    assert tree(tmp_path) == {}


def test_a_file_as_parent_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match="cannot make the folder") as caught:
        write_new(tmp_path / "file" / "out")
    assert str(tmp_path / "file") in str(caught.value)


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(EnvironmentProblem, match="dangling"):
        write_new(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").is_symlink()


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    fill(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(OutputExists):
        write_new(tmp_path / "out", overwrite=False)
    write_new(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real" / "sub").is_dir()
    assert not (tmp_path / "real" / "a.txt").exists()


def test_a_link_planted_as_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / f"{TEMP_PREFIX}lock-out").symlink_to(victim)
    with pytest.raises(EnvironmentProblem, match="cannot lock"):
        write_new(tmp_path / "out")
    assert not victim.exists() and not (tmp_path / "out").exists()


def test_too_little_space_is_refused_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage._replace(free=10 << 20))
    check_space(tmp_path / "not" / "yet" / "out", 10 << 20)
    with pytest.raises(EnvironmentProblem, match="expected 11 MiB, found 10 MiB free") as caught:
        check_space(tmp_path / "not" / "yet" / "out", 11 << 20)
    assert caught.value.code == "E_NOSPC"


def test_overwrite_spares_folders_that_are_not_ours(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExists, match="not made by sparseport"), staged_output(output, True, ours=certified):
        pass
    assert (output / "thesis.txt").read_text() == "precious"
    (output / "sparseport.json").write_text("{}")
    with staged_output(output, True, ours=certified) as stage:
        (stage / "new").write_text("x")
    assert [path.name for path in output.iterdir()] == ["new"]
