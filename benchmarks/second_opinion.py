"""Checkpoints written by other tools, dequantised by those tools and by sparseport: how many values differ.

    python benchmarks/second_opinion.py --environments .cache/second-opinion

Each tool lives in a virtual environment of its own (several gigabytes in all; made on the first run, reused after).
There it quantises small random Llamas, and dequantises its own folders with its own code. sparseport then reads them.
A tool may compute in float16: sparseport's float32 weight, rounded once to that dtype, must then be the tool's value.
Where the tool can be asked for float32, the float32 values are compared as well. Nothing may differ, not by one ULP.

    --samples tests/data/samples     writes the samples that the tests read
    --shared FOLDER                  also hashes the checkpoints of the data folder
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import ml_dtypes
import numpy as np

SCRIPTS = common.ROOT / "benchmarks" / "second_opinion"
# Nothing may be fetched or reported while the tools run; one thread, so that sums keep their order.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "GPTQMODEL_CPU_WORKERS": "2",  # its thread pool refuses fewer
}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class NotInstalled(RuntimeError):
    """pip could not make an environment; the message is pip's reason."""


@dataclass(frozen=True)
class Tool:
    """A tool that writes checkpoints.

    environment   folder of its virtual environment
    script        file in benchmarks/second_opinion/
    release       distribution and version by which a finished environment is known
    requirements  what pip installs together with torch
    afterwards    what pip then installs without looking at dependencies
    """

    environment: str
    script: str
    release: tuple[str, str]
    requirements: tuple[str, ...]
    afterwards: tuple[str, ...] = field(default=())

    @property
    def label(self) -> str:
        return " ".join(self.release)


TOOLS = (
    Tool("autoround", "with_auto_round.py", ("auto-round", "0.16.1"), ("auto-round==0.16.1", "transformers==5.5.4")),
    Tool(
        "gptqmodel",
        "with_gptqmodel.py",
        ("gptqmodel", "7.7.0"),
        # What it imports here. Its own list asks for a newer torch than the one that everything else is tested with.
        (
            "transformers==5.20.2", "accelerate==1.15.0", "datasets==5.2.0", "defuser==0.0.28", "device-smi==0.5.7",
            "dill==0.4.1", "jinja2==3.1.6", "logbar==0.4.15", "ninja==1.13.2", "packaging==26.3", "pillow==13.0.0",
            "protobuf==7.36.2", "pypcre==0.6.4", "requests==2.34.2", "setuptools>=84,<85", "threadpoolctl==3.8.0",
            "tokenicer==0.0.14", "wheel",
        ),
        ("gptqmodel==7.7.0",),
    ),
    Tool(
        "ct19",
        "with_compressed_tensors.py",
        ("llmcompressor", "0.14.0.1"),
        ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0"),
    ),
    Tool(
        "ct12",
        "with_compressed_tensors_012.py",
        ("compressed-tensors", "0.12.2"),
        ("compressed-tensors==0.12.2", "transformers==5.23.0"),
    ),
    Tool("autoawq", "with_autoawq.py", ("autoawq", "0.2.9"), ("autoawq==0.2.9", "transformers==4.51.3")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=common.ROOT / ".cache" / "second-opinion")
    parser.add_argument("--samples", type=Path, help="where the samples go (default: a folder that is removed)")
    parser.add_argument("--shared", type=Path, help="data folder with checkpoints/")
    parser.add_argument("--tools", nargs="*", default=[tool.environment for tool in TOOLS], help="environments to use")
    parser.add_argument(
        "--torch-install", default="torch==2.13.0", help="what pip is given for torch, with options if need be"
    )
    options = parser.parse_args()
    if unknown := set(options.tools) - {tool.environment for tool in TOOLS}:
        parser.error(f"no such environment: {', '.join(sorted(unknown))}")
    machine = common.machine()
    environments = options.environments.resolve()
    environments.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        samples = (options.samples or scratch / "samples").resolve()
        common.run([sys.executable, str(SCRIPTS / "source_models.py"), str(scratch / "sources")])
        for tool in TOOLS:
            if tool.environment in options.tools:
                rows += tool_rows(tool, environments, options, scratch, samples)
    result = {"machine": machine, "rows": rows}
    print(markdown(result))
    if len(options.tools) == len(TOOLS):
        print(f"written to {common.save('second_opinion', result).name}")
    else:
        print("not written: not all tools were asked")


def tool_rows(
    tool: Tool, environments: Path, options: argparse.Namespace, scratch: Path, samples: Path
) -> list[dict[str, Any]]:
    """One row per sample of a tool, or one that says why there is none."""
    try:
        python = environment(tool, environments, options.torch_install)
    except NotInstalled as reason:
        print(f"{tool.label} is not installed: {reason}", flush=True)
        return [
            {"sample": "", "tool": tool.release[0], "version": tool.release[1], "state": f"not installed: {reason}"}
        ]
    values = scratch / "values" / tool.environment
    command = [str(python), str(SCRIPTS / tool.script), str(scratch / "sources"), str(samples), str(values)]
    command += [str(options.shared.resolve())] if options.shared else []
    print(f"{tool.label}: writing samples", flush=True)
    # The tools leave logs in the working folder.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=scratch, env={**os.environ, **QUIET}
    )
    if done.returncode:
        raise RuntimeError(f"{tool.script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [
        compare(path.stem, *places(path.stem, samples, options.shared), path)
        for path in sorted(values.glob("*.safetensors"))
    ]


