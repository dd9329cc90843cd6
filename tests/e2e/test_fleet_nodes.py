"""A fleet of two Ray nodes on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sparseport.bench.fleet import bench_fleet
from sparseport.bench.rounds import Asked


@pytest.mark.slow
def test_several_nodes_measure_real_folders(tiny_both: Any, tmp_path: Path) -> None:
    """Two nodes of Ray on this machine, with no folder in common but what is sent to them."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'sparseport[distributed]'")
    from ray.cluster_utils import Cluster

    folder = shutil.copytree(tiny_both[0].output / "openvino", tmp_path / "model")
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        asked = Asked(prompt=4, tokens=3, rounds=1, warm_up=0)
        result = bench_fleet([folder], engines=["openvino"], asked=asked, bandwidth=False)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert result["lost"] == []
    assert [one["name"] for one in result["machines"]] == ["machine 1", "machine 2"]
    for one in result["machines"]:
        (row,) = one["result"]["rows"]
        assert row["model"] == "model"
        assert row["decode_ms"]["min"] > 0
