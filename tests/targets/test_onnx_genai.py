"""onnxruntime-genai loads the folder and generates what plain ONNX Runtime computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.errors import BadInput
from sparseport.targets.onnx.folder import NAME, token_ids, write_genai_config


def _model(folder: Path, generation: dict[str, Any], config: dict[str, Any]) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_models_own_token_ids_win(tmp_path: Path) -> None:
    config = {"eos_token_id": 5, "pad_token_id": 9}
    folder = _model(tmp_path, {"eos_token_id": [2, 7], "bos_token_id": 0}, config)
    assert token_ids(folder, "base") == {"eos_token_id": [2, 7], "bos_token_id": 0, "pad_token_id": 9}
    (tmp_path / "built").mkdir()
    guessed = {"model": {"eos_token_id": [1, 2], "type": "llama"}, "search": {"do_sample": True}}
    (tmp_path / "built" / NAME).write_text(json.dumps(guessed))
    write_genai_config(tmp_path / "built", folder, token_ids(folder, "base"), shared_cache=False)
    written = json.loads((folder / NAME).read_text())
    assert written["model"] == {"eos_token_id": [2, 7], "bos_token_id": 0, "pad_token_id": 9, "type": "llama"}
    assert written["search"] == {"do_sample": False, "past_present_share_buffer": False}


@pytest.mark.parametrize("ends", [3, [3, 4]])
def test_ids_that_only_the_config_has(ends: Any, tmp_path: Path) -> None:
    found = token_ids(_model(tmp_path, {}, {"eos_token_id": ends}), "base")
    assert found == {"eos_token_id": ends, "bos_token_id": 1, "pad_token_id": 3}


@pytest.mark.parametrize("ends", [None, []])
def test_a_model_that_never_stops_is_refused(ends: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="never stop") as caught:
        token_ids(_model(tmp_path, {"eos_token_id": ends}, {}), "base")
    assert caught.value.code == "E_CONFIG" and "base, generation_config.json" in str(caught.value)


def test_greedy_tokens_are_those_of_the_logits(tiny_base: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.targets.model_files import write_config, write_generation_config
    from sparseport.targets.onnx.builder import build_graph
    from sparseport.targets.onnx.graph import write_model
    from sparseport.targets.onnx.store import OnnxStore
    from sparseport.verify.numerics import logits_of, reference_model
    from sparseport.weights.linear import DenseWeight

    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    with ModelFolder.open(tiny_base) as base, OnnxStore(scratch / "weights.pack") as store:
        write_config(base.config, out)
        write_generation_config(base.path, base.config, out)
        small = {n: np.array(base.read(n)) for n in base.names() if len(base.info(n).shape) < 2}
        answer = build_graph(str(out / "config.json"), str(scratch / "graph"))
        modules = [*base.linear_names(), "model.embed_tokens"]
        stored = {module: store.add_dense(f"{module}.weight", base.read(f"{module}.weight")) for module in modules}
        skeleton = scratch / "graph" / "skeleton.onnx"
        write_model(skeleton, out, answer, stored, small, store, 1)
        every = {name: DenseWeight(np.array(base.read(name))) for name in base.names()}
    write_genai_config(scratch / "graph", out, token_ids(out, "base"))
    shutil.rmtree(scratch)

    prompt = [5, 17, 33, 80, 121]
    parameters = genai.GeneratorParams(model := genai.Model(str(out)))
    parameters.set_search_options(max_length=16, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    produced = [int(token) for token in generator.get_sequence(0)]

    network, wanted = reference_model(tiny_base, every.items()), list(prompt)
    while len(wanted) < 16:
        wanted.append(int(logits_of(network, wanted)[-1].argmax()))
        if wanted[-1] == 0:  # the tiny model's end token
            break
    assert produced == wanted and len(produced) > len(prompt) + 3
