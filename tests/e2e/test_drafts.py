"""A main network and its draft from one super-network: exported together, proven as a pair, same tokens as alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e.cut_models import MIXED, make_model, space
from e2e.in_process import in_process
from sparseport import further
from sparseport.chat.folder import open_folder
from sparseport.cli import main
from sparseport.errors import BadInput, Unsupported, UsageError, VerificationError
from sparseport.inspection import inspect
from sparseport.integrations.push import plan_push
from sparseport.nls.drafting import agreements_of
from sparseport.nls.speculation import Rounds, replay
from sparseport.pipeline import ExportResult, export, plan
from sparseport.progress import Progress
from sparseport.recipe import Recipe, make_recipe
from sparseport.report.gather import look, places_of
from sparseport.verify.certificate import Certificate, exported_folders
from sparseport.verify.folder import verify
from sparseport.verify.pairs import differences_between
from sparseport.verify.runs import OPENVINO_FULL_PRECISION
from sparseport.verify.sessions import OpenVinoSession

pytest.importorskip("openvino_genai")
pytest.importorskip("onnxruntime_genai")

FOLDERS = ["openvino", "onnx", "openvino-draft", "onnx-draft"]
TOKENS = 24
PROMPTS = [list(range(1, 9)), [7, 7, 3], list(range(200, 160, -1))]


@pytest.fixture(scope="module")
def super_network(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks with a tokenizer, and beside it a search space and sizes."""
    folder = tmp_path_factory.mktemp("super")
    make_model(folder / "base", "LlamaConfig", "LlamaForCausalLM", {})
    for file in tiny_base.glob("tokenizer*"):
        shutil.copy(file, folder / "base" / file.name)
    space(folder, MIXED)
    return folder


def _recipe(super_network: Path, output: Path, **fields: Any) -> Recipe:
    space_file = next(file for file in super_network.glob("*.json") if file.name != "sizes.json")
    inputs = {"base": super_network / "base", "search_space": space_file, "output": output}
    return make_recipe({**inputs, "draft": str(super_network / "sizes.json"), **fields})


@pytest.fixture(scope="module")
def pair(super_network: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    output = tmp_path_factory.mktemp("pair") / "out"
    with in_process():
        return export(_recipe(super_network, output, target=["openvino", "onnx"]))


@pytest.fixture
def copy(pair: ExportResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair.folder, tmp_path / "copy"))


def _graph(certificate: Certificate) -> list[dict[str, Any]]:
    return [certificate.files[name] for name in ("openvino_model.xml", "openvino_model.bin", "config.json")]


def _differences(folder: Path) -> list[str]:
    verdicts = [verify(one) for one in exported_folders(folder)]
    return [text for one in verdicts for text in one.differences] + differences_between(verdicts)


# --- what is written ------------------------------------------------------------------------------------------------


