"""How much faster a physically smaller sub-network is: the random 1.1B Llama of large_model.py, whole and cut.

    python benchmarks/sub_networks.py --scratch DIR

Weights are random (speed does not depend on them). INT4 with groups of 64, and float16; whole, LoNAS' heuristic (75 %
of every MLP), its smallest (50 %), another width in every layer, half of the key-value heads, and a quarter of the
blocks left out. Folders of one precision and runtime are measured in turns, so that ratios are side by side. Needs 20
GB of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import common
from large_model import INNER, KV_HEADS, LAYERS
from large_model import _write as write_model

from sparseport.offline import go_offline

go_offline()

from sparseport.checkpoints.elastic import ElasticGroup, write_own_space  # noqa: E402
from sparseport.nls.cost import architecture_of, macs, parameters  # noqa: E402
from sparseport.nls.latency import measure_latency  # noqa: E402
from sparseport.pipeline import export  # noqa: E402
from sparseport.recipe import make_recipe  # noqa: E402
from sparseport.sources import open_sources  # noqa: E402

WIDTHS = [INNER * share // 8 for share in (8, 7, 6, 5, 4)]
HEADS = list(range(KV_HEADS, 0, -1))
PROMPT = 64


def candidates() -> dict[str, list[int]]:
    """Label -> a size for each group: widths, heads and block of every layer."""

    def every(width: int, heads: int = KV_HEADS, left_out: tuple[int, ...] = ()) -> list[int]:
        return [size for layer in range(LAYERS) for size in (width, heads, int(layer not in left_out))]

    mixed = [size for layer in range(LAYERS) for size in (WIDTHS[layer % len(WIDTHS)], KV_HEADS, 1)]
    return {
        "whole": every(INNER),
        "heuristic: 75 % of each MLP": every(WIDTHS[2]),
        "another width in each layer, 75 % on average": mixed,
        "minimal: 50 % of each MLP": every(WIDTHS[4]),
        "half of the heads": every(INNER, KV_HEADS // 2),
        "16 of 22 blocks": every(INNER, left_out=tuple(range(8, 20, 2))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for everything it makes; kept")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    machine = common.machine()
    dense, int4 = options.scratch / "float16", options.scratch / "int4"
    if not (int4 / "config.json").is_file():
        write_model(dense, int4)
    space = options.scratch / "space.json"
    write_own_space(space, groups())
    rows: list[dict[str, Any]] = []
    for precision, base in (("INT4 g64", int4), ("float16", dense)):
        for target in ("openvino", "onnx"):
            if (precision, target) == ("float16", "onnx"):
                continue  # computed in float32 there; the INT4 rows show the same ratios
            rows += measured(precision, target, base, space, options.scratch, options.rounds)
            common.save("sub_networks", {"machine": machine, "prompt": PROMPT, "rows": rows})
            print(markdown(rows))


def groups() -> list[ElasticGroup]:
    """Every layer's MLP, heads and the layer itself."""
    found = []
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        found.append(ElasticGroup((f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"), tuple(WIDTHS), "width"))
        found.append(ElasticGroup((f"{block}.self_attn",), tuple(HEADS), "heads"))
        found.append(ElasticGroup((block,), (1, 0), "block"))
    return found


def measured(precision: str, target: str, base: Path, space: Path, scratch: Path, rounds: int) -> list[dict[str, Any]]:
    rows, folders = [], []
    for number, (label, sizes) in enumerate(candidates().items()):
        chosen = scratch / f"sizes-{number}.json"
        chosen.write_text(json.dumps(sizes), encoding="utf-8")
        folder = scratch / f"{base.name}-{target}-{number}"
        fields = {"base": base, "search_space": space, "sub_adapter": str(chosen), "output": folder, "overwrite": True}
        more = {"onnx": {"accuracy": "fast"}} if target == "onnx" else {}
        recipe = make_recipe({**fields, **more, "target": [target], "tokenizer": False, "numerics": False})
        export(recipe)
        with open_sources(recipe) as sources:
            shapes = architecture_of(sources.base)
            shapes = shapes if sources.cut is None else shapes.cut(sources.cut)
        size = sum(path.stat().st_size for path in folder.iterdir())
        rows.append(
            {
                "precision": precision,
                "target": target,
                "label": label,
                "parameters": parameters(shapes),
                "macs": macs(shapes, PROMPT, predicted=1).total,
                "mib": size / 2**20,
            }
        )
        folders.append(folder)
        print(label, target, file=sys.stderr, flush=True)
    found = measure_latency(folders, prompts=(PROMPT,), decode_tokens=24, rounds=rounds)["folders"]
    for row, one in zip(rows, found, strict=True):
        row |= {key: one[key][str(PROMPT)] for key in ("prefill_ms", "decode_ms")}
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table; speed-ups are medians of ratios to the whole model, round by round."""
    head = [
        "model",
        "sub-network",
        "parameters",
        "MACs",
        "MiB",
        "decode (ms)",
        "speed-up",
        "prefill 64 (ms)",
        "speed-up",
    ]
    whole = {(row["precision"], row["target"]): row for row in rows if row["label"] == "whole"}
    lines = []
    for row in rows:
        full = whole[row["precision"], row["target"]]
        lines.append(
            [
                f"{row['precision']}, {row['target']}",
                row["label"],
                f"{row['parameters'] / 1e6:.0f} M",
                f"{row['macs'] / full['macs']:.0%}",
                f"{row['mib']:.0f}",
                f"{row['decode_ms']['median']:.1f}",
                f"{1 / row['decode_ms']['ratio']:.2f}x",
                f"{row['prefill_ms']['median']:.0f}",
                f"{1 / row['prefill_ms']['ratio']:.2f}x",
            ]
        )
    return common.table(head, lines)


if __name__ == "__main__":
    main()
