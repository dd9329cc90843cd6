"""onnxruntime-genai reads Hugging Face's tokenizer files itself: does it give the same ids and the same text?"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.errors import BadInput, FidelityError
from sparseport.targets.tokenizer_files import ROUND_TRIP_SAMPLES, TOKENIZER_FILES, load_tokenizer

# What a chat template is tried with: all templates have roles for a user and an assistant.
MESSAGES = (
    {"role": "user", "content": 'Is it "cold"?'},
    {"role": "assistant", "content": "No: 21 degrees."},
    {"role": "user", "content": "Open a window."},
)
_ADVICE = "give --no-tokenizer, and use transformers' tokenizer with the folder"


def check_tokenizer(source: Path, built: Path) -> list[str]:
    """Compare onnxruntime-genai's tokenizer with the original on a few texts.

    Returns:
        What is worth knowing: a chat template that onnxruntime-genai fills in differently, or a space that it leaves at
        the beginning of a text, which an application can work around, as it cannot around wrong ids.

    Args:
        source: folder with the tokenizer's files and config.json.
        built: folder with the builder's `genai_config.json`.

    Raises:
        BadInput: there is no tokenizer, or either side cannot load it, or it gives ids that the model does not have.
        FidelityError: onnxruntime-genai gives other ids or other text.
    """
    original = load_tokenizer(source)
    with tempfile.TemporaryDirectory(dir=built) as name:
        folder = Path(name)
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        _write_stub(built, folder)
        tokenizer = _load(folder, source.name)
        # By default it leaves out what a tokenizer puts around a text; with the option it has to put the same there.
        spaced = False
        for special in (False, True):
            tokenizer.update_options(add_special_tokens=str(special).lower())
            for text in ROUND_TRIP_SAMPLES:
                spaced |= _compare(original, tokenizer, text, special, source.name)
        tokenizer.update_options(add_special_tokens="false")
        return _space_notes(spaced) + _special_notes(original) + _chat_notes(original, tokenizer)


def _compare(original: Any, tokenizer: Any, text: str, special: bool, where: str) -> bool:
    """Compare ids and text; returns whether the text has a space more at its beginning. Raises FidelityError."""
    expected = original(text, add_special_tokens=special)["input_ids"]
    ids = tokenizer.encode(text).tolist()
    if ids != expected:
        raise FidelityError(
            "onnxruntime-genai's tokenizer gives other ids than the original",
            where=where,
            expected=expected[:8],
            found=ids[:8],
            code="E_TOKENIZER",
            fix=_ADVICE,
        )
    back, wanted = tokenizer.decode(ids), original.decode(expected, skip_special_tokens=True)
    if back == " " + wanted:
        return True
    if back != wanted:
        raise FidelityError(
            "onnxruntime-genai's tokenizer gives other text than the original",
            where=where,
            expected=repr(wanted),
            found=repr(back),
            code="E_TOKENIZER",
            fix=_ADVICE,
        )
    return False


def _space_notes(spaced: bool) -> list[str]:
    """A sentence if texts come back with a space more at their beginning (SentencePiece's mark of a word's start)."""
    return (
        [
            "onnxruntime-genai leaves a space at the beginning of the text that it decodes, which transformers takes "
            "away; strip it if it matters"
        ]
        if spaced
        else []
    )


def _special_notes(original: Any) -> list[str]:
    """A sentence if the tokenizer puts tokens around a text, which onnxruntime-genai does only when it is told to."""
    if original("a")["input_ids"] == original("a", add_special_tokens=False)["input_ids"]:
        return []
    return [
        "this tokenizer puts special tokens around a text; onnxruntime-genai leaves them out unless it is told "
        '`tokenizer.update_options(add_special_tokens="true")`, which is right for text without a chat template'
    ]


def _chat_notes(original: Any, tokenizer: Any) -> list[str]:
    """A sentence if the tokenizer has a chat template that the two fill in differently."""
    if not original.chat_template:
        return []
    try:
        wanted = original.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template that wants other roles, or one of several to be named
        return [f"the chat template could not be compared: transformers says {str(error)[:80]!r}"]
    try:
        found = tokenizer.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
    except Exception as error:  # a template engine of its own, which knows less than Jinja
        found = f"an error: {error}"
    if found == wanted:
        return []
    return [
        "onnxruntime-genai fills in the chat template differently from transformers "
        f"({found[:60]!r}, expected {wanted[:60]!r}): format prompts with transformers' tokenizer"
    ]


def _load(folder: Path, where: str) -> Any:
    import onnxruntime_genai

    try:
        return onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    except Exception as error:
        raise BadInput(
            "onnxruntime-genai cannot load the tokenizer",
            where=where,
            found=str(error)[:200],
            code="E_TOKENIZER",
            fix=_ADVICE,
        ) from error


def _write_stub(built: Path, folder: Path) -> None:
    """A decoder of one layer that computes nothing: onnxruntime-genai makes a tokenizer for a loaded model only."""
    import onnx
    from onnx import TensorProto, helper

    config = read_json(built / "genai_config.json", what="genai_config.json")
    decoder = config["model"]["decoder"]
    decoder["num_hidden_layers"] = 1
    decoder["filename"] = "stub.onnx"
    write_json(folder / "genai_config.json", config)
    cache = ["batch", decoder["num_key_value_heads"], "past", decoder["head_size"]]
    names = [decoder["inputs"][f"past_{part}_names"].replace("%d", "0") for part in ("key", "value")]
    presents = [decoder["outputs"][f"present_{part}_names"].replace("%d", "0") for part in ("key", "value")]
    ids = [
        decoder["inputs"][part] for part in ("input_ids", "attention_mask", "position_ids") if part in decoder["inputs"]
    ]
    inputs = [helper.make_tensor_value_info(part, TensorProto.INT64, ["batch", part]) for part in ids]
    inputs += [helper.make_tensor_value_info(part, TensorProto.FLOAT, cache) for part in names]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 1])]
    outputs += [helper.make_tensor_value_info(part, TensorProto.FLOAT, cache) for part in presents]
    nodes = [
        helper.make_node("Cast", [ids[0]], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["wide", "axis"], ["logits"]),
        *(helper.make_node("Identity", [past], [present]) for past, present in zip(names, presents, strict=True)),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    graph = helper.make_graph(nodes, "stub", inputs, outputs, [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "stub.onnx")
