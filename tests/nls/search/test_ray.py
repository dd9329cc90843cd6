"""Ray: the same evaluations as everywhere else, also when an actor's process is killed. One start for all tests."""

from __future__ import annotations

import os

import pytest
from toy import Maker, evaluation_of, everything

from sparseport.errors import FidelityError, UsageError
from sparseport.nls.search.workers import open_team

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'sparseport[distributed]'")
SOME = everything()[:5]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """Two places; a team that was never asked anything holds none of them."""
    assert not ray.is_initialized()
    with open_team(Maker(tmp_path_factory.mktemp("cluster")), backend="ray", workers=2):
        yield
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_its_candidate_evaluated_again(tmp_path, capfd):
    maker = Maker(tmp_path, kill_once=SOME[1])
    with open_team(maker, backend="ray", workers=2, retries=1) as team:
        found = [e for batch in (SOME[:3], SOME[3:]) for e in team.evaluate_all(batch)]
    assert sorted(found, key=lambda e: SOME.index(e.candidate)) == [evaluation_of(candidate) for candidate in SOME]
    assert (tmp_path / "killed").exists()
    assert sorted(maker.asked()) == sorted([*SOME, SOME[1]])
    # One evaluator in each of two actors, and one in the actor that replaced the killed one.
    assert len(set(maker.made())) == len(maker.made()) == 3 and os.getpid() not in maker.made()
    assert capfd.readouterr().out == ""  # standard output belongs to results
    assert ray.is_initialized()  # this team did not start Ray, so it does not end it


@pytest.mark.slow
def test_an_error_of_ours_keeps_its_class_and_names_the_candidate(tmp_path):
    with pytest.raises(FidelityError) as raised:
        with open_team(Maker(tmp_path, fail=SOME[0]), backend="ray", workers=1) as team:
            list(team.evaluate_all(SOME))
    assert raised.value.where == "sub-network [32, 32, 64, 1]: layers.0" and raised.value.code == "E_TOY"


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "gpus"), [(3, 0.0), (1, 1.0)])
def test_more_workers_than_the_cluster_holds_are_refused(tmp_path, workers, gpus):
    with pytest.raises(UsageError, match=f"no room for {workers} workers"):
        with open_team(Maker(tmp_path), backend="ray", workers=workers, gpus=gpus):
            assert False


@pytest.mark.slow
def test_ray_starts_without_dashboard_and_statistics(cluster):
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
    assert ray._private.worker.global_worker.node.address_info["webui_url"] in (None, "")
