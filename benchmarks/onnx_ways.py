"""The ways to an ONNX folder that are compared, and the commands of other tools behind them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from onnx_peers import MODEL
from second_opinion import QUIET, Tool, environment

OLIVE = Tool(
    "olive",
    "",
    ("olive-ai", "0.13.0"),
    # Its ModelBuilder pass needs a builder of before 0.15; `datasets` and `requests` are imported and not asked for.
    (
        "olive-ai==0.13.0",
        "onnxruntime-genai==0.14.1",
        "onnxruntime==1.31.1",
        "transformers==5.5.4",
        "datasets==5.2.0",
        "requests",
    ),
)


def onnx_ways(
    ours: Path, scratch: Path, environments: Path, torch_install: str, texts: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Label of each way to an ONNX folder, and what makes the folder.

    Args:
        ours: sparseport's folder.
        scratch: has the dequantised model in `merged`; the ways write beside it.
        environments: where Olive's environment is, or goes.
        torch_install: what pip is given for torch.
        texts: for ways that calibrate.
    """
    merged = scratch / "merged"

    def builder(name: str, *settings: str) -> Path:
        builder_export(merged, scratch / name, "block_size=64", *settings)
        return scratch / name

    def olive(name: str, quantiser: dict[str, Any], **settings: Any) -> Path:
        python = environment(OLIVE, environments, torch_install)
        quantiser = {"bits": 4, "group_size": 64, **quantiser}
        olive_export(python, merged, scratch / name, quantiser, settings, texts)
        return scratch / name

    yield "sparseport, ONNX", lambda: ours
    yield "dequantise, model builder INT4 g64", lambda: builder("builder")
    # With a shared embedding its asymmetric graph does not load: the quantised table that it looks up is not there.
    close = ("is_symmetric=false", "shared_embeddings=false")
    yield "dequantise, model builder INT4 g64 asymmetric", lambda: builder("builder-asymmetric", *close)
    gptq = {"type": "Gptq", "sym": True, "data_config": "texts"}
    every = {"int4_op_types_to_quantize": ["MatMul", "Gather"]}
    yield "dequantise, Olive INT4 g64 (GPTQ)", lambda: olive("olive-gptq", gptq, **every)
    nearest = {"type": "Rtn", "sym": False}
    yield "dequantise, Olive INT4 g64 asymmetric (RTN)", lambda: olive("olive-rtn", nearest)


def builder_export(source: Path, output: Path, *options: str) -> None:
    """`python -m onnxruntime_genai.models.builder -p int4`, with `options` as its `--extra_options`."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(output)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(output.with_name("cache"))]
    common.run([*command, *(("--extra_options", *options) if options else ())])


def olive_export(
    python: Path, source: Path, output: Path, quantiser: dict[str, Any], builder: dict[str, Any], texts: Sequence[str]
) -> None:
    """`olive run` with a pass that quantises, then ModelBuilder, which also quantises what the first pass left.

    Args:
        python: of an environment with `OLIVE`.
        source: folder of a Hugging Face model.
        output: folder to write.
        quantiser: type and settings of the quantising pass.
        builder: settings of ModelBuilder besides those that `olive optimize --precision int4 --block_size 64` gives.
        texts: to calibrate on; Olive's own choice would be downloaded.
    """
    work = output.with_name(f"{output.name}-work")
    work.mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    (work / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = {"strategy": "join", "max_seq_len": 128, "max_samples": 16, "add_special_tokens": False}
    data = {
        "name": "texts",
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "json", "data_files": str(work / "texts.jsonl"), "split": "train"},
        "pre_process_data_config": {
            "model_name": str(source), "task": "text-generation", "text_template": "{text}", **tokens
        },
        "dataloader_config": {"batch_size": 1},
    }  # fmt: skip
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    built = {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 64, "int4_accuracy_level": 4}
    config = {
        "input_model": {
            "type": "HfModel", "model_path": str(source), "load_kwargs": {"attn_implementation": "eager"}
        },
        "data_configs": [data],
        "systems": {"local_system": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "passes": {"quantiser": quantiser, "builder": {**built, **builder}},
        "target": "local_system",
        "no_artifacts": True,
        "output_dir": str(output),
        "cache_dir": str(work / "cache"),
    }  # fmt: skip
    (work / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    quiet = {**os.environ, **QUIET, "OLIVE_DISABLE_TELEMETRY": "1", "HF_DATASETS_CACHE": str(work / "datasets")}
    common.run([str(python), "-m", "olive", "run", "--config", str(work / "config.json")], quiet, work)
    shutil.rmtree(work)
    if not (output / MODEL).is_file():  # Olive ends well even if a pass failed
        raise RuntimeError(f"Olive made no model with {quantiser['type']}")
