"""Peers: a GGUF file that transformers reads back as the same model, and what is said of those that cannot be made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.bench import peers
from sparseport.bench.gguf_peer import gguf_name, interleaved, write_gguf
from sparseport.bench.peers import Peer, make_peers
from sparseport.bench.subjects import Subject
from sparseport.errors import EnvironmentProblem, Unsupported, UsageError


def test_the_gguf_peer_is_the_same_model_rounded(tiny_base: Path, tmp_path: Path) -> None:
    """transformers undoes llama.cpp's order of q and k; a head mixed up, or a name wrong, would not come back."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    from sparseport.checkpoints.folder import ModelFolder

    output = tmp_path / "peer.gguf"
    write_gguf(str(tiny_base), str(output))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="peer.gguf", dtype="float32")
    found = {name: value.detach().numpy() for name, value in loaded.named_parameters(remove_duplicate=False)}
    kinds = gguf.GGMLQuantizationType
    with ModelFolder.open(tiny_base) as model:
        names = [name for name in model.names() if not (model.tied_head and name == "lm_head.weight")]
        for name in names:
            values = np.asarray(model.read(name), np.float32)
            table = name.startswith(("model.embed_tokens", "lm_head"))
            kind = kinds.F32 if values.ndim == 1 else kinds.Q8_0 if table else kinds.Q4_0
            # Blocks run along a row, so the order of rows changes nothing about the rounding.
            expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            assert np.array_equal(found[name], expected), name


def test_rows_of_a_head_are_paired() -> None:
    """Two heads of four rows: llama.cpp rotates rows side by side, a checkpoint half a head apart."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_is_no_llama_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for name in ("model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        with pytest.raises(Unsupported):
            gguf_name(name)
    for change in ({"model_type": "qwen3"}, {"rope_scaling": {"rope_type": "llama3"}}):
        folder = shutil.copytree(tiny_base, tmp_path / next(iter(change)))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(Unsupported, match="plain Llama"):
            write_gguf(str(folder), str(tmp_path / "out.gguf"))


def test_peers_that_cannot_be_made_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(checkpoint: Path, output: Path) -> None:
        raise EnvironmentProblem("it broke")

    def works(checkpoint: Path, output: Path) -> None:
        output.mkdir()

    def peer(name: str, packages: tuple[str, ...], make: Any) -> Peer:
        return Peer(name, "openvino", "openvino", packages, "install it", make)

    written = []
    monkeypatch.setattr(peers, "write_dequantised", lambda subject, output: written.append(output.mkdir()))
    found = (peer("absent", ("no_such_package",), works), peer("broken", (), fails), peer("good", (), works))
    monkeypatch.setattr(peers, "PEERS", found)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sparseport.json").write_text("{}")
    steps: list[int] = []
    made, missing = make_peers(Subject(tmp_path / "out", "openvino", "out"), tmp_path, lambda: steps.append(1))
    assert [(one.name, subject.path) for one, subject in made] == [("good", tmp_path / "good")]
    assert [(one["engine"], one["fix"]) for one in missing] == [
        ("absent", "install it"),
        ("broken", "measure without it"),
    ]
    assert "no_such_package" in missing[0]["why"] and "it broke" in missing[1]["why"]
    assert len(written) == 1 and len(steps) == 3
    assert not (tmp_path / "dequantised").exists(), "the dequantised model is large"


def test_peers_need_a_certified_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sparseport exported"):
        make_peers(Subject(tmp_path, "openvino", "out"), tmp_path)


def test_a_command_that_fails_quotes_its_last_line() -> None:
    import sys

    with pytest.raises(EnvironmentProblem, match="no such model"):
        peers._run([sys.executable, "-c", "import sys; sys.exit('loading\\nno such model')"])
