"""The journal: safe line by line, resumable, and refused where it is damaged, another's, or in use."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import GROUPS, OBJECTIVE_PAIR, evaluation_of, everything

from sparseport.errors import BadInput, EnvironmentProblem, OutputExists, UsageError
from sparseport.nls.search.journal import RunIdentity, open_journal
from sparseport.nls.search.objectives import OBJECTIVES, Evaluation

IDENTITY = RunIdentity(GROUPS, "e" * 64, OBJECTIVE_PAIR, {"name": "nsga2", "seed": 0, "points": ((0.5, 1.0),)})
SOME = [evaluation_of(candidate) for candidate in everything()[:4]]


def filled(path, evaluations=SOME):
    with open_journal(path, IDENTITY) as journal:
        for evaluation in evaluations:
            journal.add(evaluation)
    return path


def content(path):
    with open_journal(path, IDENTITY) as journal:
        return list(journal.done.values())


def test_what_was_added_is_there_again(tmp_path):
    path = filled(tmp_path / "new" / "journal.jsonl")
    assert content(path) == SOME
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert list(lines[0]) == ["sparseport_search_journal", "space", "evaluation", "objectives", "strategy"]
    assert lines[0]["objectives"][0] == {"name": "accuracy", "direction": "max", "unit": None}
    assert [tuple(line["sizes"]) for line in lines[1:]] == [e.candidate for e in SOME]
    assert [line["values"] for line in lines[1:]] == [e.values for e in SOME]  # to the last bit
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_each_evaluation_is_on_disk_when_add_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "journal", []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(path.read_bytes().count(b"\n")))
    with open_journal(path, IDENTITY) as journal:
        assert synced[0] == 1
        for number, evaluation in enumerate(SOME, 2):
            journal.add(evaluation)
            assert path.read_bytes().count(b"\n") == synced[-1] == number
        assert journal.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_journal_cut_anywhere_in_its_last_line_goes_on(tmp_path):
    whole = filled(tmp_path / "whole").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    path = tmp_path / "cut"
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert content(path) == SOME[:3]
        assert path.read_bytes() == whole[:last]
    path.write_bytes(whole[: last + 9])
    assert filled(path, SOME[3:]).read_bytes() == whole


def test_a_first_line_cut_anywhere_begins_again(tmp_path):
    header = filled(tmp_path / "whole", []).read_bytes()
    path = tmp_path / "cut"
    for end in [*range(0, len(header), 17), len(header) - 1]:
        path.write_bytes(header[:end])
        assert content(path) == [] and path.read_bytes() == header


def damage(line, **changes):
    return json.dumps({**json.loads(line), **changes}).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line[:-1], "not valid JSON"),
        (lambda line: b"", "not valid JSON"),
        (lambda line: b"\x00" * len(line), "not valid JSON"),
        (lambda line: b"[1]", "it is no evaluation"),
        (lambda line: damage(line, more=1), "it is no evaluation"),
        (lambda line: damage(line, sizes=[32, 32, 64]), "one size per group"),
        (lambda line: damage(line, sizes=[32, 32, 64, 2]), "block is not in the search space"),
        (lambda line: damage(line, values={"accuracy": 1.0}), "other values than the objectives"),
        (lambda line: damage(line, values={"accuracy": "1", "macs": 1}), "accuracy is not a finite number"),
        (lambda line: damage(line, values=[1]), "it is no evaluation"),
        (lambda line: damage(line, seconds=-1), "seconds is no time"),
        (lambda line: damage(line, sizes=list(SOME[0].candidate)), "evaluated in an earlier line"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number_and_nothing_is_touched(tmp_path, change, reason):
    path = filled(tmp_path / "journal")
    lines = path.read_bytes().split(b"\n")
    lines[3] = change(lines[3])
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(BadInput) as raised:
        content(path)
    assert raised.value.where == f"{path}, line 4" and raised.value.code == "E_JOURNAL"
    assert reason in raised.value.what and path.read_bytes() == before


def test_a_file_that_is_no_journal_is_refused_and_not_overwritten(tmp_path):
    path = tmp_path / "notes"
    for text in (b"dear diary", b"dear diary\nmore\n", b'{"a": 1}\n', b"[]\n", b"\n", b'{"sparse"'):
        path.write_bytes(text)
        with pytest.raises(BadInput, match="no journal of a search"):
            content(path)
        assert path.read_bytes() == text
    with pytest.raises(BadInput, match="E_PATH"):
        content(tmp_path)


@pytest.mark.parametrize(
    ("changes", "what", "expected", "found"),
    [
        ({"groups": GROUPS[:3]}, "the search space is different", None, None),
        ({"evaluation": "f" * 64}, "what an evaluation depends on", "f" * 64, "e" * 64),
        (
            {"objectives": (OBJECTIVES["accuracy"], OBJECTIVES["parameters"])},
            "the objectives is different",
            "accuracy (max, None), parameters (min, None)",
            "accuracy (max, None), macs (min, per token)",
        ),
        ({"strategy": {**IDENTITY.strategy, "seed": 1}}, "the strategy's seed is different", "1", "0"),
        ({"strategy": {**IDENTITY.strategy, "extra": None}}, "the strategy's extra is different", "null", "null"),
        ({"strategy": {"name": "nsga2", "seed": 0}}, "the strategy's points is different", "null", "[[0.5, 1.0]]"),
    ],
)
def test_another_searchs_journal_is_refused_and_the_difference_named(tmp_path, changes, what, expected, found):
    path = filled(tmp_path / "journal")
    before = path.read_bytes()
    with pytest.raises(UsageError) as raised:
        with open_journal(path, dataclasses.replace(IDENTITY, **changes)):
            assert False
    assert what in raised.value.what and raised.value.code == "E_JOURNAL" and "name a new journal" in raised.value.fix
    if expected:
        assert (raised.value.expected, raised.value.found) == (expected, found)
    assert path.read_bytes() == before


def test_a_journal_of_another_schema_is_refused(tmp_path):
    path = filled(tmp_path / "journal")
    path.write_bytes(path.read_bytes().replace(b'journal": 1', b'journal": 2', 1))
    with pytest.raises(UsageError, match="another schema"):
        content(path)


def test_two_searches_cannot_have_one_journal(tmp_path):
    path = filled(tmp_path / "journal")
    with open_journal(path, IDENTITY) as journal:
        with pytest.raises(OutputExists, match="another search is writing this output") as raised:
            content(path)
        assert raised.value.code == "E_LOCKED"
        journal.add(evaluation_of(everything()[9]))
    assert len(content(path)) == 5


def test_the_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "journal"
    code = """
import sys, time
from pathlib import Path
from test_journal import IDENTITY, SOME, open_journal
with open_journal(Path(sys.argv[1]), IDENTITY) as journal:
    journal.add(SOME[0])
    print("held", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parent, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputExists, match="E_LOCKED"):
            content(path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert content(path) == SOME[:1]


def test_a_full_disk_is_told_and_the_journal_stays_usable(tmp_path, monkeypatch):
    path = filled(tmp_path / "journal", SOME[:2])

    def full(handle):
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem, match="E_NOSPC"):
        with open_journal(path, IDENTITY) as journal:
            monkeypatch.setattr(os, "fsync", full)
            journal.add(SOME[2])
    monkeypatch.undo()
    assert content(path)[:2] == SOME[:2]


def test_seconds_are_kept_and_make_no_difference(tmp_path):
    path = filled(tmp_path / "journal", [Evaluation(SOME[0].candidate, SOME[0].values, 1.25)])
    assert content(path)[0].seconds == 1.25 and content(path) == SOME[:1]
