"""Reports of real exports: they verify, they name what was changed, and the cards they write are certified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.in_process import in_process
from report.fakes import bench, bench_row, body, fake_folder, naive, written, written_search
from report.html_checks import checked
from sparseport.cli import main
from sparseport.errors import BadInput, OutputExists, SparseportError, UsageError
from sparseport.further import add_adapter
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.report import make
from sparseport.report.bench_file import EVIDENCE, read_bench
from sparseport.report.gather import SEALS_BEFORE, Place, looked_at, places_of
from sparseport.report.make import report as write_report
from sparseport.verify.certificate import Certificate, file_facts
from sparseport.verify.folder import verify

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime_genai")
pytest.importorskip("optimum.intel")

README = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n"


@pytest.fixture(scope="module")
def exported(tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QA-SparsePEFT model for both targets; its base says what license it has."""
    root = tmp_path_factory.mktemp("report")
    base = Path(shutil.copytree(tiny_int4, root / "base"))
    (base / "README.md").write_text(README, encoding="utf-8")
    fields = {"base": base, "sparse_base": tiny_sparse, "adapter": tiny_adapter, "tokenizer": False, "numerics": False}
    with in_process():
        recipe = make_recipe({**fields, "output": root / "out", "target": ["openvino", "onnx"]})
        return export(recipe).folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the export, called `out` from where the test stands."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(exported, tmp_path / "out")).relative_to(tmp_path)


