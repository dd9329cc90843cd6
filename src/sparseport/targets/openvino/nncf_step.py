"""The NNCF half of weight compression, run as a child process because NNCF is heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SEQUENCE = 128


def compress(
    source: str,
    output: str,
    tokenizer: str,
    keep: list[str],
    branches: list[str],
    matrices: list[str],
    embedding: str,
    mode: str,
    ratio: float,
    group_size: int,
    scale_estimation: bool,
    gptq: bool,
    dataset: str | None,
    samples: int,
) -> dict[str, Any]:
    """Compress an IR with `nncf.compress_weights` and save it.

    Args:
        source: IR to read.
        output: IR to write.
        tokenizer: folder with tokenizer.json, for the dataset.
        keep: names of floating-point layers' constants that stay as they are.
        branches: names of un-merged branches' constants, which stay as they are in every mode.
        matrices: names of the other matrices (embedding, head).
        embedding: `int8` compresses them; otherwise they stay.
        mode: NNCF mode of the linear layers, or `none`.
        ratio: share of layers in 4 bits.
        group_size: columns per group in 4 bits.
        scale_estimation: NNCF's scale estimation.
        gptq: NNCF's GPTQ.
        dataset: text file for the data-aware options.
        samples: samples to take from it.
    """
    import nncf
    import openvino as ov

    model = ov.Core().read_model(source)
    if embedding == "int8":
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT8_ASYM,
            **_ignoring(model, keep + branches + ([] if mode == "none" else _float_linears(model, matrices))),
        )
    if mode != "none":
        four_bits = mode.startswith("int4")
        options: dict[str, Any] = {}
        if four_bits:
            options = {
                "ratio": ratio,
                "group_size": group_size,
                "gptq": gptq or None,
                "scale_estimation": scale_estimation or None,
                "all_layers": False,
            }
            if dataset is not None:
                options["dataset"] = _dataset(model, Path(dataset), Path(tokenizer), samples)
        kept = branches + ([] if embedding == "int8" else matrices)
        model = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode[mode.upper()], **_ignoring(model, kept), **options
        )
    ov.save_model(model, output, compress_to_fp16=False)
    return {}


def _float_linears(model: Any, matrices: list[str]) -> list[str]:
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "Constant"
        and op.get_friendly_name().endswith(".weight")
        and op.get_friendly_name() not in matrices
        and op.get_element_type().to_string() in ("f16", "f32")
        and len([n for n in op.get_output_shape(0) if n != 1]) == 2
    ]


def _ignoring(model: Any, constants: list[str]) -> dict[str, Any]:
    """NNCF ignores operations, not constants: name every operation that these constants feed."""
    import nncf

    wanted = set(constants)
    names: list[str] = []
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_friendly_name() in wanted:
            names.extend(user.get_friendly_name() for user in _users(op))
    return {"ignored_scope": nncf.IgnoredScope(names=sorted(set(names)))} if names else {}


def _users(node: Any) -> list[Any]:
    found: list[Any] = []
    for target in node.output(0).get_target_inputs():
        user = target.get_node()
        found.extend(_users(user) if user.get_type_name() == "Convert" else [user])
    return found


def _dataset(model: Any, path: Path, tokenizer: Path, samples: int) -> Any:
    import nncf
    import numpy as np
    from tokenizers import Tokenizer

    from sparseport.errors import BadInput

    if not path.is_file():
        raise BadInput("no such dataset", where=path)
    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:samples]
    if not lines:
        raise BadInput("the dataset is empty", where=path)
    inputs = {name for port in model.inputs for name in port.get_names()}
    items = []
    for line in lines:
        ids = encode(line).ids[:_SEQUENCE]
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        items.append({name: value for name, value in feed.items() if name in inputs})
    return nncf.Dataset(items)


if __name__ == "__main__":
    from sparseport.child import serve

    serve(compress)