def test_both_networks_are_written_and_proven(pair: ExportResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert [one.name for one in pair.exports] == [one.folder.name for one in pair.exports] == FOLDERS
    assert sorted(path.name for path in pair.folder.iterdir()) == sorted(FOLDERS)
    assert main(["verify", str(pair.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and sorted(found["folders"]) == sorted(FOLDERS)
    blocks = {
        one.name: json.loads((one.folder / "config.json").read_text())["num_hidden_layers"] for one in pair.exports
    }
    assert blocks == {"openvino": 4, "onnx": 4, "openvino-draft": 3, "onnx-draft": 3}
    assert all(one.certificate.body["numerics"]["run"] for one in pair.exports)
    assert any(note.startswith("draft: ") and "of the main network's" in note for note in pair.notes)


def test_each_network_is_the_one_that_is_exported_alone(
    pair: ExportResult, super_network: Path, tmp_path: Path
) -> None:
    """The main network's folder does not know of the draft; the draft's says only whose it is."""
    alone = {"draft": None, "numerics": False, "tokenizer": False}
    with in_process():
        whole = export(_recipe(super_network, tmp_path / "main", **alone))
        small = export(
            _recipe(super_network, tmp_path / "small", **alone, sub_adapter=str(super_network / "sizes.json"))
        )
    ours = {one.name: one.certificate for one in pair.exports}
    assert (
        _graph(whole.certificate) == _graph(ours["openvino"]) and whole.certificate.proof() != small.certificate.proof()
    )
    assert ours["openvino"].draft is None and ours["openvino"].body["recipe"] == {
        **whole.certificate.body["recipe"],
        "numerics": True,
        "tokenizer": True,
    }
    draft = ours["openvino-draft"]
    assert _graph(small.certificate) == _graph(draft) and small.certificate.linears == draft.linears
    assert draft.draft == {"super_network_sha256": ours["openvino"].super_network_sha256()}
    assert draft.body["recipe"]["sub_adapter"] == "custom" and "sub_adapter" in draft.body["inputs"]


def test_the_draft_alone_can_be_int4(super_network: Path, tmp_path: Path) -> None:
    with in_process():
        made = export(
            _recipe(
                super_network,
                tmp_path / "out",
                draft="maximal",
                draft_compress={"mode": "int4_sym", "group_size": 32},
                numerics=False,
                tokenizer=False,
            )
        )
    whole, draft = (one.certificate for one in made.exports)
    assert {facts["stored"] for facts in whole.linears.values()} == {"f16"}
    compressed = [facts for facts in draft.linears.values() if "compressed_sha256" in facts]
    assert len(compressed) == len(draft.linears) == len(whole.linears)
    assert _differences(made.folder) == []
    assert not any("nothing gets faster" in note for note in made.notes)


def test_the_plan_has_both_and_a_draft_of_full_size_is_named(super_network: Path, tmp_path: Path) -> None:
    recipe = _recipe(super_network, tmp_path / "out", draft="maximal")
    with in_process():
        found = plan(recipe)
    assert found.draft is not None and len(found.as_dict()["draft"]["layers"]) == len(found.layers)
    assert any("nothing gets faster" in note for note in found.draft.notes)
    assert not (tmp_path / "out").exists()


def test_a_card_says_that_it_is_a_draft(pair: ExportResult) -> None:
    cards = {one.name: (one.folder / "README.md").read_text(encoding="utf-8") for one in pair.exports}
    assert [name for name, text in cards.items() if "draft for speculative decoding" in text] == FOLDERS[2:]


def test_other_verbs_know_pairs(copy: Path) -> None:
    """Fails if a pair is held for one export of two targets, or a draft is talked to."""
    assert open_folder(copy).path == copy / "openvino" and open_folder(copy, "onnx").path == copy / "onnx"
    assert open_folder(copy / "openvino-draft").path == copy / "openvino-draft"
    assert sorted(plan_push(copy).seals) == sorted(FOLDERS)
    folders, between = look(places_of([copy]), Progress("quiet"))
    assert len(folders) == 4 and not any(folder.differences for folder in folders) and between == []
    for name in ("openvino", "onnx"):
        shutil.rmtree(copy / name)
        if name == "openvino":
            assert open_folder(copy).path == copy / "onnx"
    assert open_folder(copy).path == copy / "openvino-draft"
    with pytest.raises(VerificationError, match="no certified main network"):
        plan_push(copy)


def test_inspect_names_the_draft(pair: ExportResult) -> None:
    whole = inspect(pair.folder)
    assert whole.facts["target"] == "onnx, openvino" and whole.facts["draft"] != whole.facts["linear layers"]
    assert "draft" in inspect(pair.folder / "onnx-draft").facts["role"]
    assert "role" not in inspect(pair.folder / "onnx").facts


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft": None, "draft_compress": {"mode": "int4_sym"}}, "give --draft"),
        ({"target": ["onnx"], "draft_compress": {"mode": "int4_sym"}}, "compression is OpenVINO's"),
        ({"adapter": "adapter", "branches": "adapter"}, "not its draft"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    fields: dict[str, Any], message: str, super_network: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        _recipe(super_network, tmp_path / "out", **fields)


def test_a_draft_that_cannot_be_chosen_is_refused_before_any_work(super_network: Path, tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps([100, *MIXED[1:]]), encoding="utf-8")
    with pytest.raises(BadInput, match=r"one of \[128, 96, 64\]"):
        export(_recipe(super_network, tmp_path / "out", draft=str(tmp_path / "sizes.json")))
    with pytest.raises(UsageError, match="has no draft"):
        _recipe(super_network, tmp_path / "out", draft=None).of_draft()
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.json"]


def test_an_adapter_is_not_added_to_a_pair(copy: Path, tiny_adapter_dense: Path) -> None:
    with pytest.raises(Unsupported, match="not its draft"):
        further.add_adapter(copy, tiny_adapter_dense, "second")


@pytest.mark.parametrize("file", ["openvino-draft/openvino_model.bin", "onnx-draft/model.onnx.data"])
def test_a_changed_draft_is_found(file: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(copy), "--json"]) != 0
    found = json.loads(capsys.readouterr().out)
    name = file.partition("/")[0]
    assert [one for one, verdict in found["folders"].items() if not verdict["ok"]] == [name]


def test_a_draft_of_another_super_network_is_refused(copy: Path, super_network: Path, tmp_path: Path) -> None:
    """Same architecture, same sizes, same tokenizer, its own valid certificate: only the base is another one."""
    other = tmp_path / "other"
    shutil.copytree(super_network, other)
    weights = other / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # the lowest bits of one weight
    weights.write_bytes(content)
    with in_process():
        made = export(_recipe(other, tmp_path / "made", numerics=False, tokenizer=False))
    assert _differences(made.folder) == [] == _differences(copy)
    shutil.rmtree(copy / "openvino-draft")
    shutil.copytree(made.folder / "openvino-draft", copy / "openvino-draft")
    found = _differences(copy)
    assert [text for text in found if text.startswith("openvino-draft: it comes from another super-network")]
    assert any("(base differ)" in text for text in found)


def test_a_draft_in_the_place_of_a_main_network_is_found(copy: Path) -> None:
    (copy / "openvino").rename(copy / "aside")
    (copy / "openvino-draft").rename(copy / "openvino")
    (copy / "aside").rename(copy / "openvino-draft")
    found = differences_between([verify(one) for one in exported_folders(copy)])
    assert "openvino: the certificate is that of a draft" in found
    assert "openvino-draft: the certificate is that of a main network" in found
    shutil.rmtree(copy / "openvino")
    shutil.rmtree(copy / "onnx")
    found = differences_between([verify(one) for one in exported_folders(copy)])
    assert "onnx-draft: there is no certified main network beside it" in found
    assert _differences(copy / "onnx-draft") == [], "alone it is an exported folder like any other"


# --- the same tokens ------------------------------------------------------------------------------------------------


def _openvino(folder: Path, drafts: Path | None, assistant: int) -> tuple[list[list[int]], list[Rounds]]:
    """Tokens of each prompt, and what GenAI counts of each: it leaves the last round out of proposed and accepted."""
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    more = {} if drafts is None else {"draft_model": genai.draft_model(str(drafts), "CPU", **OPENVINO_FULL_PRECISION)}
    pipeline = genai.LLMPipeline(str(folder), "CPU", scheduler_config=scheduler, **more, **OPENVINO_FULL_PRECISION)
    config = genai.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
    if drafts is not None:
        config.num_assistant_tokens = assistant
    tokens, counts = [], []
    for prompt in PROMPTS:
        ids = np.array([prompt], np.int64)
        answer = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
        tokens.append(list(answer.tokens[0]))
        if drafts is not None:
            found = answer.extended_perf_metrics
            steps = len(found.main_model_metrics.raw_metrics.m_durations) - 1  # without that which reads the prompt
            own = found.get_num_draft_tokens(), found.get_num_accepted_tokens()
            counts.append(Rounds(steps, len(tokens[-1]) - 1, *own))
    return tokens, counts


def _replayed(draft: Path, answers: list[list[int]], k: int) -> list[Rounds]:
    """What to expect of each prompt, from what the draft says in each place of the answers."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(draft / "openvino_model.xml"), "CPU", OPENVINO_FULL_PRECISION)
    rows = agreements_of(OpenVinoSession(compiled), PROMPTS, answers)
    return [replay([row], k) for row in rows]


def test_openvino_writes_the_same_tokens_with_and_without_a_draft(pair: ExportResult) -> None:
    folder = pair.folder
    alone, _ = _openvino(folder / "openvino", None, 0)
    assert [len(tokens) for tokens in alone] == [TOKENS] * len(PROMPTS)
    assert not any(0 in tokens for tokens in alone), "a draft stops at an end token, which is another story"
    for draft in ("openvino-draft", "openvino"):
        tokens, counts = _openvino(folder / "openvino", folder / draft, 3)
        assert tokens == alone
        for found, whole in zip(counts, _replayed(folder / draft, alone, 3), strict=True):
            assert (found.rounds, found.tokens) == (whole.rounds, whole.tokens)
            assert whole.proposed - 3 <= found.proposed <= whole.proposed
            assert whole.accepted - 3 <= found.accepted <= whole.accepted
            # A network that drafts for itself is always right, another one is not.
            assert (found.proposed == found.accepted > 0) == (draft == "openvino")
    wrong, _ = _openvino(folder / "openvino-draft", None, 0)
    assert wrong != alone, "the draft is another network"


def test_onnx_runtime_writes_the_same_tokens_with_and_without_a_draft(pair: ExportResult) -> None:
    import onnxruntime_genai as genai

    folder = pair.folder / "onnx"

    def run(draft: str | None) -> tuple[list[list[int]], int]:
        config = genai.Config(str(folder))
        if draft is not None:
            decoder = json.loads((folder.with_name(draft) / "genai_config.json").read_text())["model"]["decoder"]
            decoder["filename"] = f"../{draft}/{decoder['filename']}"
            config.overlay(json.dumps({"model": {"draft": decoder}}))
        model = genai.Model(config)
        tokens, accepted = [], 0
        for prompt in PROMPTS:
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=len(prompt) + TOKENS, do_sample=False)
            if draft is not None:
                parameters.set_speculative_options(max_draft_tokens=3)
            generator = genai.Generator(model, parameters)
            generator.append_tokens(prompt)
            while not generator.is_done():
                generator.generate_next_token()
            tokens.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
            if draft is not None:
                stats = generator.get_speculative_stats()
                assert stats["draft_tokens_proposed"] > 0
                accepted += stats["draft_tokens_accepted"]
        return tokens, accepted

    alone, _ = run(None)
    assert run("onnx-draft")[0] == alone
    tokens, accepted = run("onnx")
    assert tokens == alone and accepted > 0


def test_certificates_of_pairs_are_read_as_such(copy: Path) -> None:
    """A draft that does not say whose it is, though sealed, is no certificate."""
    body = Certificate.read(copy / "openvino-draft").body
    for wrong in ({}, None, {"super_network_sha256": 1}):
        Certificate({**body, "draft": wrong}).write(copy / "openvino-draft")
        with pytest.raises(Exception, match="of another type"):
            Certificate.read(copy / "openvino-draft")
    Certificate({**body, "draft": {"super_network_sha256": "0" * 64}}).write(copy / "openvino-draft")
    assert any("another super-network than its own inputs" in text for text in _differences(copy))
