"""Do all runtimes write what the fine-tuned model writes? Greedy tokens of every folder against torch's.

    python benchmarks/same_tokens.py --folder out --prompts 64

`out` holds `openvino` and `onnx`, exported together. The reference is a torch model in float32 of the weights that are
read back from each folder (both must give the same). Runtimes run at their exact settings: OpenVINO GenAI in float32
without dynamic quantisation, onnxruntime-genai and plain ONNX Runtime as the folder is written. Half of the prompts are
the demo task's, in its chat template; the others are the beginnings of sentences. Generation does not stop at an end
token, so that every prompt gives as many tokens to compare; only onnxruntime-genai always does, and is compared up to
there. Where a token differs, the gap between torch's two largest
logits there is shown: a tie in float32 is no difference of models.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from sparseport.offline import go_offline

go_offline()

BEGINNINGS = (
    "The harbour was quiet until",
    "To bake a loaf of rye bread, first",
    "Water boils at a lower temperature in the mountains because",
    "Dear neighbour, I am writing to",
    "def median(values):",
    "In the year 1905 a clerk in Bern",
    "The opposite of generous is",
    "Question: How many legs do three spiders have? Answer:",
)
ENDINGS = ("", " and so", " the old", " 12")
Generate = Callable[[list[int], int], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of an export to both targets")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate for each prompt")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from transformers import AutoTokenizer

    folders = {name: options.folder / name for name in ("openvino", "onnx")}
    machine = common.machine()
    tokenizer = AutoTokenizer.from_pretrained(folders["onnx"])
    prompts = _prompts(tokenizer, options.prompts)
    network = _reference(folders)
    wanted = [_torch(network, prompt, options.tokens) for prompt in prompts]
    ends = json.loads((folders["onnx"] / "genai_config.json").read_text(encoding="utf-8"))["model"]["eos_token_id"]
    rows = []
    for label, make in (
        ("OpenVINO GenAI", lambda: _openvino(folders["openvino"])),
        ("onnxruntime-genai", lambda: _onnx_genai(folders["onnx"])),
        ("ONNX Runtime", lambda: _onnx(folders["onnx"])),
    ):
        generate = make()
        found = [generate(prompt, options.tokens) for prompt in prompts]
        found = [_to_full_length(one, other, ends) for one, other in zip(found, wanted, strict=True)]
        different = [number for number, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b]
        gaps = [_gap(network, prompts[number], wanted[number], found[number]) for number in different]
        rows.append({"runtime": label, "same": len(prompts) - len(different), "gaps": gaps})
        print(rows[-1], flush=True)
    result = {"machine": machine, "prompts": len(prompts), "tokens": options.tokens, "rows": rows}
    path = common.save("same_tokens", result)
    table = [
        [row["runtime"], f"{row['same']} of {len(prompts)}", ", ".join(f"{gap:.1e}" for gap in row["gaps"]) or "-"]
        for row in rows
    ]
    print(common.table(["runtime", "prompts with torch's tokens", "gap between torch's best two, where not"], table))
    print(f"written to {path.name}")
    sys.exit(any(row["same"] != len(prompts) for row in rows))


def _to_full_length(found: list[int], wanted: list[int], ends: int | list[int]) -> list[int]:
    """Tokens of a runtime that stops before an end token, filled up with the reference's if it ends there as well."""
    if len(found) == len(wanted):
        return found
    ended = wanted[len(found)] in (ends if isinstance(ends, list) else [ends])
    return found + (wanted[len(found) :] if ended else [-1] * (len(wanted) - len(found)))


def _prompts(tokenizer: Any, count: int) -> list[list[int]]:
    from sparseport.nls.encoding import prompt_ids
    from sparseport.nls.tasks import load_task

    items = load_task("home-commands").test[: count // 2]
    prompts = [list(prompt_ids(tokenizer, item.prompt)) for item in items]
    texts = [f"{beginning}{ending}" for ending in ENDINGS for beginning in BEGINNINGS]
    prompts += [tokenizer(text)["input_ids"] for text in texts[: count - len(prompts)]]
    if len(prompts) < count:
        raise SystemExit(f"there are {len(prompts)} prompts")
    return prompts


def _reference(folders: dict[str, Path]) -> Any:
    """The torch model of the read-back weights, after making sure that both folders give the same one."""
    import torch

    from sparseport.targets.read_back import open_reader
    from sparseport.verify.numerics import reference_of

    networks = {name: reference_of(folder, open_reader(name, folder)) for name, folder in folders.items()}
    states = {name: dict(network.named_parameters()) for name, network in networks.items()}
    for name, values in states["onnx"].items():
        if not torch.equal(values, states["openvino"][name]):
            raise SystemExit(f"the folders hold different values of {name}")
    return networks["onnx"]


def _torch(network: Any, prompt: list[int], tokens: int) -> list[int]:
    import torch

    out = network.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=None,
        do_sample=False,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def _openvino(folder: Path) -> Generate:
    import openvino as ov
    import openvino_genai as genai

    from sparseport.verify.runs import OPENVINO_FULL_PRECISION

    pipeline = genai.LLMPipeline(str(folder), "CPU", **OPENVINO_FULL_PRECISION)

    def generate(prompt: list[int], tokens: int) -> list[int]:
        config = genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, ignore_eos=True)
        ids = np.array([prompt], np.int64)
        return list(
            pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config).tokens[0]
        )

    return generate


def _onnx_genai(folder: Path) -> Generate:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))

    def generate(prompt: list[int], tokens: int) -> list[int]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)][len(prompt) :]

    return generate


def _onnx(folder: Path) -> Generate:
    from sparseport.verify.runs import empty_cache, onnx_session

    session = onnx_session(folder)
    empty = empty_cache(folder, [port.name for port in session.get_inputs()])
    names = [port.name for port in session.get_outputs()]

    def generate(prompt: list[int], tokens: int) -> list[int]:
        cache, made, step = dict(empty), list[int](), list(prompt)
        while len(made) < tokens:
            mask = np.ones((1, len(prompt) + len(made)), np.int64)
            feed = {"input_ids": np.array([step], np.int64), "attention_mask": mask, **cache}
            result = dict(zip(names, session.run(None, feed), strict=True))
            step = [int(result.pop("logits")[0, -1].argmax())]
            made += step
            cache = {name.replace("present", "past_key_values"): value for name, value in result.items()}
        return made

    return generate


def _gap(network: Any, prompt: list[int], wanted: list[int], found: list[int]) -> float:
    """How far torch's two largest logits are apart at the first token that differs."""
    from sparseport.verify.numerics import logits_of

    at = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
    last = np.sort(logits_of(network, prompt + wanted[:at])[-1])
    return float(last[-1] - last[-2])


if __name__ == "__main__":
    main()
