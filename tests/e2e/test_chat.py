"""Talking to real folders in their runtimes: prompts, answers, conversations, adapters and what ends an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from branch_models import dense_adapter
from e2e.in_process import in_process
from sparseport.chat.conversation import Conversation, Sampling
from sparseport.chat.engines import load_engine
from sparseport.chat.folder import check_sizes, context_length, open_folder, require_tokenizer
from sparseport.cli import main
from sparseport.errors import BadInput, EnvironmentProblem, UsageError, VerificationError
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.certificate import Certificate

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("openvino_genai")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TARGETS = ("openvino", "onnx")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# How much less likely than torch's best a chosen token's logit may be: defaults of some processors round activations.
NEARLY = 0.05
# The token that conversations begin with, as a text; users do not type it.
FIRST = "|"


def yes(piece: str) -> bool:
    return True


@pytest.fixture(scope="module")
def base(tiny_sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template; it writes printable ASCII alone, so that texts tell tokens apart."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_sparse, tmp_path_factory.mktemp("talks") / "base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token, tokenizer.chat_template = FIRST, TEMPLATE
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = tokenizer("".join(chr(code) for code in range(32, 127) if chr(code) != FIRST))["input_ids"]
    others = [token for token in range(len(tensors["lm_head.weight"])) if token not in plain]
    tensors["lm_head.weight"][others] = 0  # logits of 0 are far from the largest of a hundred
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both targets, with an adapter that is loud enough to change answers."""
    out = tmp_path_factory.mktemp("talks")
    dense_adapter(base, out / "adapter", alpha=24.0)
    fields = {"base": base, "adapter": out / "adapter", "branches": "adapter", "numerics": False, "embedding": "fp32"}
    with in_process():
        return export(make_recipe({**fields, "output": out / "out", "target": list(TARGETS)})).folder


@pytest.fixture(scope="module")
def loaded(exported: Path) -> Iterator[dict[str, Any]]:
    """The base alone, in both runtimes."""
    yield {target: load_engine(open_folder(exported, target, "none")) for target in TARGETS}


@pytest.fixture(params=TARGETS)
def engine(request: pytest.FixtureRequest, loaded: dict[str, Any]) -> Any:
    found = loaded[request.param]
    found.reset()
    return found


