"""Child processes: answers, errors of the same class, and deaths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparseport.child import Child
from sparseport.errors import BadInput, EnvironmentProblem


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


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    import os\n    os._exit(9)", "status 9"),
        ("    import nothing_like_this", "nothing_like_this"),
        ("    raise RuntimeError('deep inside')", "deep inside"),
    ],
)
def test_deaths_become_environment_problems(step, body: str, words: str) -> None:  # type: ignore[no-untyped-def]
    with Child(step(body), {}) as child, pytest.raises(EnvironmentProblem, match=words):
        child.result()


def test_leaving_the_block_ends_the_process(step) -> None:  # type: ignore[no-untyped-def]
    with Child(step("    import time\n    time.sleep(600)"), {}) as child:
        process = child._process
    assert process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_send_no_telemetry(step) -> None:  # type: ignore[no-untyped-def]
    body = "    import sys\n    return {'blocked': sys.modules.get('openvino_telemetry', 0) is None}"
    with Child(step(body), {}) as child:
        assert child.result() == {"blocked": True}
