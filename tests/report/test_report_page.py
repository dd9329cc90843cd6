"""The page in every state: well-formed, loading nothing, saying what the files say and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from report.fakes import (
    CONFIG,
    bench,
    bench_row,
    body,
    gathered,
    layer,
    looked,
    naive,
    no_certificate,
    search_result,
    sub_network,
    written,
)
from report.html_checks import checked
from sparseport.report.bench_file import read_bench
from sparseport.report.gather import Gathered
from sparseport.report.naive_file import read_naive
from sparseport.report.page import page


def full(tmp_path: Path) -> Gathered:
    """Both targets of one model, with everything that a report can show."""
    openvino = looked(tmp_path / "openvino", name="out/openvino")
    onnx = looked(tmp_path / "onnx", body("onnx"), name="out/onnx")
    rows = [
        bench_row("ours", openvino.seal, 87.5),
        bench_row("theirs", None, 93.25, engine="llama.cpp", model="other.gguf", limit=None, drift=None),
    ]
    return gathered(
        openvino,
        onnx,
        benches=(read_bench(written(tmp_path / "bench.json", bench(*rows))),),
        naive=read_naive(written(tmp_path / "fidelity.json", naive())),
        search=("search.json", search_result()),
    )


def states(tmp_path: Path) -> dict[str, Gathered]:
    cut, config = sub_network()
    branch = {"rank": 4, "branch_sha256": "aa", "readback": {"openvino": "aa"}}
    dense = {"rule": "branch", "stored": "f16", "branch": branch, "weight_sha256": "ab", "readback": {"openvino": "ab"}}
    beside = body(linears={"model.layers.0.mlp.up_proj": {"shape": [8, 8], **dense}})
    switched = body(adapters={"adapter.safetensors": {"model.layers.0.mlp.up_proj": branch}})
    switched["files"]["adapter.safetensors"] = {"sha256": "78", "size": 9}
    empty = read_bench(written(tmp_path / "empty.json", bench(devices=[], missing=[], failed=[])))
    return {
        "one target": gathered(looked(tmp_path / "a")),
        "two targets and everything": full(tmp_path),
        "no logits, no tokenizer": gathered(looked(tmp_path / "b", body(numerics={"run": False}, files=_files()))),
        "sub-network": gathered(looked(tmp_path / "c", cut, config)),
        "branches in the graph": gathered(looked(tmp_path / "d", beside)),
        "adapter in a file": gathered(looked(tmp_path / "e", switched)),
        "no layer in a block": gathered(looked(tmp_path / "f", body(linears={"lm_head": layer((8, 8))}))),
        "two models": gathered(looked(tmp_path / "g"), looked(tmp_path / "h", beside)),
        "changed": gathered(looked(tmp_path / "i", differences=("model.bin: content changed",))),
        "no certificate": gathered(no_certificate()),
        "one good, one without": gathered(looked(tmp_path / "j"), no_certificate()),
        "stranger beside": gathered(looked(tmp_path / "k"), between=("notes.txt: beside the exported folders",)),
        "empty bench": gathered(looked(tmp_path / "l"), benches=(empty,)),
    }


def _files() -> dict[str, Any]:
    return {"config.json": {"sha256": "12", "size": 7}}


NAMES = (
    *("one target", "two targets and everything", "no logits, no tokenizer", "sub-network", "branches in the graph"),
    *("adapter in a file", "no layer in a block", "two models", "changed", "no certificate"),
    *("one good, one without", "stranger beside", "empty bench"),
)


@pytest.mark.parametrize("state", NAMES)
def test_every_state_is_a_page(tmp_path: Path, state: str) -> None:
    """Well-formed, no script, nothing loaded, every plot named and with a table, the same text again."""
    data = states(tmp_path)[state]
    text = page(data)
    parser = checked(text)
    assert text == page(data) and text.startswith("<!doctype html>\n")
    assert not re.search(r"\bNone\b|\bnan\b|Markup\(", text), "a value that is missing was printed"
    assert str(tmp_path) not in text
    policy = next(value for tag, name, value in parser.attributes if tag == "meta" and name == "content")
    assert policy.startswith("default-src 'none'; "), "a browser is told to load nothing, whatever else is on the page"
    for tag in re.findall(r"<svg[^>]*>", text):
        hidden = 'aria-hidden="true"' in tag
        nested = 'overflow="visible"' in tag
        assert hidden or nested or 'role="img" aria-label="' in tag or 'width="22" height="14"' in tag, tag
    for section in re.findall(r"<section id=.*?</section>", text, re.S):
        assert section.count("<figure") == 0 or ("<details" in section and "<table" in section)
    assert ("Not verified" in parser.text) == (not data.ok)
    assert set(NAMES) == set(states(tmp_path))


def test_the_page_has_the_numbers_of_the_files(tmp_path: Path) -> None:
    """Certificate, bench file, comparison and search, each by figures that stand nowhere else."""
    text = checked(page(full(tmp_path))).text
    # 2 * (32*32 + 16*32 + 32*64) weights in 6 layers, a quarter of them pruned
    assert "1,792 of 7,168 weights are pruned (25.0%), and every one of them is exactly zero." in text
    assert "0 of 7,168 codes differ from the merge" in text and "All 6 linear layers are stored in INT4." in text
    assert "2.0 MiB" in text and "3.974e-11" in text and "1.090e-07" in text and "allowed 0.001: passed" in text
    assert "87.5 tokens/s" in text and "83.1 to 91.9" in text and "37.5% of the bandwidth limit" in text
    assert "93.2" in text or "93.3" in text
    assert "KL 0.0137" in text and "same top token 91.1%" in text and "1.370e-02" in text and "0.9107" in text
    assert "drift not measured" in text and "NPU: no such device" in text and "pip install llama-cpp-python" in text
    assert "broken (PyTorch): failed: out of memory" in text
    assert "1.1% of the codes changed" in text and "1.662e-02" in text and "0.0150 in float32" in text
    assert "accuracy 91.5% on 200 items" in text and "sparseport changes none of the codes" in text
    assert "72 sub-networks were measured (nsga2)" in text and "the fewest MACs among those" in text
    assert "cd" * 32 in text and "ef" * 32 in text and "11" * 32 in text
    # heuristic: 0.22 + 0.10 + 0.20 + 0.30 by the toy's table
    assert "heuristic : accuracy 82.0%" in text


def test_the_seals_are_those_of_the_certificates(tmp_path: Path) -> None:
    data = full(tmp_path)
    text = page(data)
    for folder in data.folders:
        assert text.count(folder.seal) == 1 and text.count(folder.proof) == 1
    assert data.folders[0].seal != data.folders[1].seal


def test_only_rows_of_the_very_folder_are_its_speed(tmp_path: Path) -> None:
    """A row that has the folder's name and another certificate is shown, and said to be another's."""
    folder = looked(tmp_path / "openvino", name="openvino")
    rows = [bench_row("stranger", "00" * 32, 200.0)]
    data = gathered(folder, benches=(read_bench(written(tmp_path / "b.json", bench(*rows))),))
    text = checked(page(data)).text
    assert "same name, other certificate" in text and "Speed not measured" in text
    assert "By their certificates no row is of the folders in this report." in text
    own = gathered(folder, benches=(read_bench(written(tmp_path / "b.json", bench(bench_row("own", folder.seal)))),))
    assert "this report: openvino" in checked(page(own)).text


def test_without_files_no_number_is_made_up(tmp_path: Path) -> None:
    text = checked(page(gathered(looked(tmp_path / "a", body(numerics={"run": False}))))).text
    for section in (
        "Not compared.",
        "Nothing was measured.",
        "No search was given.",
        "No certificate has measured logits",
    ):
        assert section in text
    assert "python benchmarks/fidelity.py" in text and "sparseport bench FOLDER --output bench.json" in text
    assert "tokens/s" not in text.replace("tokens/s KL, default settings", "")
    assert text.count("not measured") >= 4


def test_a_folder_that_does_not_verify_is_red(tmp_path: Path) -> None:
    """Red, with what differs, and without the claim that nothing changed."""
    lines = tuple(f"model.bin: weight {number} changed" for number in range(12))
    text = page(gathered(looked(tmp_path / "a", differences=lines)))
    seen = checked(text).text
    assert 'class="verdict bad"' in text and 'class="verdict good"' not in text
    assert "12 differences from the certificate in a." in seen and "and 2 more" in seen
    assert "weight 9 changed" in seen and "weight 10 changed" not in seen
    assert "By its certificate this is" in seen and "codes differ from the merge" not in seen
    assert "this is for a copy that verifies" in seen


def test_what_a_sub_network_leaves_out_is_on_its_map(tmp_path: Path) -> None:
    cut, config = sub_network()
    text = page(gathered(looked(tmp_path / "a", cut, config)))
    seen = checked(text).text
    assert "2 of 3 decoder blocks are left, and 1 of 4 layers are narrower" in seen
    upright = re.search(r'<svg class="map upright".*?</svg>', text, re.S)
    assert upright is not None
    assert upright[0].count("block removed") == 2 and upright[0].count('class="cut"') == 2
    assert "32×32 of 32×64" in upright[0] and ">2</text>" in upright[0], "block 1 is called 2, as in the whole model"
    # Half of the columns are left, so the field is half as wide as the place.
    widths = [float(w) for w in re.findall(r'<rect class="s\d+"[^>]*width="([\d.]+)"', upright[0])]
    assert min(widths) == pytest.approx(max(widths) / 2, abs=0.1)


def test_shades_follow_sparsity(tmp_path: Path) -> None:
    linears = {f"model.layers.0.mlp.p{n}": layer((10, 10), pruned=10 * n) for n in range(11)}
    linears["model.layers.0.mlp.none"] = {k: v for k, v in layer((10, 10)).items() if k not in ("pruned", "revived")}
    text = page(gathered(looked(tmp_path / "a", body(linears=linears))))
    upright = re.search(r'<svg class="map upright".*?</svg>', text, re.S)
    assert upright is not None
    shades = re.findall(r"<title>model.layers.0.mlp.(\w+):[^<]*</title><rect class=\"s(\w+)\"", upright[0])
    assert dict(shades) == {f"p{n}": str(n) for n in range(11)} | {"none": "n"}


def test_revived_weights_are_told(tmp_path: Path) -> None:
    linears = {"model.layers.0.mlp.up_proj": layer((8, 8), revived=3, rule="fq_lora")}
    text = checked(page(gathered(looked(tmp_path / "a", body(linears=linears))))).text
    assert "3 of them are not zero any more" in text and "exactly zero" not in text


def test_hundreds_of_blocks_and_experts_stay_readable(tmp_path: Path) -> None:
    """Experts of a block share a field; many blocks stand in several rows; names that are long are cut."""
    linears = {
        f"model.layers.{block}.mlp.experts.{expert}.{'w1' if block else 'a_very_long_name_of_a_projection'}": layer(
            (4, 4)
        )
        for block in range(70)
        for expert in range(2)
    }
    text = page(gathered(looked(tmp_path / "a", body(linears=linears))))
    checked(text)
    lying = re.search(r'<svg class="map lying" viewBox="0 0 1040 ([\d.]+)".*?</svg>', text, re.S)
    assert lying is not None and lying[0].count("<g>") == 70
    assert "2 layers mlp.experts.*.w1 of block 3" in lying[0]


def test_a_sweep_names_its_choice(tmp_path: Path) -> None:
    rows = [bench_row("slow"), bench_row("quick", decode=120.0)]
    found = read_bench(written(tmp_path / "b.json", bench(*rows, kind="sparseport-sweep", chosen="quick")))
    text = page(gathered(looked(tmp_path / "a"), benches=(found,)))
    assert text.count("chosen by the sweep") == 1
    assert text.index("chosen by the sweep") > text.index(">quick<")


def test_folders_of_other_architectures(tmp_path: Path) -> None:
    """Paths inside a block of other families, and a config that says little."""
    names = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    linears = {f"gpt_neox.layers.0.{name}": layer((8, 8)) for name in names}
    text = page(gathered(looked(tmp_path / "a", body(linears=linears), {"vocab_size": 8})))
    assert checked(text).text.count("gpt_neox.layers.0.mlp.dense_h_to_4h") >= 2
    assert CONFIG["model_type"] not in checked(text).text.split("Where it comes from")[0]
