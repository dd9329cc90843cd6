"""docs/architectures.md: every line is a tiny random model, exported in float16 and in INT4 to both targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.architectures import ARCHITECTURES, Architecture, make_model, save_model
from e2e.in_process import FRONTEND, LAST, in_process
from e2e.tables import DOCS, WRITE, cells_of, keep_only, settle_cells
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import FidelityError, SparseportError, Unsupported
from sparseport.nls.artifacts import write_gptq_base
from sparseport.nls.quantize import quantize_rtn
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.folder import verify
from sparseport.weights.digest import digest
from sparseport.weights.linear import QuantizedWeight
from sparseport.weights.mask import mask_of

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime_genai")

DOCUMENT, TABLE = DOCS / "architectures.md", "architectures"
# What is exported: the word for it in the document, and the form of ONNX folders.
FORMS = {"openvino": (("float16", "nbits"), ("INT4", "nbits")),
         "onnx": (("float16", "nbits"), ("INT4", "nbits"), ("float16 as qdq", "qdq"))}  # fmt: skip
GROUP = 16


def _export(base: Path, out: Path, target: str = "onnx", **onnx: Any) -> Any:
    fields = {"base": base, "output": out, "target": [target], "tokenizer": False, "onnx": onnx}
    with in_process():
        return export(make_recipe(fields))


def _quantised(base: Path, out: Path) -> dict[str, QuantizedWeight]:
    """The model of a folder as a GPTQ folder: every layer but the head in INT4."""
    with ModelFolder.open(base) as folder:
        read = {m: folder.read(f"{m}.weight") for m in folder.linear_names() if m != folder.head_name}
        weights = {m: quantize_rtn(v, mask_of(v), group_size=GROUP) for m, v in read.items()}
        write_gptq_base(folder, weights.items(), out, group_size=GROUP, symmetric=False)
    return weights


def _proven(base: Path, out: Path, target: str, form: str, want: dict[str, QuantizedWeight]) -> None:
    """Export, with the proof that the weights are those of the input and that the graph computes the model."""
    result = _export(base, out, target, format=form)
    assert verify(result.folder).differences == []
    assert float(result.certificate.body["numerics"]["full_precision"]["judged_max_abs"]) < 1e-4
    for module, weight in want.items():
        assert result.certificate.linears[module]["readback"][target] == digest(weight), module
    with ModelFolder.open(base) as folder:
        assert set(result.certificate.linears) == set(folder.linear_names()) - {folder.head_name}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_line(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path / "base")
    cells, traced = {}, "-"
    for target, forms in FORMS.items():
        done = []
        try:
            for word, form in forms:
                folder, want = tmp_path / "base", {}
                if word == "INT4":
                    folder = tmp_path / f"int4-{target}"
                    want = _quantised(tmp_path / "base", folder)
                _proven(folder, tmp_path / f"{target}-{word}", target, form, want)
                done.append(word)
        except SparseportError as error:
            assert not done, f"{target}: {done} are exported, and then {error}"
            assert not (tmp_path / f"{target}-{word}").exists() and not isinstance(error, FidelityError)
            done.append(f"refused ({error.exit_code}): {_reason(error)}")
        else:
            if target == "openvino":
                traced = "three layers, stamped" if LAST[FRONTEND]["stamped"] else "whole"
        cells[target] = ", ".join(done)
    settle_cells(DOCUMENT, TABLE, (name, cells["openvino"], traced, cells["onnx"]))


def _reason(error: SparseportError) -> str:
    """The message, and what was found unless a library says the same once more, or explains itself at length."""
    found = "" if error.found is None else str(error.found)
    found = "" if len(found) > 80 or "not currently supported" in found else f": {found}"
    return f"{error.what}{found.rstrip(': ')}".replace("|", "/").replace("\n", " ")


def test_every_line_has_its_model_and_every_model_its_line() -> None:
    if WRITE:
        keep_only(DOCUMENT, TABLE, set(ARCHITECTURES))
        pytest.skip("the lines are written by the tests that settle them; run again without writing to compare")
    lines = cells_of(DOCUMENT, TABLE)
    assert [cells[0] for cells in lines] == sorted(ARCHITECTURES, key=str.casefold)
    assert all(len(cells) == 4 and all(cells) for cells in lines)


def test_norms_that_are_stored_plus_one_are_certified_as_such(tmp_path: Path) -> None:
    make_model("gemma3_text", tmp_path / "base")
    make_model("qwen2", tmp_path / "other")
    for target in ("openvino", "onnx"):
        gemma = _export(tmp_path / "base", tmp_path / f"gemma-{target}", target).certificate.tensors
        assert {name for name, facts in gemma.items() if facts.get("added") == 1} == {n for n in gemma if "norm" in n}
        assert len([name for name in gemma if "norm" in name]) == 13
        other = _export(tmp_path / "other", tmp_path / f"other-{target}", target).certificate.tensors
        assert {facts.get("added") for facts in other.values()} == {None}


def test_a_head_size_that_the_kernel_does_not_take(tmp_path: Path) -> None:
    for size, message in ((12, "multiple of 8"), (24, "cannot turn heads of this size")):
        base = save_model(Architecture("Llama", {"head_dim": size}), tmp_path / f"base-{size}")
        with pytest.raises(Unsupported, match=message) as caught:
            _export(base, tmp_path / "out")
        assert "--onnx-format qdq" in str(caught.value) and not (tmp_path / "out").exists()
        result = _export(base, tmp_path / f"out-{size}", format="qdq")
        assert float(result.certificate.body["numerics"]["full_precision"]["judged_max_abs"]) < 1e-4


def test_what_the_builder_gets_wrong_is_refused(tmp_path: Path) -> None:
    """OLMo's queries, keys and values may be clipped; the builder does not know of that."""
    base = save_model(Architecture("Olmo", {"clip_qkv": 0.05}), tmp_path / "base")
    with pytest.raises(FidelityError, match="logits differ") as caught:
        _export(base, tmp_path / "out")
    assert caught.value.code == "E_NUMERICS" and not (tmp_path / "out").exists()
    other = _export(base, tmp_path / "other", "openvino")
    assert float(other.certificate.body["numerics"]["full_precision"]["judged_max_abs"]) < 1e-4


def test_layers_with_rows_of_the_vocabulary_are_not_taken_for_the_head(tmp_path: Path) -> None:
    """The builder does take them for it; the logit check finds it."""
    settings = {"original_max_position_embeddings": 256, "vocab_size": 2 * 128}
    base = save_model(Architecture("Phi3", settings), tmp_path / "base")
    with pytest.raises(SparseportError):
        _export(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_caps_of_attention_scores_are_part_of_the_graph(tmp_path: Path) -> None:
    """A fused attention would leave them out, which small scores do not show."""
    settings = {"head_dim": 16, "query_pre_attn_scalar": 1, "attn_logit_softcapping": 0.5}
    base = save_model(Architecture("Gemma2", settings), tmp_path / "base")
    for target in ("openvino", "onnx"):
        result = _export(base, tmp_path / target, target)
        assert float(result.certificate.body["numerics"]["full_precision"]["judged_max_abs"]) < 1e-4