@pytest.fixture(scope="module")
def original(base: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def network(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def test_prompts_are_those_of_transformers(engine: Any, original: Any) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Wie geht's? ünï"}]
    ids = engine.encode(engine.fill_template(messages), special_tokens=False)
    wanted = original.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert engine.has_template and ids == wanted and ids.count(original.bos_token_id) == 1
    assert engine.encode("a fox", special_tokens=True) == original("a fox")["input_ids"]


def test_a_first_token_comes_once(exported: Path, base: Path, loaded: dict[str, Any], tmp_path: Path) -> None:
    """A tokenizer that begins every text with a token of its own, as those of Llama and Gemma do: templates have it
    already, other texts get it."""
    from tokenizers import processors

    from sparseport.targets.openvino.tokenizer import convert_tokenizer_folder

    begins = Path(shutil.copytree(base, tmp_path / "base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(begins)
    first = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A", special_tokens=[(FIRST, first)]
    )
    tokenizer.save_pretrained(begins)
    assert tokenizer("x")["input_ids"][0] == first
    for target, engine in loaded.items():
        folder = Path(shutil.copytree(exported / target, tmp_path / target))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(begins / name, folder / name)
        if target == "openvino":
            convert_tokenizer_folder(begins, folder)
        other = type(engine)(folder, None)
        prompt = other.fill_template([{"role": "user", "content": "Hi"}])
        assert other.encode(prompt, special_tokens=False).count(first) == 1, target
        assert other.encode("Hi", special_tokens=True) == tokenizer("Hi")["input_ids"], target


def test_answers_are_torchs(engine: Any, network: Any, original: Any) -> None:
    """Each token that is written has to be torch's likeliest one there."""
    answer = Conversation(engine, Sampling(max_tokens=12)).ask("Hello", yes)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = original.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    written = original(answer.text)["input_ids"]
    assert (answer.prompt_tokens, answer.tokens, answer.finish) == (len(prompt), 12, "length") and len(written) == 12
    with torch.no_grad():
        logits = network(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    gaps = logits.max(dim=1).values - logits[range(12), written]
    assert float(gaps.max()) < NEARLY and float(logits.std()) > 5 * NEARLY


def test_a_conversation_is_answered_like_one_that_is_read_anew(engine: Any) -> None:
    """What the runtime keeps of earlier turns must not change an answer; pieces are the text, in order."""
    conversation = Conversation(engine, Sampling(max_tokens=10))
    pieces: list[str] = []
    answers = [conversation.ask(text, lambda piece: pieces.append(piece) is None) for text in ("One", "Two", "Three")]
    assert "".join(pieces) == "".join(answer.text for answer in answers)
    for turn, answer in enumerate(answers):
        engine.reset()
        again = Conversation(engine, Sampling(max_tokens=10))
        again.messages = conversation.messages[: 2 * turn]
        repeated = again.ask(("One", "Two", "Three")[turn], yes)
        assert (repeated.text, repeated.prompt_tokens) == (answer.text, answer.prompt_tokens)


def test_an_answer_can_be_stopped_and_the_next_one_is_whole(engine: Any) -> None:
    conversation = Conversation(engine, Sampling(max_tokens=30))
    whole = conversation.ask("Hello", yes).text
    conversation.reset()
    pieces: list[str] = []
    stopped = conversation.ask("Hello", lambda piece: pieces.append(piece) is not None or len(pieces) < 3)
    assert stopped.finish == "stopped" and whole.startswith(stopped.text) and len(stopped.text) < len(whole)
    conversation.reset()
    with pytest.raises(ZeroDivisionError):
        conversation.ask("Hello", lambda piece: bool(1 / 0))
    conversation.reset()
    assert conversation.ask("Hello", yes).text == whole


def test_seeds(engine: Any) -> None:
    def ask(seed: int, temperature: float | None = 3.0) -> str:
        conversation = Conversation(engine, Sampling(16, temperature, seed))
        return conversation.ask("Hello", yes).text

    assert ask(1) == ask(1) and len({ask(seed) for seed in range(4)}) > 1
    assert ask(1, None) == ask(2, None)


@pytest.mark.parametrize("target", TARGETS)
def test_an_end_token_ends_an_answer(exported: Path, loaded: dict[str, Any], target: str, tmp_path: Path) -> None:
    """It is counted and not shown. The folder is told that a token the model writes early is its end token."""
    engine = loaded[target]
    engine.reset()
    tokens = engine.encode("Hello there", special_tokens=True)
    text = engine.generate(tokens, Sampling(12), yes).text
    at = next(at for at in range(2, 12) if text[at] not in text[:at])
    (token,) = engine.encode(text[at], special_tokens=False)
    folder = Path(shutil.copytree(exported / target, tmp_path / target))
    name, inner = ("generation_config.json", None) if target == "openvino" else ("genai_config.json", "model")
    config = json.loads((folder / name).read_text())
    (config[inner] if inner else config)["eos_token_id"] = token
    (folder / name).write_text(json.dumps(config))
    other = type(engine)(folder, None)
    answer = other.generate(tokens, Sampling(20), yes)
    assert (answer.text, answer.tokens, answer.finish) == (text[:at], at + 1, "end")
    exactly = other.generate(tokens, Sampling(at + 1), yes)
    assert exactly.finish == "end"  # the end token was the last that was allowed


@pytest.mark.parametrize("target", TARGETS)
def test_adapters(exported: Path, loaded: dict[str, Any], target: str) -> None:
    """On by default and by either name, off by `none`; both turns of a conversation are the adapter's."""
    file = {"openvino": "adapter.safetensors", "onnx": "adapter.onnx_adapter"}[target]
    assert [open_folder(exported, target, name).adapter for name in (None, "adapter", file, "none")] == [
        *[file] * 3,
        None,
    ]
    with pytest.raises(UsageError, match="no such adapter"):
        open_folder(exported, target, "other")
    with_it = load_engine(open_folder(exported, target))

    def turns(engine: Any) -> list[str]:
        engine.reset()
        conversation = Conversation(engine, Sampling(10))
        return [conversation.ask(text, yes).text for text in ("One", "Two")]

    found, alone = turns(with_it), turns(loaded[target])
    assert found[0] != alone[0] and found == turns(with_it) and turns(loaded[target]) == alone


def test_both_runtimes_say_the_same_with_the_adapter(exported: Path) -> None:
    said = []
    for target in TARGETS:
        conversation = Conversation(load_engine(open_folder(exported, target)), Sampling(8))
        said.append(conversation.ask("One", yes).text)
    assert said[0][:4] == said[1][:4]


def test_which_folder(exported: Path, tmp_path: Path) -> None:
    assert open_folder(exported).target == "openvino" and open_folder(exported, "onnx").path == exported / "onnx"
    assert open_folder(exported / "onnx").target == "onnx"
    assert {context_length(open_folder(exported, target)) for target in TARGETS} == {256}
    with pytest.raises(UsageError, match="no such target"):
        open_folder(exported / "onnx", "openvino")
    with pytest.raises(UsageError, match="no such folder"):
        open_folder(tmp_path / "nothing")
    with pytest.raises(VerificationError, match="no certificate"):
        open_folder(tmp_path)
    shutil.copytree(exported / "onnx", tmp_path / "out" / "onnx")
    assert open_folder(tmp_path / "out").target == "onnx"


def test_the_quick_check(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "onnx", tmp_path / "out"))
    certificate = Certificate.read(folder)
    check_sizes(folder, certificate)
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")
    with pytest.raises(VerificationError, match="not as it was certified") as caught:
        open_folder(folder)
    assert "config.json" in str(caught.value)
    (folder / "config.json").unlink()
    with pytest.raises(VerificationError, match="no file"):
        open_folder(folder)
    sealed = (folder / "sparseport.json").read_bytes()
    (folder / "sparseport.json").write_bytes(sealed.replace(b'"size":', b'"size": ', 1))
    with pytest.raises(VerificationError, match="changed after"):
        open_folder(folder)


def test_a_folder_without_tokenizer(exported: Path, tmp_path: Path) -> None:
    for target, name in (("openvino", "openvino_tokenizer.xml"), ("onnx", "tokenizer.json")):
        chosen = open_folder(Path(shutil.copytree(exported / target, tmp_path / target)))
        require_tokenizer(chosen)
        (chosen.path / name).unlink()
        with pytest.raises(BadInput) as caught:
            require_tokenizer(chosen)
        assert caught.value.code == "E_TOKENIZER"


def test_a_runtime_that_is_missing_or_refuses(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    chosen = open_folder(Path(shutil.copytree(exported / "onnx", tmp_path / "onnx")))
    (chosen.path / "genai_config.json").write_text("{}")
    with pytest.raises(EnvironmentProblem, match="cannot load the folder") as caught:
        load_engine(chosen)
    assert "sparseport doctor" in str(caught.value.fix)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(EnvironmentProblem) as caught:
        load_engine(chosen)
    assert caught.value.fix == "pip install 'sparseport[onnx]'"


def test_the_command(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--prompt", "Hello", "--max-tokens", "5", "--json", "--quiet"]
    said = {}
    for target in TARGETS:
        assert main(["chat", str(exported), "--target", target, "--adapter", "none", *words]) == 0
        said[target] = json.loads(capsys.readouterr().out)
    assert said["openvino"]["text"][:3] == said["onnx"]["text"][:3] and said["onnx"]["template"]
    assert said["onnx"]["certificate_sha256"] == Certificate.read(exported / "onnx").seal()
    folder = Path(shutil.copytree(exported / "onnx", tmp_path / "out"))
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    assert main(["chat", str(folder), *words]) == 0  # names and sizes are as they were
    capsys.readouterr()
    assert main(["chat", str(folder), *words, "--verify"]) == 5
    assert "model.onnx.data" in capsys.readouterr().err


def test_a_folder_without_template(tiny_both: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for target in TARGETS:
        words = ["--target", target, "--prompt", "The fox", "--max-tokens", "4", "--json"]
        assert main(["chat", str(tiny_both[1].folder), *words]) == 0
        out, err = capsys.readouterr()
        assert not json.loads(out)["template"] and "no chat template" in err
        assert json.loads(out)["prompt_tokens"] == len("The fox")
