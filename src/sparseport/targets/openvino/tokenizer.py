"""Tokenizer and detokenizer as OpenVINO models, checked against the tokenizer they came from."""

from __future__ import annotations

from pathlib import Path

from sparseport.errors import BadInput, FidelityError
from sparseport.targets.tokenizer_files import ROUND_TRIP_SAMPLES, load_tokenizer


def convert_tokenizer_folder(source: Path, output: Path, vocab_size: int | None = None) -> None:
    """Write `openvino_tokenizer.xml/.bin` and `openvino_detokenizer.xml/.bin` for the tokenizer in `source`.

    Args:
        source: folder with the tokenizer's files.
        output: folder to write into.
        vocab_size: rows of the model's embedding; None takes it from the config.json in `source`.

    Raises:
        BadInput: there is no tokenizer in `source`, it cannot be loaded or converted, or it gives ids that the model
            does not have.
        FidelityError: the converted tokenizer gives other ids or other text than the original.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    tokenizer = load_tokenizer(source, vocab_size)
    try:
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
