"""Export a GPTQ folder to OpenVINO and ONNX Runtime from one merge, and let both runtimes answer: the same tokens?

    python examples/gptq_to_both.py --base GPTQ_DIR --output OUT_DIR --prompt "Why does ice float?"

AWQ, AutoRound and compressed-tensors folders go in the same way. Needs `pip install 'sparseport[openvino,onnx]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparseport import Progress, export, make_recipe

NEW_TOKENS = 16
# Float32 everywhere; an application leaves this away.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def openvino_tokens(folder: Path, prompt: list[int]) -> list[int]:
    import openvino as ov
    import openvino_genai as genai

    ids = np.array([prompt], np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    config = genai.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    return list(genai.LLMPipeline(str(folder), "CPU", **EXACT).generate(inputs, config).tokens[0])


def onnx_tokens(folder: Path, prompt: list[int]) -> list[int]:
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model := og.Model(str(folder)))
    length = len(prompt) + NEW_TOKENS
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--output", "--prompt"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    recipe = {"base": options.base, "output": options.output, "target": ["openvino", "onnx"]}
    openvino, onnx = (one.folder for one in export(make_recipe(recipe), Progress()).exports)
    prompt = Tokenizer.from_file(str(openvino / "tokenizer.json")).encode(options.prompt).ids
    one, other = openvino_tokens(openvino, prompt), onnx_tokens(onnx, prompt)
    print("same tokens" if one == other else "OTHER TOKENS", one, other)
    raise SystemExit(int(one != other))


if __name__ == "__main__":
    main()
