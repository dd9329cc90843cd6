"""What arrives: the same fine-tuned model through sparseport and through the stock ways.

    python benchmarks/fidelity.py --work-dir demo

Rows: ours; dequantise -> optimum-cli INT4 g64 (NNCF chooses new scales and zero-points); stock `peft` merge of the same
adapter into the sparse base -> optimum-cli INT4 g64. Every row is read back from its files and compared with the merged
model: codes, zero-points, scales, pruned weights that are not zero any more; then its logits and its answers.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import common
import numpy as np

from sparseport.offline import go_offline

go_offline()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("demo"), help="a finished demo folder")
    parser.add_argument("--items", type=int, default=200, help="test items to answer")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    from transformers import AutoTokenizer

    from sparseport.nls.reference import load_merged
    from sparseport.nls.tasks import load_task

    machine = common.machine()
    job, recipe = common.demo_job(options.work_dir)
    assert job.finetune is not None
    items = load_task(job.finetune.task).test[: options.items]
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work_dir) as scratch_name:
        scratch = Path(scratch_name)
        tokenizer = AutoTokenizer.from_pretrained(options.work_dir / "base")
        merged = load_merged(recipe)
        reference = _logits(merged, tokenizer, items)
        merged.save_pretrained(scratch / "merged")
        tokenizer.save_pretrained(scratch / "merged")
        del merged
        common.run(common.optimum_export(scratch / "merged", scratch / "naive"))
        shutil.rmtree(scratch / "merged")
        revived = peft_merge(recipe, scratch / "peft", tokenizer)
        common.run(common.optimum_export(scratch / "peft", scratch / "peft-ov"))
        shutil.rmtree(scratch / "peft")
        for label, folder in (
            ("sparseport", options.work_dir / "openvino"),
            ("dequantise, optimum-cli INT4", scratch / "naive"),
            ("peft merge, optimum-cli INT4", scratch / "peft-ov"),
        ):
            row = {"path": label, **weight_changes(recipe, folder), **behaviour(folder, tokenizer, items, reference)}
            if folder.name == "peft-ov":
                row["revived_before_quantisation"] = revived
            rows.append(row)
            print(row, flush=True)
    result = {"machine": machine, "items": len(items), "rows": rows}
    path = common.save("fidelity", result)
    print(markdown(result))
    print(f"written to {path.name}")


def markdown(result: dict[str, Any]) -> str:
    """The README's table."""
    header = ["path", "codes changed", "zero-points changed", "scales changed", "pruned weights not zero", "logit KL"]
    rows = []
    for row in result["rows"]:
        shares = [f"{row[key]:.2%}" if row[key] else "**0**" for key in ("codes", "zero_points", "scales", "revived")]
        rows.append([row["path"], *shares, row["kl"], f"{row['accuracy']:.1%}"])
        if "revived_before_quantisation" in row:
            revived = f"{row['revived_before_quantisation']:.0%} of those in adapted layers"
            rows.append(["the same, before INT4 rounds it", "", "", "", revived, "", ""])
    return common.table([*header, "accuracy"], rows)


def peft_merge(recipe: Any, out: Path, tokenizer: Any) -> float:
    """Merge the chosen sub-adapter into the sparse base with stock peft; returns the share of pruned weights revived.

    peft cannot load a sub-adapter of lower rank, so the inactive ranks are set to zero, which is the same adapter.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sparseport.sources import open_sources

    model = AutoModelForCausalLM.from_pretrained(recipe.sparse_base, dtype=torch.float32)
    before = {name: value.detach() == 0 for name, value in model.named_parameters()}
    adapted = PeftModel.from_pretrained(model, recipe.adapter)
    with open_sources(recipe) as sources, torch.no_grad():
        modules = sorted(sources.adapter_modules())
        for module in modules:
            layer = adapted.get_submodule(f"base_model.model.{module}")
            layer.lora_A["default"].weight[sources.branch(module).rank :] = 0
    merged = adapted.merge_and_unload()
    after = dict(merged.named_parameters())
    names = [f"{module}.weight" for module in modules]
    back = sum(int((before[name] & (after[name] != 0)).sum()) for name in names)
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return back / sum(int(before[name].sum()) for name in names)


def weight_changes(recipe: Any, folder: Path) -> dict[str, float]:
    """Shares of codes, zero-points, scales and pruned weights that differ from the merge, over all linear layers."""
    from sparseport.merging import merge_planned
    from sparseport.plan import make_plan
    from sparseport.sources import open_sources
    from sparseport.targets.openvino import readback
    from sparseport.weights.linear import QuantizedWeight

    model = readback.read_model(folder / "openvino_model.xml")
    found = {item.name.removeprefix("self.").removesuffix(".weight"): item.weight for item in readback.weights(model)}
    changed = dict.fromkeys(("codes", "zero_points", "scales", "revived"), 0)
    total = dict.fromkeys(changed, 0)
    with open_sources(recipe) as sources:
        for layer in make_plan(recipe, sources).layers:
            want = merge_planned(recipe, sources, layer).weight
            got = found[layer.module]
            assert isinstance(want, QuantizedWeight) and isinstance(got, QuantizedWeight) and want.mask is not None
            for key in ("codes", "zero_points", "scales"):
                left, right = getattr(want, key), getattr(got, key)
                if left.shape != right.shape:
                    raise RuntimeError(f"{layer.module}: {key} {left.shape} against {right.shape}")
                changed[key] += int(np.count_nonzero(left.astype(np.float32) != right.astype(np.float32)))
                total[key] += left.size
            off_zero = got.codes != np.repeat(got.zero_points, got.group_size, axis=1)
            changed["revived"] += int(np.count_nonzero(off_zero & ~want.mask))
            total["revived"] += int(np.count_nonzero(~want.mask))
    return {key: changed[key] / total[key] for key in changed}


def behaviour(folder: Path, tokenizer: Any, items: Any, reference: Any) -> dict[str, Any]:
    """Logit drift at full precision against the merged model, and accuracy through OpenVINO GenAI."""
    import openvino as ov

    from sparseport.nls.evaluate import accuracy, answers_openvino
    from sparseport.verify.numerics import FULL_PRECISION, drift

    request = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", FULL_PRECISION).create_infer_request()
    ids = np.array([_probe(tokenizer, items)], np.int64)
    request.infer(
        {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "beam_idx": np.zeros(1, np.int32),
            "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
        }
    )
    measured = drift(reference, np.array(request.get_tensor("logits").data[0], np.float32))
    del request
    return {**measured, "accuracy": accuracy(answers_openvino(folder, items), items)}


def _logits(model: Any, tokenizer: Any, items: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([_probe(tokenizer, items)])).logits[0].float().numpy()


def _probe(tokenizer: Any, items: Any) -> list[int]:
    """Tokens to compare logits on: the first test dialogues, with their answers."""
    from sparseport.nls.finetune import chat_text

    text = "".join(chat_text(tokenizer, item.prompt) + item.answer + tokenizer.eos_token + "\n" for item in items[:6])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