def places(name: str, samples: Path, shared: Path | None) -> tuple[Path, Path]:
    """Folder of a sample and its record; those of the data folder keep only the record here."""
    if name.startswith("shared-"):
        assert shared is not None
        return shared / "checkpoints" / name.removeprefix("shared-"), samples / f"{name}.json"
    return samples / name, samples / name / "expected.json"


def environment(tool: Tool, folder: Path, torch_install: str) -> Path:
    """Python of the tool's virtual environment, made if it is not there.

    Raises:
        NotInstalled: with pip's reason.
    """
    home = folder / tool.environment
    python = home / "bin" / "python"
    if python.is_file() and installed(python, tool.release[0]) == tool.release[1]:
        return python
    print(f"{tool.label}: making its environment", flush=True)
    try:
        common.run([sys.executable, "-m", "venv", str(home)])
    except RuntimeError as error:
        raise NotInstalled(f"no virtual environment: {reason_of(str(error))}") from error
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    steps = [[*pip, *shlex.split(torch_install), "numpy", *tool.requirements]]
    if tool.afterwards:
        steps.append([*pip, "--no-deps", "--no-build-isolation", *tool.afterwards])
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstalled(reason_of(done.stderr))
    return python


def installed(python: Path, distribution: str) -> str:
    """Version of a distribution in an environment; empty if it is absent."""
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def reason_of(text: str) -> str:
    """The first error that pip names, else its last line; without addresses and paths of this machine."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    line = (errors[:1] or lines[-1:] or ["no message"])[0]
    return re.sub(r"\w+://\S+|(?<!\S)/\S+", "...", line)[:200]


def compare(name: str, folder: Path, record: Path, values: Path) -> dict[str, Any]:
    """Every linear layer of a sample, as sparseport reads it against what the tool wrote into `values`."""
    from sparseport.checkpoints.detect import open_linears
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.checkpoints.safetensors import SafeTensorsFile
    from sparseport.errors import SparseportError

    expected = json.loads(record.read_text(encoding="utf-8"))
    row = {"sample": name, "tool": expected["tool"], "version": expected["version"], "layers": 0, "values": 0}
    differ, refusals = 0, []
    try:
        with ModelFolder.open(folder) as model, SafeTensorsFile.open(values) as told:
            linears = open_linears(model)
            if set(model.linear_names()) != set(expected["layers"]):
                raise RuntimeError(f"{name}: the tool and sparseport name different layers")
            for module, layer in expected["layers"].items():
                try:
                    got = real_values(linears.read(module))
                except SparseportError as error:
                    refusals.append(f"{module}: {error.code}, {error.what}")
                    continue
                for leaf, dtype in (("own", layer["dtype"]), ("float32", "float32")):
                    if f"{module}.{leaf}" in told:
                        want = told.read(f"{module}.{leaf}")
                        differ += int(np.count_nonzero(got.astype(DTYPES[dtype]).astype(np.float32) != want))
                        row["values"] += want.size
                row["layers"] += 1
    except SparseportError as error:
        refusals.append(f"{error.code}, {error.what}")
    state = f"refused {len(refusals)}: {refusals[0]}" if refusals else "compared"
    return {**row, "differ": differ, "state": state}


def real_values(weight: Any) -> Any:
    """float32 [out, in] of a weight that sparseport read."""
    from sparseport.weights.linear import QuantizedWeight
    from sparseport.weights.rounding import dequantize

    return dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.values.astype(np.float32)


def markdown(result: dict[str, Any]) -> str:
    """The table of the documentation."""
    header = ["sample", "tool", "version", "layers", "values compared", "values that differ"]
    rows = []
    for row in result["rows"]:
        found = f"{row['differ']:,}" if row["state"] == "compared" else row["state"]
        rows.append(
            [row["sample"], row["tool"], row["version"], str(row.get("layers", "")), f"{row.get('values', 0):,}", found]
        )
    return common.table(header, rows)


if __name__ == "__main__":
    main()
