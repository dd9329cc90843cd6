"""The README's performance section: both runtimes, at their own and at swept settings, beside stock INT4 models.

    python benchmarks/performance.py --work-dir demo                   # the demo's model, 135M
    python benchmarks/performance.py --work-dir demo --model tinyllama --scratch DIR

Each model is exported exact and fast (ONNX Runtime's products, 8-bit embedding), swept within a budget of drift, and
measured in interleaved rounds with peers made from the same weights, which run at their own settings. Results go into
benchmarks/results/performance_MODEL.json, and the table of every model measured so far into README.md, between the
markers `performance`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import common

from sparseport.offline import go_offline

go_offline()

from sparseport.bench.rounds import Asked  # noqa: E402
from sparseport.bench.sweep import Budget  # noqa: E402
from sparseport.bench.sweeping import sweep_folders  # noqa: E402
from sparseport.checkpoints.gguf import convert_gguf  # noqa: E402
from sparseport.pipeline import export  # noqa: E402
from sparseport.progress import Progress  # noqa: E402
from sparseport.recipe import make_recipe  # noqa: E402

TITLES = {
    "demo": "SmolLM2-135M, the demo's QA-SparsePEFT model, INT4 in groups of 64",
    "tinyllama": "TinyLlama 1.1B Chat, INT4 in groups of 64 (rounded from 2-bit weights: real sizes and text)",
}
WAYS = {
    "exact": {},
    "fast": {"embedding": "int8", "onnx": {"accuracy": "fast"}},
}
# How rows are called in the table: the folder and its engine in words.
WORDS = {
    "exact/openvino, openvino-genai": "OpenVINO",
    "exact/onnx, onnxruntime-genai": "ONNX Runtime",
    "fast/openvino, openvino-genai": "OpenVINO, INT8 embedding",
    "fast/onnx, onnxruntime-genai": "ONNX Runtime, fast products, INT8 embedding",
}
BEGIN, END = "<!-- performance: begin -->\n", "<!-- performance: end -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("demo"), help="a finished demo folder")
    parser.add_argument("--model", choices=sorted(TITLES), default="demo")
    parser.add_argument("--scratch", type=Path, help="folder for what is made; kept (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=sorted(WAYS), help="of exporting")
    parser.add_argument("--kl", type=float, default=0.02)
    parser.add_argument("--top1", type=float, default=0.9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = options.scratch or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        folders = exports(inputs(options.model, options.work_dir, scratch), scratch, options.ways)
        result = sweep_folders(
            folders,
            Budget(options.kl, options.top1),
            asked=Asked(rounds=options.rounds, tokens=options.tokens),
            peers=True,
            write=True,
            progress=Progress("auto"),
        )
    common.save(f"performance_{options.model}", result)
    write_readme(common.ROOT / "README.md")
    print(markdown(result))


def inputs(model: str, work_dir: Path, scratch: Path) -> dict[str, Any]:
    """What is exported."""
    if model == "demo":
        _, recipe = common.demo_job(work_dir)
        fields = ("base", "sparse_base", "adapter", "sub_adapter", "rounding")
        return {name: getattr(recipe, name) for name in fields}
    from models import tinyllama

    base, dense = scratch / "int4", scratch / "dense"
    if not (base / "config.json").is_file():
        if not dense.is_dir():
            convert_gguf(tinyllama(scratch), dense)
        common.run([common.sparseport(), "quantize", "--base", str(dense), "--output", str(base)])
    return {"base": base}


def exports(fields: dict[str, Any], scratch: Path, ways: list[str]) -> list[Path]:
    """Both targets in each way."""
    folders = []
    for name, way in ((name, WAYS[name]) for name in ways):
        output = scratch / name
        if not output.is_dir():
            export(make_recipe({**fields, **way, "target": ["openvino", "onnx"], "output": output}))
        folders.append(output)
    return folders


def markdown(result: dict[str, Any]) -> str:
    """A table of one model; ratios against OpenVINO at its own settings. What the sweep chose of all is bold."""
    head = ["", "decode ms/token", "ratio", f"first token of {result['asked']['prompt']} (ms)", "ratio", "of the limit",
            "peak MiB", "MiB", "KL", "top-1"]  # fmt: skip
    rows = []
    for row in result["rows"]:
        label = row["label"]
        for folder, words in WORDS.items():
            label = label.replace(folder, f"sparseport, {words}")
        label = f"**{label}**" if row["label"] == result["chosen"] else label
        rows.append(
            [
                label,
                _range(row["decode_ms"]),
                f"{row['ratio']['decode']:.2f}",
                _range(row["first_token_ms"]),
                f"{row['ratio']['first_token']:.2f}",
                "" if row["limit"] is None else f"{row['limit']['reached']:.0%}",
                "" if row["peak_mib"] is None else f"{row['peak_mib']['median']:.0f}",
                f"{row['size_bytes'] / 2**20:.0f}",
                f"{row['drift']['kl']:.1e}",
                f"{row['drift']['top1']:.1%}",
            ]
        )
    return str(common.table(head, rows))


def section() -> str:
    """Everything between the markers, from the results that are there."""
    parts = []
    for model, title in TITLES.items():
        file = common.RESULTS / f"performance_{model}.json"
        if not file.is_file():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        machine, budget = result["machine"], result["budget"]
        found = [
            f"{WORDS[one['model'] + ', ' + one['engine']]}: {_settings(one['settings'])}" for one in result["sweeps"]
        ]
        absent = [f"no {one['engine']} ({one['why']})" for one in result["missing"]]
        absent += [f"{one['label']} failed ({one['why']})" for one in result["failed"]]
        unmeasured = f" Not measured: {'; '.join(absent)}." if absent else ""
        parts.append(
            f"{title} ({machine['processor']}, {machine['cores']} cores, {', '.join(machine['flags'])}; memory read at"
            f" {machine['bandwidth_gb_s']['median']:.0f} GB/s; budget KL {budget['kl']}, top-1 {budget['top1']:.0%}):"
            f"\n\n{markdown(result)}\n\nSettings that the sweep chose: {'; '.join(found)}.{unmeasured}\n"
        )
    return "\n".join(parts)


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in settings.items()) or "its own settings"


def write_readme(path: Path) -> None:
    """Put the section between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    text = path.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path.name} has no markers {BEGIN.strip()} and {END.strip()}")
    path.write_text(f"{head}{BEGIN}\n{section()}\n{END}{tail}", encoding="utf-8")


def _range(figure: dict[str, Any]) -> str:
    return f"{figure['median']:.1f} [{figure['min']:.1f}-{figure['max']:.1f}]"


if __name__ == "__main__":
    main()
