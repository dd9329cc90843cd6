"""onnxruntime-genai loads the folder and generates what plain ONNX Runtime computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.errors import BadInput
from sparseport.targets.onnx.folder import NAME, write_genai_config

BUILT = {"model": {"eos_token_id": 1, "bos_token_id": 1, "type": "llama"}, "search": {"do_sample": True}}


def _folders(tmp_path: Path, generation: dict[str, Any], built: dict[str, Any] = BUILT) -> tuple[Path, Path]:
    for name in ("built", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "built" / NAME).write_text(json.dumps(built))
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path / "built", tmp_path / "out"


def test_the_models_own_token_ids_win(tmp_path: Path) -> None:
    built, out = _folders(tmp_path, {"eos_token_id": [2, 7], "bos_token_id": 0})
    write_genai_config(built, out)
    config = json.loads((out / NAME).read_text())
    assert config["model"] == {"eos_token_id": [2, 7], "bos_token_id": 0, "pad_token_id": 2, "type": "llama"}
    assert config["search"]["do_sample"] is False


def test_a_model_that_never_stops_is_refused(tmp_path: Path) -> None:
    built, out = _folders(tmp_path, {}, {"model": {"type": "llama"}, "search": {}})
    with pytest.raises(BadInput, match="never stop"):
        write_genai_config(built, out)
    assert not (out / NAME).exists()


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
    write_genai_config(scratch / "graph", out)
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
