"""What arrives: the same fine-tuned model through sparseport and through the stock ways.

    python benchmarks/fidelity.py --work-dir demo

Rows for OpenVINO: ours; dequantise -> optimum-cli INT4 g64 (NNCF chooses new scales and zero-points); stock `peft`
merge of the same adapter into the sparse base -> optimum-cli INT4 g64. Rows for ONNX Runtime: ours; dequantise -> the
model builder of onnxruntime-genai, as `-p int4` quantises and with the options that come closest to the source;
dequantise -> Olive in an environment of its own, with GPTQ as `olive optimize` does and with rounding to nearest.

Every row is read back from its files and compared with the merged model: codes, zero-points, scales, pruned weights
that are not zero any more, values of embedding and head; then its logits and its answers. All groups have 64 columns.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx_peers
from onnx_ways import onnx_ways
from second_opinion import NotInstalled

from sparseport.errors import UsageError
from sparseport.offline import go_offline
from sparseport.weights.linear import QuantizedWeight

go_offline()


@dataclass(frozen=True)
class Contents:
    """What a model is made of: its linear layers, and the real values of embedding and head."""

    linears: dict[str, QuantizedWeight]
    embedding: Any
    head: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("demo"), help="a finished demo folder")
    parser.add_argument("--onnx", type=Path, help="the same model exported to ONNX (default WORK_DIR/onnx)")
    parser.add_argument("--items", type=int, default=200, help="test items to answer")
    parser.add_argument("--environments", type=Path, default=common.ROOT / ".cache" / "second-opinion")
    parser.add_argument(
        "--torch-install", default="torch==2.13.0", help="what pip is given for torch, with options if need be"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    from transformers import AutoTokenizer

    from sparseport.nls.encoding import chat_text
    from sparseport.nls.reference import load_merged
    from sparseport.nls.tasks import load_task

    machine = common.machine()
    job, recipe = common.demo_job(options.work_dir)
    onnx = _onnx_folder(options.onnx or options.work_dir / "onnx", options.work_dir, recipe)
    assert job.finetune is not None
    task = load_task(job.finetune.task, job.finetune.data)
    items = task.test[: options.items]
    environments = options.environments.resolve()
    environments.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work_dir) as scratch_name:
        scratch = Path(scratch_name).resolve()
        tokenizer = AutoTokenizer.from_pretrained(options.work_dir / "base")
        network = load_merged(recipe)
        tokens = _probe(tokenizer, items)
        reference = _logits(network, tokens)
        network.save_pretrained(scratch / "merged")
        tokenizer.save_pretrained(scratch / "merged")
        del network
        merged = _merged(recipe)

        def add(label: str, row: dict[str, Any]) -> None:
            rows.append({"path": label, **row})
            print(rows[-1], flush=True)

        def openvino(folder: Path) -> dict[str, Any]:
            return {**changes(merged, _read_openvino(folder)), **_run_openvino(folder, tokens, reference, items)}

        add("sparseport, OpenVINO", openvino(options.work_dir / "openvino"))
        common.run(common.optimum_export(scratch / "merged", scratch / "naive"))
        add("dequantise, optimum-cli INT4", openvino(scratch / "naive"))
        revived = peft_merge(recipe, scratch / "peft", tokenizer)
        common.run(common.optimum_export(scratch / "peft", scratch / "peft-ov"))
        shutil.rmtree(scratch / "peft")
        add("peft merge, optimum-cli INT4", {**openvino(scratch / "peft-ov"), "revived_before_quantisation": revived})
        texts = [chat_text(tokenizer, item.prompt) + item.answer + tokenizer.eos_token for item in task.train]
        for label, make in onnx_ways(onnx, scratch, environments, options.torch_install, texts):
            try:
                folder = make()
            except NotInstalled as reason:
                add(label, {"not_installed": str(reason)})
                continue
            graph = onnx_peers.Graph(folder)
            shapes = {module: weight.shape for module, weight in merged.linears.items()}
            found = Contents(
                onnx_peers.read_linears(graph, shapes), onnx_peers.read_embedding(graph), onnx_peers.read_head(graph)
            )
            add(label, {**changes(merged, found), **_run_onnx(folder, tokens, reference, items)})
    result = {"machine": machine, "items": len(items), "rows": rows}
    path = common.save("fidelity", result)
    print(markdown(result))
    print(f"written to {path.name}")


def markdown(result: dict[str, Any]) -> str:
    """The README's table."""
    keys = ("codes", "zero_points", "scales", "revived")
    header = ["path", "codes changed", "zero-points changed", "scales changed", "pruned weights not zero"]
    header += ["embedding / head changed", "logit KL", "accuracy"]
    rows = []
    for row in result["rows"]:
        if "not_installed" in row:
            rows.append([row["path"], f"not installed: {row['not_installed']}", *[""] * (len(header) - 2)])
            continue
        shares = [_share(row[key]) for key in keys]
        tables = f"{_share(row['embedding'])} / {_share(row['head'])}"
        exact = row.get("float32")
        kl = row["kl"] if exact is None or exact["kl"] == row["kl"] else f"{row['kl']} ({exact['kl']} in float32)"
        rows.append([row["path"], *shares, tables, kl, f"{row['accuracy']:.1%}"])
        if "revived_before_quantisation" in row:
            revived = f"{row['revived_before_quantisation']:.0%} of those in adapted layers"
            rows.append(["the same, before INT4 rounds it", "", "", "", revived, "", "", ""])
    return str(common.table(header, rows))


