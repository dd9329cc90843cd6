"""Workers: the same evaluations from every backend, one evaluator each, and a lost worker costs nothing but time."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
from toy import Maker, evaluation_of, everything

from sparseport.errors import EnvironmentProblem, FidelityError, SparseportError, UsageError
from sparseport.nls.search.workers import open_team

SOME = everything()[:6]


def place(evaluation):
    return SOME.index(evaluation.candidate)


def evaluate_all(maker, candidates=SOME, **options):
    with open_team(maker, **options) as team:
        return list(team.evaluate_all(candidates))


@pytest.mark.parametrize(("backend", "workers"), [("local", 1), ("processes", 2)])
def test_every_backend_evaluates_each_candidate_once(tmp_path, backend, workers):
    maker = Maker(tmp_path)
    with open_team(maker, backend=backend, workers=workers) as team:
        found = [e for batch in (SOME[:4], SOME[4:]) for e in team.evaluate_all(batch)]
    assert sorted(found, key=place) == [evaluation_of(candidate) for candidate in SOME]
    assert sorted(maker.asked()) == sorted(SOME)
    # One evaluator per worker, over both batches, and in processes of their own.
    assert len(maker.made()) == workers == len(set(maker.made()))
    assert (os.getpid() in maker.made()) is (backend == "local")
    assert all(evaluation.seconds >= 0 for evaluation in found)


def test_no_evaluator_is_made_before_there_is_work(tmp_path):
    for backend in ("local", "processes"):
        assert evaluate_all(Maker(tmp_path), [], backend=backend) == []
    assert Maker(tmp_path).made() == []


def test_a_killed_process_is_replaced_and_its_candidate_evaluated_again(tmp_path):
    maker = Maker(tmp_path, kill_once=SOME[1])
    with open_team(maker, backend="processes", workers=2, retries=1) as team:
        found = [e for batch in (SOME[:3], SOME[3:]) for e in team.evaluate_all(batch)]
    assert sorted(found, key=place) == [evaluation_of(candidate) for candidate in SOME]
    assert (tmp_path / "killed").exists()
    assert sorted(maker.asked()) == sorted([*SOME, SOME[1]])
    # Two at first, and at the latest for the second batch one in place of the killed one.
    assert len(maker.made()) == 3


def test_a_candidate_that_always_kills_its_worker_ends_the_search(tmp_path):
    maker = Maker(tmp_path, kill_always=SOME[1])
    with pytest.raises(EnvironmentProblem) as raised:
        evaluate_all(maker, backend="processes", workers=1, retries=2)
    assert raised.value.code == "E_WORKER" and "3 times" in raised.value.what
    assert raised.value.where == "sub-network [32, 32, 64, 0]" and "SIGKILL" in raised.value.found
    assert maker.asked().count(SOME[1]) == 3


def test_a_worker_killed_between_two_batches_is_replaced(tmp_path):
    maker = Maker(tmp_path)
    with open_team(maker, backend="processes", workers=1) as team:
        assert list(team.evaluate_all(SOME[:1])) == [evaluation_of(SOME[0])]
        os.kill(maker.made()[0], 9)
        while multiprocessing.active_children():  # until it is gone: nobody reads what the team sends it
            time.sleep(0.01)
        assert list(team.evaluate_all(SOME[1:2])) == [evaluation_of(SOME[1])]
    assert len(maker.made()) == 2


@pytest.mark.parametrize("backend", ["local", "processes"])
def test_an_error_of_ours_keeps_its_class_and_names_the_candidate(tmp_path, backend):
    with pytest.raises(FidelityError) as raised:
        evaluate_all(Maker(tmp_path, fail=SOME[3]), backend=backend)
    error = raised.value
    assert error.where == "sub-network [32, 32, 48, 0]: layers.0"
    assert (error.what, error.found, error.fix, error.code) == ("the codes differ", "3", "look closer", "E_TOY")
    assert "in __call__" in str(error.__cause__)


@pytest.mark.parametrize("backend", ["local", "processes"])
def test_any_other_error_is_told_in_one_line(tmp_path, backend):
    with pytest.raises(SparseportError) as raised:
        evaluate_all(Maker(tmp_path, break_on=SOME[0]), backend=backend)
    assert raised.value.exit_code == 70 and raised.value.where == "sub-network [32, 32, 64, 1]"
    assert raised.value.what == "the evaluation failed: ZeroDivisionError: one over nothing"


def test_processes_end_with_the_block(tmp_path):
    maker = Maker(tmp_path)
    evaluate_all(maker, backend="processes", workers=2)
    for pid in maker.made():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_failed_search_does_not_wait_for_the_evaluations_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sparseport.nls.search.process_crew._PATIENCE", 300.0)
    maker = Maker(tmp_path, fail=SOME[1], sleep_on=SOME[0])
    started = time.monotonic()
    with pytest.raises(FidelityError):
        evaluate_all(maker, backend="processes", workers=2)
    assert time.monotonic() - started < 120 and multiprocessing.active_children() == []


def test_an_evaluator_that_cannot_be_sent_is_refused_before_any_work():
    with pytest.raises(UsageError, match="cannot be sent to another process"):
        with open_team(lambda: values, backend="processes"):
            assert False


def values(candidate):
    return {}
