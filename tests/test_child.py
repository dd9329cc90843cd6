"""Child processes: answers, errors of the same class, and deaths."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import pytest

from sparseport.child import Child
from sparseport.errors import BadInput, EnvironmentProblem, SparseportError


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Write a step's module and make it importable by child processes."""

    def write(body: str) -> str:
        (tmp_path / "some_step.py").write_text(
            "from sparseport.child import serve\nfrom sparseport.errors import BadInput\n"
            f"def step(**request):\n{body}\n\nif __name__ == '__main__':\n    serve(step)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "some_step"

    return write


def test_answer_survives_noise_on_stdout(step) -> None:  # type: ignore[no-untyped-def]
    with Child(step("    print('{noise}')\n    return {'sum': request['a'] + 1}"), {"a": 1}) as child:
        assert child.result() == {"sum": 2}


def test_errors_keep_class_and_parts(step) -> None:  # type: ignore[no-untyped-def]
    with (
        Child(step("    raise BadInput('bad', where='w', expected=1, found=2, fix='f', code='E_X')"), {}) as child,
        pytest.raises(BadInput) as caught,
    ):
        child.result()
    assert str(caught.value) == "error[E_X]: bad; in w; expected 1, found 2; to fix: f"


LESS_MEMORY = "`--no-numerics` skips the comparison; `--dry-run` shows the estimate"
KILL = "    import os, signal\n    os.kill(os.getpid(), signal.{})"


@pytest.mark.parametrize(
    ("body", "code", "words", "fix"),
    [
        ("    import os\n    os._exit(9)", "E_ENVIRONMENT", "status 9", "look at free memory and at `pip check`"),
        (
            "    import nothing_like_this",
            "E_ENVIRONMENT",
            "nothing_like_this",
            "pip install 'sparseport[openvino,onnx]'",
        ),
        ("    raise MemoryError", "E_MEM", "out of memory in step step", LESS_MEMORY),
        ("    raise OSError(12, 'Cannot allocate memory')", "E_MEM", "out of memory in step step", LESS_MEMORY),
        (
            "    import numpy\n    numpy.zeros((1 << 62,), 'u1')",
            "E_MEM",
            "out of memory in step step",
            LESS_MEMORY,
        ),
    ],
)
def test_what_the_machine_lacks_is_an_environment_problem(step, body, code, words, fix) -> None:  # type: ignore[no-untyped-def]
    with Child(step(body), {}) as child, pytest.raises(EnvironmentProblem, match=words) as caught:
        child.result()
    assert (caught.value.code, caught.value.exit_code, caught.value.fix) == (code, 8, fix)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to be killed by")
@pytest.mark.parametrize(
    ("name", "code", "words", "fix"),
    [
        ("SIGKILL", "E_MEM", "some_step was killed (SIGKILL), most often because memory ran out", LESS_MEMORY),
        ("SIGTERM", "E_MEM", "some_step was killed (SIGTERM), most often because memory ran out", LESS_MEMORY),
        ("SIGSEGV", "E_ENVIRONMENT", "some_step crashed (SIGSEGV)", "look at free memory and at `pip check`"),
    ],
)
def test_a_killed_child_is_told_from_one_that_crashed(step, name, code, words, fix) -> None:  # type: ignore[no-untyped-def]
    with Child(step(KILL.format(name)), {}) as child, pytest.raises(EnvironmentProblem) as caught:
        child.result()
    assert words in str(caught.value)
    assert (caught.value.code, caught.value.fix) == (code, fix)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("    raise RuntimeError('deep inside\\nand more')", "step step failed: RuntimeError: deep inside"),
        ("    raise KeyError('x')", "step step failed: KeyError: 'x'"),
        ("    assert False", "step step failed: AssertionError"),
        ("    return {'a': object()}", "step step failed: TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_defects_are_named_with_the_step(step, body: str, what: str) -> None:  # type: ignore[no-untyped-def]
    with Child(step(body), {}) as child, pytest.raises(SparseportError) as caught:
        child.result()
    assert type(caught.value) is SparseportError and caught.value.exit_code == 70
    assert caught.value.what == what and caught.value.fix == "run again with --debug"


def test_debug_shows_where_the_child_failed(step) -> None:  # type: ignore[no-untyped-def]
    body = "    deep()\n\ndef deep():\n    raise RuntimeError('inside')"
    with Child(step(body), {}) as child, pytest.raises(SparseportError) as caught:
        child.result()
    shown = "".join(traceback.format_exception(caught.value))
    assert "some_step.py" in shown and "in deep\n" in shown


def test_leaving_the_block_ends_the_process(step) -> None:  # type: ignore[no-untyped-def]
    with Child(step("    import time\n    time.sleep(600)"), {}) as child:
        process = child._process
    assert process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_send_no_telemetry(step) -> None:  # type: ignore[no-untyped-def]
    body = "    import sys\n    return {'blocked': sys.modules.get('openvino_telemetry', 0) is None}"
    with Child(step(body), {}) as child:
        assert child.result() == {"blocked": True}


def test_a_child_that_takes_too_long_is_told_and_killed(step) -> None:  # type: ignore[no-untyped-def]
    with (
        Child(step("    import time\n    time.sleep(600)"), {}) as child,
        pytest.raises(EnvironmentProblem, match=r"gave no answer within 0\.2 s") as caught,
    ):
        child.result(timeout=0.2)
    assert caught.value.code == "E_TIMEOUT" and child._process.returncode is not None


def test_an_environment_and_errors_that_are_let_through(  # type: ignore[no-untyped-def]
    step, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "    import os, sys\n    print('progress', file=sys.stderr)\n    return {'said': os.environ.get('MINE')}"
    module = step(body)
    environment = {**os.environ, "MINE": "yes"}
    with Child(module, {}, environment, show_errors=True) as child:
        assert child.result() == {"said": "yes"}
    assert "progress" in capfd.readouterr().err
    with Child(module, {}) as child:
        assert child.result() == {"said": None}
    assert capfd.readouterr().err == ""
