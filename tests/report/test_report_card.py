"""The model card: metadata that YAML reads, text that cannot become markup, nothing of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from report.fakes import CONFIG, bench, bench_row, body, layer, looked, sub_network, written
from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.errors import VerificationError, printable
from sparseport.model_card.facts import model_facts
from sparseport.model_card.loading import snippets
from sparseport.model_card.markdown import block, code, plain, table
from sparseport.model_card.origin import origin_of
from sparseport.model_card.text import model_card
from sparseport.report.bench_file import read_bench
from sparseport.report.card import measured_of
from sparseport.verify.certificate import Certificate


def card(data: dict[str, Any], config: dict[str, Any] | None = None, **more: Any) -> tuple[dict[str, Any], str]:
    """Metadata and text of a certificate's card."""
    text = model_card(model_facts(Certificate(data), config or CONFIG), **more)
    assert text.startswith("---\n")
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def test_metadata_of_an_int4_model() -> None:
    origin = {"licenses": {"base": ["apache-2.0"]}, "languages": ["en"], "base_model": {"name": "a/b", "source": "x"}}
    front, rest = card(body(origin=origin))
    assert front == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "openvino",
        "pipeline_tag": "text-generation",
        "base_model": "a/b",
        "base_model_relation": "quantized",
        "tags": ["sparseport", "openvino", "int4", "sparse", "qa-sparsepeft", "llama"],
    }
    assert "\n# b: INT4, 25.0% sparse, 2 blocks, for OpenVINO\n" in rest
    assert "1,792 of 7,168 weights are pruned" in rest
    assert "| `self_attn.q_proj` | 2 | `u4 g32` | 2,048 | 25.0% | `qa_sparse_peft` | 6 |" in rest


@pytest.mark.parametrize(
    ("licenses", "license_", "said"),
    [
        (None, "unknown", "License: unknown."),
        ({"base": ["mit"], "sparse_base": ["mit"]}, "mit", "base: `mit`; sparse base: `mit`"),
        ({"adapter": ["gemma"], "base": ["mit"]}, "other", "adapter: `gemma`; base: `mit`"),
    ],
)
def test_licenses_are_those_of_the_inputs(licenses: Any, license_: str, said: str) -> None:
    front, rest = card(body(origin={} if licenses is None else {"licenses": licenses}))
    assert front["license"] == license_ and said in rest
    assert ("license_name" in front) == (license_ == "other")


def test_other_forms_have_other_tags() -> None:
    plain_layer = {"rule": "lora", "stored": "f16", "weight_sha256": "ab", "readback": {"onnx": "ab"}, "shape": [8, 8]}
    front, rest = card(body("onnx", linears={"model.layers.0.mlp.up_proj": plain_layer}), {"vocab_size": 8})
    assert (
        front["library_name"] == "onnx"
        and front["tags"] == ["sparseport", "onnx", "lora"]
        and "base_model" not in front
    )
    assert "onnxruntime_genai" in rest and "No layer has a mask" in rest and "# unknown model: 16 bit" in rest
    cut, config = sub_network()
    front, rest = card(cut, config)
    assert "sub-network" in front["tags"] and "2 of 3 decoder blocks are left" in rest


def test_measured_figures_come_only_where_they_are_asked_for(tmp_path: Path) -> None:
    """What differs from machine to machine is no part of a card that the certificate's proof covers."""
    folder = looked(tmp_path / "a")
    data = bench(bench_row("ours", folder.seal), bench_row("other", "00" * 32, 999.0))
    measured = measured_of(folder, [read_bench(written(tmp_path / "b.json", data))])
    _, without = card(body())
    assert "nats" not in without and "Speed" not in without
    _, rest = card(body(), measured=measured, logits=True)
    assert "Measured on Some Processor, 2 cores" in rest and "999" not in rest
    assert "| OpenVINO GenAI | CPU | KV\\_CACHE\\_PRECISION u8 | 87.5 \\[83.1 to 91.9\\] |" in rest
    assert "| default settings | 1.210e-02 | 1.090e-07 | 99.1% |" in rest


EVIL = "`<script>`|\n# *x* [a](javascript:b) \u202e---\n"


def test_hostile_text_stays_text() -> None:
    """No HTML, no link, no row and no heading that a file asked for; the metadata stays one YAML mapping."""
    data = body(
        linears={f"model.layers.0.{EVIL}": layer((8, 8), rule=EVIL, stored=f"u4 {EVIL}")},
        sparseport=EVIL,
        recipe={"sub_adapter": EVIL, "rounding": EVIL},
        inputs={EVIL: {EVIL: EVIL}},
        origin={"licenses": {EVIL: [EVIL]}, "languages": [EVIL], "base_model": {"name": f"a/{EVIL}", "source": EVIL}},
    )
    text = model_card(model_facts(Certificate(data), {**CONFIG, "architectures": [EVIL], "model_type": EVIL}))
    front, rest = text[4:].split("\n---\n", 1)
    found = yaml.safe_load(front)
    assert found["license"] == printable(EVIL) and found["base_model"] == f"a/{printable(EVIL)}"
    assert set(found) <= {
        *("license", "language", "library_name", "pipeline_tag", "base_model", "base_model_relation", "tags")
    }
    outside = "".join(part for number, part in enumerate(rest.split("`")) if number % 2 == 0)
    assert "<script" not in outside and "](javascript" not in outside
    lines = rest.splitlines()
    assert [line for line in lines if line.startswith("#") and "x" in line and "script" in line] == [lines[1]]
    assert not [line for line in lines if line.startswith(("---", "*x"))]
    assert "\u202e" not in text