def _share(value: float) -> str:
    return f"{value:.2%}" if value else "**0**"


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


def changes(merged: Contents, found: Contents) -> dict[str, float]:
    """Shares of codes, zero-points, scales and pruned weights that differ from the merge, over all linear layers.

    The same for the values of embedding and head.
    """
    changed = dict.fromkeys(("codes", "zero_points", "scales", "revived"), 0)
    total = dict.fromkeys(changed, 0)
    for module, want in merged.linears.items():
        got = found.linears[module]
        assert want.mask is not None
        for key in ("codes", "zero_points", "scales"):
            left, right = getattr(want, key), getattr(got, key)
            if left.shape != right.shape:
                raise RuntimeError(f"{module}: {key} {left.shape} against {right.shape}")
            changed[key] += int(np.count_nonzero(left.astype(np.float32) != right.astype(np.float32)))
            total[key] += left.size
        zero_points, scales = (np.repeat(part, got.group_size, axis=1) for part in (got.zero_points, got.scales))
        off_zero = (got.codes != zero_points) & (scales != 0)
        changed["revived"] += int(np.count_nonzero(off_zero & ~want.mask))
        total["revived"] += int(np.count_nonzero(~want.mask))
    shares = {key: changed[key] / total[key] for key in changed}
    for key in ("embedding", "head"):
        shares[key] = float(np.mean(getattr(merged, key) != getattr(found, key)))
    return shares


def _onnx_folder(folder: Path, work_dir: Path, recipe: Any) -> Path:
    """The ONNX folder of sparseport, absolute.

    Raises:
        UsageError: it is not there.
    """
    if (folder / onnx_peers.MODEL).is_file():
        return folder.resolve()
    parts = f"--base {work_dir}/int4 --sparse-base {work_dir}/sparse --adapter {work_dir}/adapter"
    how = f"--sub-adapter {recipe.sub_adapter} --rounding {recipe.rounding.value} --embedding {recipe.embedding}"
    command = f"sparseport export --target onnx {parts} {how} --output {folder}"
    raise UsageError("the demo's model has not been exported to ONNX", where=folder, fix=f"run `{command}` first")


def _merged(recipe: Any) -> Contents:
    """The model that every row should be."""
    from sparseport.merging import merge_planned
    from sparseport.plan import make_plan
    from sparseport.sources import open_sources

    linears = {}
    with open_sources(recipe) as sources:
        for layer in make_plan(recipe, sources).layers:
            weight = merge_planned(recipe, sources, layer).weight
            assert isinstance(weight, QuantizedWeight)
            linears[layer.module] = weight
        embedding = np.array(sources.base.read(f"{sources.base.embedding_name}.weight"), np.float32)
        if not sources.base.tied_head:
            raise RuntimeError("the demo's model has a head of its own")
    return Contents(linears, embedding, embedding)


def _read_openvino(folder: Path) -> Contents:
    """The layers of an IR, and its one table for embedding and head."""
    from sparseport.targets.openvino import readback
    from sparseport.weights.rounding import dequantize

    linears, embedding = {}, None
    for item in readback.weights(readback.read_model(folder / "openvino_model.xml")):
        name = item.name.removeprefix("self.").removesuffix(".weight")
        if name == "model.embed_tokens":
            weight = item.weight
            embedding = dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.values.astype(np.float32)
        elif isinstance(item.weight, QuantizedWeight):
            linears[name] = item.weight
    if embedding is None:
        raise RuntimeError(f"{folder.name} has no embedding")
    return Contents(linears, embedding, embedding)


def _run_openvino(folder: Path, tokens: list[int], reference: Any, items: Any) -> dict[str, Any]:
    """Logit drift at full precision against the merged model, and accuracy through OpenVINO GenAI."""
    import openvino as ov

    from sparseport.nls.evaluate import accuracy, answers_openvino
    from sparseport.verify.numerics import drift
    from sparseport.verify.runs import OPENVINO_FULL_PRECISION

    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", OPENVINO_FULL_PRECISION)
    request = compiled.create_infer_request()
    ids = np.array([tokens], np.int64)
    request.infer(
        {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "beam_idx": np.zeros(1, np.int32),
            "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
        }
    )
    measured = drift(reference, np.array(request.get_tensor("logits").data[0], np.float32))
    del request, compiled
    return {**measured, "accuracy": accuracy(answers_openvino(folder, items), items)}


def _run_onnx(folder: Path, tokens: list[int], reference: Any, items: Any) -> dict[str, Any]:
    """Logit drift as the folder is, and once more with products in float32; accuracy through onnxruntime-genai."""
    from sparseport.nls.evaluate import accuracy
    from sparseport.verify.numerics import drift

    answers = onnx_peers.answers(folder, [item.prompt for item in items])
    return {
        **drift(reference, onnx_peers.logits(folder, tokens)),
        "float32": drift(reference, onnx_peers.logits(folder, tokens, accuracy_level=1)),
        "accuracy_levels": onnx_peers.Graph(folder).accuracy_levels(),
        "accuracy": accuracy(answers, items),
    }


def _logits(model: Any, tokens: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def _probe(tokenizer: Any, items: Any) -> list[int]:
    """Tokens to compare logits on: the first test dialogues, with their answers."""
    from sparseport.nls.encoding import chat_text

    text = "".join(chat_text(tokenizer, item.prompt) + item.answer + tokenizer.eos_token + "\n" for item in items[:6])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
