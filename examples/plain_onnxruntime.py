"""Generate with ONNX Runtime alone: the KV cache is inputs and outputs of the graph.

    python examples/plain_onnxruntime.py OUT_DIR/onnx "Why does ice float?"

Needs `pip install onnxruntime tokenizers`. Not for sub-networks with fewer heads in some layers: other caches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def open_session(folder: Path, decoder: dict[str, Any]) -> Any:
    """A session with the entries that onnxruntime-genai sets; without them a `qdq` folder runs nine times slower."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for key, value in decoder["session_options"].items():
        if key.startswith("session."):
            options.add_session_config_entry(key, str(value))
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    from tokenizers import Tokenizer

    model = json.loads((options.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    decoder, ends = model["decoder"], np.atleast_1d(model["eos_token_id"])
    session = open_session(options.folder, decoder)
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))

    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    cache = {port.name: empty for port in session.get_inputs() if port.name.startswith("past_key_values")}
    outputs = [port.name for port in session.get_outputs()]
    prompt = tokenizer.encode(options.prompt).ids
    new, seen = list(prompt), list(prompt)
    for _ in range(options.tokens):
        feed = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, len(seen)), np.int64)}
        found = dict(zip(outputs, session.run(outputs, {**feed, **cache}), strict=True))
        new = [int(found.pop("logits")[0, -1].argmax())]  # greedy
        if new[0] in ends:
            break
        seen += new
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    print(tokenizer.decode(seen[len(prompt) :]))


if __name__ == "__main__":
    main()
