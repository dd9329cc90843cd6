"""Progress: JSON lines that a program can read, bars on a terminal, silence when asked."""

from __future__ import annotations

import io
import json
import sys

import pytest

from sparseport.progress import Progress


def lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""  # standard output belongs to results
    return [json.loads(line) for line in err.splitlines()]


def test_json_lines_start_count_by_tenths_and_end(capsys):
    with Progress("json").task("merging", 30) as step:
        for _ in range(30):
            step()
    start, *counts, end = lines(capsys)
    assert start == {"step": "merging", "state": "start", "total": 30}
    assert [line["done"] for line in counts] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert all(line["step"] == "merging" and line["total"] == 30 for line in counts)
    assert end["state"] == "end" and end["seconds"] >= 0


@pytest.mark.parametrize("total", [None, 0])
def test_steps_of_unknown_length_only_start_and_end(capsys, total):
    with Progress("json").task("hashing", total) as step:
        step()
    assert [line["state"] for line in lines(capsys)] == ["start", "end"]


def test_a_failed_step_does_not_end(capsys):
    with pytest.raises(ValueError), Progress("json").task("merging", 2):
        raise ValueError
    assert [line["state"] for line in lines(capsys)] == ["start"]


def test_a_long_step_says_little(capsys):
    with Progress("json").task("merging", 10_000) as step:
        for _ in range(10_000):
            step()
    assert len(lines(capsys)) == 12


def test_notes_are_lines_of_their_own(capsys):
    Progress("json").note("line\nbreak \x1b[31m")
    assert lines(capsys) == [{"note": "line\nbreak \x1b[31m"}]


def test_quiet_says_nothing(capsys):
    quiet = Progress("quiet")
    with quiet.task("merging", 3) as step:
        step()
    quiet.note("x")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("terminal", "style"), [(True, "bars"), (False, "json")])
def test_the_style_follows_the_terminal(monkeypatch, terminal, style):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert Progress().style == style


def test_bars_show_the_label_on_standard_error_and_notes_cannot_steer_the_terminal(capsys):
    bars = Progress("bars")
    with bars.task("merging layers", 2) as step:
        step()
        step()
    with bars.task("hashing") as step:
        step()
    bars.note("from a file: \x1b[31m")
    out, err = capsys.readouterr()
    assert out == "" and "merging layers" in err and "2/2" in err and "hashing" in err
    assert "from a file: \\x1b[31m\n" in err


def test_the_job_goes_on_when_the_reader_of_progress_is_gone(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with Progress("json").task("merging", 1) as step:
        step()
    done = sys.stderr
    assert not isinstance(done, Closed)
    done.close()
