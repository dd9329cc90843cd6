"""NNCF's FQ_LORA checkpoints go all the way, and every code in the written graph is the one that nncf.strip gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e.both import Exported, export_to_both
from e2e.formats import Line, settle, shown
from e2e.in_process import in_process
from nncf_models import assert_same, nncf_with_strip, set_ranks, stripped_layers, tuned
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput
from sparseport.inspection import inspect
from sparseport.targets.openvino import readback
from sparseport.weights.linear import QuantizedWeight


@pytest.fixture(scope="module")
def nncf() -> Iterator[Any]:
    with nncf_with_strip() as package, in_process():
        yield package


def _through(tmp_path: Path, **inputs: Any) -> tuple[Exported, dict[str, QuantizedWeight]]:
    result = export_to_both(tmp_path, **{"allow_pickle": True, **inputs})
    model = readback.read_model(result.folder / "openvino_model.xml")
    found = {item.name: item.weight for item in readback.weights(model)}
    return result, {name: weight for name, weight in found.items() if isinstance(weight, QuantizedWeight)}


CASES = {
    f"{compression}, {mode}, {dtype}": (mode, compression, dtype)
    for mode, compression, dtype in (
        ("INT4_ASYM", "FQ_LORA_NLS", "float32"),
        ("INT4_SYM", "FQ_LORA_NLS", "bfloat16"),
        ("INT4_ASYM", "FQ_LORA", "bfloat16"),
        ("INT4_SYM", "FQ_LORA", "float32"),
    )
}
LINES = {
    case: f"{compression} checkpoint, {mode}, {dtype} base (`--allow-pickle`)"
    for case, (mode, compression, dtype) in CASES.items()
}


@shown(case=LINES)
def test_nncf(nncf: Any, case: str, tiny_base: Path, tmp_path: Path) -> None:
    mode, compression, dtype = CASES[case]
    output = tmp_path / "tuning"
    model = tuned(nncf, tiny_base, output / "last", mode=mode, compression=compression, dtype=dtype)
    inputs: dict[str, Any] = {"base": tiny_base, "adapter": output, "nncf_base_dtype": dtype}
    if compression == "FQ_LORA_NLS":
        set_ranks(model, 6)
        ranks = {"finetuning_results": {"best_heuristic_rank_config": [6, 6]}}
        (output / "result.json").write_text(json.dumps(ranks))
        inputs["sub_adapter"] = "heuristic"
    result, written = _through(tmp_path, **inputs)
    want = stripped_layers(nncf, model)
    assert set(written) == set(want) and len(want) == 16
    for module, (levels, zero_points, scales) in want.items():
        symmetric = mode == "INT4_SYM" and module not in ("model.embed_tokens", "lm_head")
        assert_same(written[module], levels, zero_points, scales, symmetric)
    stored = sorted({facts["stored"] for facts in result.certificate.linears.values()})
    settle(
        Line(
            LINES[case],
            "nncf",
            nncf.__version__,
            f"{len(want)} layers, embedding and head among them",
            "codes, zero-points, scales: equal to nncf.strip",
            ", ".join(stored),
        )
    )


def test_revived_weights_are_named(nncf: Any, tiny_sparse: Path, tmp_path: Path) -> None:
    tuned(nncf, tiny_sparse, tmp_path, mode="INT4_ASYM", compression="FQ_LORA", dtype="float32")
    inputs = {"base": tiny_sparse, "adapter": tmp_path, "nncf_base_dtype": "float32"}
    result, written = _through(tmp_path, **inputs)
    revived = 0
    with ModelFolder.open(tiny_sparse) as base:
        for module, weight in written.items():
            zeros = np.repeat(weight.zero_points, weight.group_size, axis=1)
            if "layers" in module:
                revived += int((weight.codes != zeros)[base.read(f"{module}.weight") == 0].sum())
    assert revived > 1000 and result.certificate.totals["revived"] == revived
    assert any(note.startswith(f"{revived:,} of 36,864 pruned weights") for note in result.notes)


def test_revived_weights_can_be_pruned_again(nncf: Any, tiny_sparse: Path, tmp_path: Path) -> None:
    tuned(nncf, tiny_sparse, tmp_path, mode="INT4_SYM", compression="FQ_LORA", dtype="float32")
    inputs = {"base": tiny_sparse, "adapter": tmp_path, "nncf_base_dtype": "float32", "mask_policy": "reapply"}
    result, written = _through(tmp_path, **inputs)
    assert result.certificate.totals["revived"] == 0
    assert sum(facts.get("re_pruned", 0) for facts in result.certificate.linears.values()) > 1000
    with ModelFolder.open(tiny_sparse) as base:
        for module, weight in written.items():
            zeros = np.repeat(weight.zero_points, weight.group_size, axis=1)
            pruned = base.read(f"{module}.weight") == 0
            assert (weight.codes == zeros)[pruned].all()


def test_ranks_must_come_from_somewhere(nncf: Any, tiny_base: Path, tmp_path: Path) -> None:
    tuned(nncf, tiny_base, tmp_path, mode="INT4_ASYM", compression="FQ_LORA_NLS", dtype="float32")
    for choice in ("heuristic", "minimal"):
        with pytest.raises(BadInput, match="does not hold the ranks"):
            _through(tmp_path, base=tiny_base, adapter=tmp_path, sub_adapter=choice)
    with pytest.raises(BadInput, match="pickle"):
        _through(tmp_path, base=tiny_base, adapter=tmp_path, allow_pickle=False)
    found = inspect(tmp_path, allow_pickle=True)
    assert found.kind == "adapter" and "NNCF" in found.title
    assert any("largest ranks" in line and "--sub-adapter FILE" in line for line in found.warnings)
    assert any(line.startswith("the dtype that the base had decides the codes") for line in found.warnings)
    [command] = found.next
    assert f"--base BASE --nncf-base-dtype DTYPE --adapter {tmp_path} --allow-pickle" in command
    for rank, commands in ((6, 2), (9, 1)):  # nine was not trained
        ranks = {"finetuning_results": {"best_heuristic_rank_config": [6, rank]}}
        (tmp_path / "result.json").write_text(json.dumps(ranks))
        found = inspect(tmp_path, allow_pickle=True)
        assert len(found.next) == commands and not any("largest ranks" in line for line in found.warnings)
        assert any("rank was not trained" in line for line in found.warnings) == (rank == 9)
