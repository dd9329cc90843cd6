"""A fleet's turns and its travelling files, without Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from sparseport.bench.fleet import Node, Travelling, alive, arrived, in_turns
from sparseport.errors import FidelityError, UsageError

NODES = [Node("machine 1", "a", "10.0.0.1"), Node("machine 2", "b", "10.0.0.1"), Node("machine 3", "c", "10.0.0.2")]


def travelling(path: str, *pieces: bytes) -> Travelling:
    return Travelling(path, pieces, hashlib.sha256(b"".join(pieces)).hexdigest())


def itself(piece: Any) -> bytes:
    return bytes(piece)


def test_nodes_of_one_machine_never_measure_at_the_same_time() -> None:
    running: list[Node] = []
    together: list[set[str]] = []

    def start(node: Node) -> Node:
        assert node.address not in {one.address for one in running}
        running.append(node)
        together.append({one.name for one in running})
        return node

    def wait(handles: list[Node]) -> tuple[Node, dict[str, Any]]:
        running.remove(handles[0])
        return handles[0], {"of": handles[0].name}

    found, lost = in_turns(NODES, start, wait)
    assert [one["name"] for one in found] == ["machine 1", "machine 2", "machine 3"]
    assert [one["result"]["of"] for one in found] == ["machine 1", "machine 2", "machine 3"]
    assert lost == []
    assert {"machine 1", "machine 3"} in together, "other machines wait for nothing"


def test_a_lost_measurement_is_tried_once_more_and_then_named() -> None:
    started: list[str] = []

    def start(node: Node) -> tuple[str, int]:
        started.append(node.identity)
        return node.identity, len(started)

    def wait(handles: list[tuple[str, int]]) -> tuple[tuple[str, int], dict[str, Any] | str]:
        handle = handles[0]
        if handle[0] == "c" or (handle[0] == "a" and started.count("a") == 1):
            return handle, "the node died"
        return handle, {}

    found, lost = in_turns(NODES, start, wait)
    assert [one["name"] for one in found] == ["machine 1", "machine 2"]
    assert lost == [{"name": "machine 3", "why": "the node died"}]
    assert sorted(started) == ["a", "a", "b", "c", "c"]


def test_nodes_that_are_gone_are_left_out_and_have_no_host_names() -> None:
    nodes = [
        {"NodeManagerAddress": "10.0.0.2", "NodeID": "y", "Alive": True, "NodeManagerHostname": "secret"},
        {"NodeManagerAddress": "10.0.0.1", "NodeID": "x", "Alive": True, "NodeManagerHostname": "secret"},
        {"NodeManagerAddress": "10.0.0.3", "NodeID": "z", "Alive": False, "NodeManagerHostname": "secret"},
    ]
    assert alive(nodes) == [Node("machine 1", "x", "10.0.0.1"), Node("machine 2", "y", "10.0.0.2")]


def test_files_arrive_whole(tmp_path: Path) -> None:
    files = [travelling("config.json", b"{}"), travelling("deep/model.bin", b"ab", b"c")]
    folder = arrived(tmp_path, "out/openvino", files, itself)
    assert folder == tmp_path / "out" / "openvino"
    assert (folder / "deep" / "model.bin").read_bytes() == b"abc"
    file = arrived(tmp_path, "model.gguf", [travelling("model.gguf", b"GGUF")], itself)
    assert file == tmp_path / "model.gguf"
    assert file.read_bytes() == b"GGUF"


def test_a_file_that_changed_on_its_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FidelityError, match="changed on its way"):
        arrived(tmp_path, "out", [travelling("a", b"abc")], lambda piece: bytes(piece) + b"!")


@pytest.mark.parametrize(("label", "path"), [("out", "../x"), ("out", "/x"), ("../out", "x")])
def test_paths_stay_inside(tmp_path: Path, label: str, path: str) -> None:
    with pytest.raises(UsageError, match="leads out"):
        arrived(tmp_path / "in", label, [travelling(path, b"x")], itself)
    assert not (tmp_path / "x").exists()
