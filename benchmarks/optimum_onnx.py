"""Does Optimum load an ONNX folder unchanged, and does it write what the fine-tuned model writes?

    python benchmarks/optimum_onnx.py --folder demo/onnx

optimum-onnx lives in a virtual environment of its own, because it asks for a transformers of before version 5. There
`ORTModelForCausalLM.from_pretrained(FOLDER)` loads the folder, without any option, and generates greedily. The
reference is a torch model in float32, here, of the weights that are read back from the folder. Half of the prompts are
the demo task's, in the folder's chat template; the others begin sentences. End tokens are held back on both sides, so
that every prompt gives as many tokens to compare. Exit status 1 if a prompt that is generated alone differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from second_opinion import QUIET, SCRIPTS, Tool, environment

from sparseport.offline import go_offline

go_offline()

OPTIMUM = Tool(
    "optimum-onnx",
    "with_optimum_onnx.py",
    ("optimum-onnx", "0.1.0"),
    ("optimum-onnx[onnxruntime]==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "onnxruntime==1.32.0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="an exported ONNX folder")
    parser.add_argument("--environment", type=Path, default=common.ROOT / ".cache" / "second-opinion" / "optimum-onnx")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate for each prompt")
    parser.add_argument(
        "--torch-install", default="torch==2.13.0", help="what pip is given for torch, with options if need be"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    machine = common.machine()
    home = options.environment.resolve()
    home.parent.mkdir(parents=True, exist_ok=True)
    python = environment(replace(OPTIMUM, environment=home.name), home.parent, options.torch_install)
    prompts = _prompts(options.folder, options.prompts)
    wanted = _reference(options.folder, [prompt["tokens"] for prompt in prompts], options.tokens)
    answer = _ask(python, options.folder.resolve(), {"prompts": prompts, "new_tokens": options.tokens})
    same = {
        how: sum(left == right for left, right in zip(wanted, answer.pop(how), strict=True))
        for how in ("alone", "batch")
    }
    result = {"machine": machine, "prompts": len(prompts), "tokens": options.tokens, "same": same, **answer}
    path = common.save("optimum_onnx", result)
    rows = [
        ["prompts alone that give torch's tokens", f"{same['alone']} of {len(prompts)}"],
        ["the same prompts as one batch, padded on the left", f"{same['batch']} of {len(prompts)}"],
        ["tokens of its tokenizer", answer["tokenizer"]],
        ["pipeline()", answer["pipeline"]],
    ]
    print(common.table([f"optimum-onnx {answer['versions']['optimum-onnx']}", ""], rows))
    for line in answer["warnings"]:
        print(f"warned: {line}")
    print(f"written to {path.name}")
    sys.exit(same["alone"] != len(prompts))


def _prompts(folder: Path, count: int) -> list[dict[str, Any]]:
    """`text` and `tokens` of each prompt, by the folder's own tokenizer."""
    from transformers import AutoTokenizer

    from sparseport.nls.encoding import chat_text
    from sparseport.nls.tasks import load_task
    from sparseport.verify.numerics import SAMPLE_TEXT

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [chat_text(tokenizer, item.prompt) for item in load_task("home-commands").test[: (count + 1) // 2]]
    words = SAMPLE_TEXT.split(" ")
    texts += [" ".join(words[5 * start : 5 * start + 6 + start]) for start in range(count - len(texts))]
    if not all(texts):
        raise SystemExit(f"there are not enough texts for {count} prompts")
    return [{"text": text, "tokens": list(tokenizer(text)["input_ids"])} for text in texts]


def _reference(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of the folder's weights in torch, in float32."""
    import torch

    from sparseport.targets.read_back import open_reader
    from sparseport.verify.numerics import reference_of

    network = reference_of(folder, open_reader("onnx", folder))
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        ends = {"eos_token_id": _ends(folder), "pad_token_id": 0}
        out = network.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits, **ends)
        found.append([int(token) for token in out[0, len(prompt) :]])
    return found


def _ends(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]


def _ask(python: Path, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run the job in the environment."""
    with tempfile.TemporaryDirectory() as name:
        question, reply = Path(name) / "job.json", Path(name) / "answer.json"
        question.write_text(json.dumps(job), encoding="utf-8")
        script = SCRIPTS / OPTIMUM.script
        command = [str(python), str(script), str(folder), str(question), str(reply)]
        common.run(command, {**os.environ, **QUIET}, Path(name))
        return dict(json.loads(reply.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