def state(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the card of an export -------------------------------------------------------------------------------------------


def test_an_export_writes_its_card(exported: Path) -> None:
    """Certified like any other file, with the license of the base's README.md, which is an input then."""
    for target in ("openvino", "onnx"):
        certificate = Certificate.read(exported / target)
        text = (exported / target / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["license"] == "apache-2.0" and front["library_name"] == target and front["language"] == ["en"]
        assert "README.md" in certificate.files and "README.md" in certificate.body["inputs"]["base"]
        assert certificate.body["origin"] == {"languages": ["en"], "licenses": {"base": ["apache-2.0"]}}
        totals = certificate.totals
        assert f"{totals['pruned']:,} of {totals['masked_weights']:,} weights are pruned (50.0%)" in text
        assert str(exported.parent) not in text and verify(exported / target).differences == []


def test_the_same_inputs_give_the_same_card_and_none_on_demand(tiny_base: Path, tmp_path: Path) -> None:
    """Whatever the folders are called; without a card the folder has no README.md, and no license is made up."""
    with in_process():
        for name in ("one", "two"):
            fields = {"base": tiny_base, "output": tmp_path / name, "tokenizer": False, "numerics": False}
            export(make_recipe({**fields, "target": ["onnx"]}))
        export(make_recipe({**fields, "target": ["onnx"], "output": tmp_path / "none", "card": False}))
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one == two and b"license: unknown" in one["README.md"]
    assert set(one) - set(state(tmp_path / "none")) == {"README.md"}
    assert Certificate.read(tmp_path / "none").body["recipe"]["card"] is False


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_of_both_targets(copy: Path, tmp_path: Path, capsys: Any) -> None:
    """The verb with every file; the page has the folders as they were given, and nothing of where they lie."""
    seal = Certificate.read(copy / "onnx").seal()
    files = [
        *("--bench", str(written(tmp_path / "b.json", bench(bench_row("ours", seal, model="onnx"))))),
        *("--naive", str(written(tmp_path / "n.json", naive()))),
        *("--search", str(written_search(tmp_path / "search.json"))),
    ]
    before = state(tmp_path / copy)
    assert main(["report", str(copy), *files, "--output", "page.html", "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and set(result["folders"]) == {"out/openvino", "out/onnx"} and result["cards"] == []
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    seen = checked(text).text
    assert "Verified. This is the model that was exported, bit for bit." in seen
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text and seal in text
    assert "openvino_genai.LLMPipeline" not in seen and 'from_pretrained("out/openvino")' in seen, "it has no tokenizer"
    assert state(tmp_path / copy) == before
    assert main(["report", str(copy), *files, "--output", "page.html", "--quiet"]) == 0, "a page may be made anew"
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text


def test_a_report_of_a_changed_folder_is_5(copy: Path, tmp_path: Path, capsys: Any) -> None:
    """A flipped bit, a stranger beside the folders and a lost certificate are on the page, and in the exit status."""
    data = bytearray((copy / "onnx" / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "onnx" / "model.onnx.data").write_bytes(data)
    assert main(["report", str(copy), "--output", "page.html", "--quiet", "--json", "--card"]) == 5
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert not result["ok"] and result["folders"]["out/openvino"]["ok"] and result["cards"] == []
    assert result["error"]["exit_code"] == 5 and "error[E_VERIFY]" in captured.err
    seen = checked((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "Not verified" in seen and "model.onnx.data: content changed" in seen and "model.onnx.data: weight" in seen
    assert "without" not in (copy / "openvino" / "README.md").read_text().partition("## Logits")[2], "no card was made"
    (copy / "onnx" / "sparseport.json").write_text("{}")
    (copy / "notes.txt").write_text("mine")
    assert main(["report", str(copy), "--output", "page.html", "--quiet"]) == 5
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    seen = checked(text).text
    assert "the certificate was changed after it was written" in seen and str(tmp_path) not in text
    assert "notes.txt: beside the exported folders" in seen
    assert main(["report", str(copy / "openvino"), "--output", "page.html", "--quiet"]) == 0, "the other one is whole"


def test_a_folder_that_is_no_export_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    result = write_report([Path("model")], "page.html")
    assert not result.ok and "the folder has no certificate" in checked((tmp_path / "page.html").read_text()).text


def test_a_certificate_sealed_anew_with_wrong_sums_does_not_pass(copy: Path, tmp_path: Path) -> None:
    """Verification compares weights; a total that is not theirs is found when it is to be shown."""
    place = copy / "openvino"
    body = Certificate.read(place).body
    body["totals"]["pruned"] += 1
    Certificate(body).write(place)
    assert verify(place).ok
    result = write_report([place], tmp_path / "page.html")
    assert not result.ok and "totals are not those of its layers" in result.folders[0].differences[0]


# --- cards with measured figures -------------------------------------------------------------------------------------


def test_a_card_is_written_anew_and_certified(copy: Path, tmp_path: Path) -> None:
    """Only README.md and the certificate change; measurements that name the old seal still belong to the folder."""
    seal = Certificate.read(copy / "openvino").seal()
    file = written(tmp_path / "b.json", bench(bench_row("ours", seal, 87.5), bench_row("other", "00" * 32, 999.0)))
    before = state(tmp_path / copy)
    for _ in range(2):
        result = write_report([copy], tmp_path / "page.html", bench=[file], card=True)
        assert result.ok and result.cards == ("out/openvino", "out/onnx")
        after = state(tmp_path / copy)
        assert {name for name in after if after[name] != before.get(name)} == {
            *("openvino/README.md", "openvino/sparseport.json", "onnx/README.md", "onnx/sparseport.json")
        } - ({"onnx/README.md"} if after["onnx/README.md"] == before["onnx/README.md"] else set())
        certificate = Certificate.read(copy / "openvino")
        assert verify(copy / "openvino").differences == [] and seal in certificate.body[SEALS_BEFORE]
        text = after["openvino/README.md"].decode()
        assert "87.5 \\[83.1 to 91.9\\]" in text and "999" not in text and text.startswith("---\nlicense: apache-2.0\n")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert certificate.seal() in page and "this report: out/openvino" in checked(page).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "out", "page.html"]


def test_the_evidence_of_a_sweep_is_shown_by_itself(tmp_path: Path) -> None:
    """A folder that got its settings from a sweep has other seals than what was measured; its own evidence counts."""
    rows = [bench_row("own", "77" * 32, 80.0, settings={}), bench_row("swept", "77" * 32, 96.0, settings={"A": "1"})]
    whole = bench(*rows, kind="sparseport-sweep")
    place = tmp_path / "out"
    place.mkdir()
    file = written(place / EVIDENCE, {**whole, "sweep": {"settings": {"A": "1"}}})
    data = body()
    data["files"][EVIDENCE] = file_facts(file)
    fake_folder(place, data)
    found = looked_at(Place(place, "out"), (4, 6, 1))
    assert found.ok and found.evidence is not None and found.evidence.chosen == 1 and "77" * 32 in found.seals
    given = read_bench(written(tmp_path / "sweep.json", {**whole, "chosen": "swept"}))
    assert make._within(found.evidence, given) and not make._within(given, replace(given, rows=given.rows[:1]))
    file.write_text("{}")
    assert looked_at(Place(place, "out"), (4, 6, 1)).differences == (f"{EVIDENCE}: this is no bench file",)


def test_a_card_does_not_reach_through_links(copy: Path, tmp_path: Path) -> None:
    """The stage is made of links to the folder's files: a hard link to one of them elsewhere keeps its content."""
    kept = tmp_path / "kept.md"
    kept.hardlink_to(copy / "onnx" / "README.md")
    text = kept.read_bytes()
    seal = Certificate.read(copy / "onnx").seal()
    file = written(tmp_path / "b.json", bench(bench_row("ours", seal)))
    write_report([copy / "onnx"], tmp_path / "page.html", bench=[file], card=True)
    assert (copy / "onnx" / "README.md").read_bytes() != text and kept.read_bytes() == text


def test_a_further_adapter_enters_the_card(tiny_sparse: Path, tmp_path: Path) -> None:
    """The card says which adapters a folder has, so it is written again with the certificate."""
    from branch_models import dense_adapter

    dense_adapter(tiny_sparse, tmp_path / "first", ("q_proj", "v_proj"))
    dense_adapter(tiny_sparse, tmp_path / "second", ("q_proj",), seed=9)
    fields = {"base": tiny_sparse, "adapter": tmp_path / "first", "branches": "adapter", "tokenizer": False}
    with in_process():
        export(make_recipe({**fields, "output": tmp_path / "out", "numerics": False}))
        add_adapter(tmp_path / "out", tmp_path / "second", "second", numerics=False)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "second.safetensors holds branches for 2 layers" in text.replace("\\", "")
    assert verify(tmp_path / "out").differences == []


# --- what is refused before any work ---------------------------------------------------------------------------------


def test_bad_input_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is verified, and nothing is written."""

    def never(*_: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(make, "look", never)
    folder = tmp_path / "out"
    fake_folder(folder)
    (tmp_path / "mine.html").write_text("my own page")
    page = tmp_path / "page.html"
    cases: list[tuple[type[SparseportError], Callable[[], Any]]] = [
        (BadInput, lambda: write_report([], page)),
        (BadInput, lambda: write_report([tmp_path / "none"], page)),
        (BadInput, lambda: write_report([folder, tmp_path / "x" / ".." / "out"], page)),
        (BadInput, lambda: write_report([folder], page, bench=[tmp_path / "none.json"])),
        (BadInput, lambda: write_report([folder], page, search=folder / "config.json")),
        (BadInput, lambda: write_report([folder], page, naive=folder / "config.json")),
        (OutputExists, lambda: write_report([folder], tmp_path / "mine.html")),
        (OutputExists, lambda: write_report([folder], folder.parent)),
        (UsageError, lambda: write_report([folder], folder / "page.html")),
    ]
    (tmp_path / "x").mkdir()
    for number, (kind, call) in enumerate(cases):
        with pytest.raises(kind):
            call()
            raise AssertionError(f"case {number} passed")
    assert not page.exists() and (tmp_path / "mine.html").read_text() == "my own page"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    fake_folder(tmp_path / "out")
    with pytest.raises(SparseportError, match="cannot write the report") as caught:
        write_report([tmp_path / "out"], tmp_path / "none" / "page.html")
    assert caught.value.exit_code == 8


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a/out"], ["a/out/openvino", "a/out/onnx"]),
        (["a/out/onnx"], ["a/out/onnx"]),
        (["{}/a/out/onnx"], ["out/onnx"]),
        (["{}/a/plain"], ["plain"]),
        (["{}/a/plain", "{}/b/plain"], ["a/plain", "b/plain"]),
        (["b/../a/plain", "a/out/onnx"], ["plain", "a/out/onnx"]),
        (["a/plain", "{}/b/plain"], ["a/plain", "plain"]),
    ],
)
def test_folders_are_called_as_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], names: list[str]
) -> None:
    """Relative paths as they are; of absolute ones, and of those that climb, only so much of the end as is needed."""
    monkeypatch.chdir(tmp_path)
    for place in ("a/out/openvino", "a/out/onnx", "a/plain", "b/plain"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "sparseport.json").write_text("{}")
    found = places_of([Path(one.format(tmp_path)) for one in given])
    assert [place.name for one in found for place in one.places] == names


def test_the_folder_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sparseport.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    assert [place.name for one in places_of([Path()]) for place in one.places] == ["here"]