def test_markdown_parts() -> None:
    assert plain("a_b<c>&|`\n") == "a\\_b&lt;c\\>&amp;\\|\\`\\\\n"
    assert code("a`b|c\n") == "`a'b\\|c\\n`" and code("") == "` `"
    assert table(["x"], []) == "" and table(["x", "y"], [["1", "2"]]) == "| x | y |\n|---|---|\n| 1 | 2 |"
    assert block("py", "a ``` b") == "````py\na ``` b\n````"


@pytest.mark.parametrize("target", ["openvino", "onnx"])
@pytest.mark.parametrize(("tokenizer", "chat"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("adapters", [[], ["adapter.safetensors"]])
@pytest.mark.parametrize("folder", ["out/x", 'it\'s "a" \\ folder', "a\nb", "{x}"])
def test_code_to_load_a_folder_is_python(
    target: str, tokenizer: bool, chat: bool, adapters: list[str], folder: str
) -> None:
    """It compiles, and the folder's name in it is the folder's name."""
    import ast

    found = snippets(target, folder, tokenizer, adapters, chat=chat)
    assert found
    for snippet in found:
        tree = ast.parse(snippet.code)
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert folder in texts, snippet.code
        assert len([line for line in snippet.code.splitlines() if line and "import" not in line]) <= 9


# --- origin ----------------------------------------------------------------------------------------------------------


def test_origin_of_folders(tmp_path: Path) -> None:
    for role, text in (("base", "license: mit\nlanguage: en\nbase_model: a/b"), ("adapter", "license: gemma")):
        (tmp_path / role).mkdir()
        (tmp_path / role / "README.md").write_text(f"---\n{text}\n---\n")
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "README.md").write_text("---\nlicense: [\n---\n")
    folders = {"base": tmp_path / "base", "sparse_base": tmp_path / "sparse", "adapter": tmp_path / "adapter"}
    found = origin_of(folders, "owner/tuned")
    assert found.facts == {
        "licenses": {"base": ["mit"], "adapter": ["gemma"]},
        "base_model": {"name": "owner/tuned", "source": "adapter_config.json"},
        "languages": ["en"],
    }
    assert set(found.files) == {"base", "adapter"} and list(found.files["base"]) == ["README.md"]
    assert found.notes == ["README.md of the sparse base is not used for the model card: its metadata is not YAML"]
    assert origin_of(folders, "/srv/somebody/base").facts["base_model"] == {"name": "a/b", "source": "README.md"}
    assert origin_of({}).facts == {} and origin_of({"base": tmp_path}).files == {}


def test_origin_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"general.license": "apache-2.0", "general.languages": ["en"]}
    monkeypatch.setattr(GgufFile, "open", classmethod(lambda cls, path: cls(path, fields, {})))
    assert origin_of({}, gguf=tmp_path / "m.gguf").facts == {"licenses": {"base": ["apache-2.0"]}, "languages": ["en"]}


# --- certificates that somebody sealed anew --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["totals"].update(pruned=7),
        lambda d: d["totals"].update(weights=1),
        lambda d: d["linears"]["model.layers.0.mlp.down_proj"].update(stored=4),
        lambda d: d["linears"]["model.layers.0.mlp.down_proj"].update(stored="?"),
        lambda d: d["linears"]["model.layers.0.mlp.down_proj"].update(whole_shape=[1, 1]),
        lambda d: d["linears"]["model.layers.0.mlp.down_proj"].update(pruned=-1),
        lambda d: d["linears"]["model.layers.0.mlp.down_proj"].update(rank="six"),
        lambda d: d["linears"]["model.layers.0.mlp.down_proj"].pop("rule"),
        lambda d: d["numerics"]["default"].update(kl="nan"),
        lambda d: d["numerics"]["default"].update(kl=["1"]),
        lambda d: d["numerics"]["default"].update(settings=[]),
        lambda d: d.update(numerics=[]),
        lambda d: d.update(recipe=[]),
        lambda d: d.update(origin="x"),
    ],
)
def test_facts_that_contradict_themselves_are_refused(change: Any) -> None:
    data = body()
    change(data)
    with pytest.raises(VerificationError):
        model_facts(Certificate(data), CONFIG)


def test_a_config_of_a_million_blocks_draws_no_million_rows() -> None:
    cut, config = sub_network()
    for whole in (10**9, 2):
        config["sparseport"]["whole"]["num_hidden_layers"] = whole
        with pytest.raises(VerificationError):
            model_facts(Certificate(cut), config)
    assert model_facts(Certificate(body()), {**CONFIG, "num_hidden_layers": 10**18}).blocks == 2
