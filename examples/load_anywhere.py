"""Load an exported folder with the libraries that applications use, none of which knows sparseport.

    python examples/load_anywhere.py genai OUT_DIR/openvino "Why does ice float?"
    python examples/load_anywhere.py optimum OUT_DIR/openvino "Why does ice float?"
    python examples/load_anywhere.py onnxruntime-genai OUT_DIR/onnx "Why does ice float?"

Optimum for ONNX is the second one with `from optimum.onnxruntime import ORTModelForCausalLM`, in an environment of its
own. ONNX Runtime alone, without a library that generates: examples/plain_onnxruntime.py.
"""

from __future__ import annotations

import argparse

TOKENS = 16


def genai(folder: str, prompt: str) -> str:
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(folder, "CPU")
    return str(pipeline.generate(prompt, max_new_tokens=TOKENS, do_sample=False))


def optimum(folder: str, prompt: str) -> str:
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    model, tokenizer = OVModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0]
    return str(tokenizer.decode(ids[inputs["input_ids"].shape[1] :]))


def onnxruntime_genai(folder: str, prompt: str) -> str:
    import onnxruntime_genai as og

    model = og.Model(folder)
    tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
    ids = tokenizer.encode(prompt)
    parameters.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)[len(ids) :]))


if __name__ == "__main__":
    ways = {"genai": genai, "optimum": optimum, "onnxruntime-genai": onnxruntime_genai}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=ways)
    parser.add_argument("folder")
    parser.add_argument("prompt")
    options = parser.parse_args()
    print(ways[options.library](options.folder, options.prompt))
