"""Tokenizer and detokenizer as OpenVINO models, checked against the tokenizer they came from."""

from __future__ import annotations

from pathlib import Path

from sparseport.errors import BadInput, FidelityError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)

ROUND_TRIP_SAMPLES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def f(x):\n    return x ** 2  # 3.14159",
    "  two  spaces, tabs\tand newlines\n\n",
    "naïve café, 北京, ünïcödé, 😀🎉",
)


def convert_tokenizer_folder(source: Path, output: Path) -> None:
    """Write `openvino_tokenizer.xml/.bin` and `openvino_detokenizer.xml/.bin` for the tokenizer in `source`.

    Raises:
        BadInput: there is no tokenizer in `source`, or it cannot be loaded or converted.
        FidelityError: the converted tokenizer gives other ids or other text than the original.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise BadInput(
            "the base model has no tokenizer",
            where=source.name,
            code="E_TOKENIZER",
            fix="put the tokenizer's files beside the model, or give --no-tokenizer",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.padding_side = "left"
        tokenizer.truncation_side = "left"
        encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:
        raise BadInput(
            "the tokenizer cannot be converted",
            where=source.name,
            found=f"{type(error).__name__}: {error}",
            code="E_TOKENIZER",
            fix="mend the tokenizer, or give --no-tokenizer",
        ) from error
    _check_round_trip(tokenizer, encoder, decoder, source.name)
    ov.save_model(encoder, output / "openvino_tokenizer.xml", compress_to_fp16=False)
    ov.save_model(decoder, output / "openvino_detokenizer.xml", compress_to_fp16=False)


def _check_round_trip(tokenizer: object, encoder: object, decoder: object, where: str) -> None:
    import numpy as np
    import openvino as ov

    core = ov.Core()
    encode = core.compile_model(encoder, "CPU")
    decode = core.compile_model(decoder, "CPU")
    for text in ROUND_TRIP_SAMPLES:
        expected = tokenizer(text)["input_ids"]  # type: ignore[operator]
        ids = encode([text])["input_ids"][0].tolist()
        if ids != expected:
            raise FidelityError(
                "the OpenVINO tokenizer gives other ids than the original",
                where=where,
                expected=expected[:8],
                found=ids[:8],
                code="E_TOKENIZER",
            )
        back = str(decode(np.array([ids], np.int64))["string_output"][0])
        original = tokenizer.decode(expected, skip_special_tokens=True)  # type: ignore[attr-defined]
        if back != original:
            raise FidelityError(
                "the OpenVINO detokenizer gives other text than the original",
                where=where,
                expected=repr(original),
                found=repr(back),
                code="E_TOKENIZER",
            )
