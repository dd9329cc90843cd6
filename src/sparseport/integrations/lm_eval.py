"""The items of a task as a task of lm-evaluation-harness 0.4, for its own runs of any model on the very same items.

    FOLDER/NAME.yaml      the task: what is asked, what may follow, acc and acc_norm
    FOLDER/items.jsonl    one object a line: context, choices, gold
    FOLDER/items.py       reads them, wherever the folder lies; nothing comes from a hub

`lm_eval --include_path FOLDER --tasks NAME` runs it. Format: the harness' task guide (`custom_dataset`).
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from sparseport.errors import Unsupported, UsageError
from sparseport.nls.tasks import Split, Task
from sparseport.publish import staged_output

_ITEMS = "items"
_READER = '''\
"""Reads the items beside this file."""

import json
from pathlib import Path

from datasets import Dataset


def read(**_):
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").split("\\n")
    return {"test": Dataset.from_list([json.loads(line) for line in lines if line])}
'''


def write_task(task: Task, folder: Path, split: Split = "test", limit: int | None = None) -> str:
    """Write a split of a task, or its first `limit` items, as a task folder.

    Args:
        task: from `load_task`; answered by choosing.
        folder: made here; appears whole or not at all.
        split: which of its splits.
        limit: only so many items; None takes all.

    Returns:
        The task's name: `sparseport_` and that of the task.

    Raises:
        Unsupported: its answers are written, which the harness judges by rules of its own.
        UsageError: the split is empty, or the limit below 1.
        OutputExists: the folder is there.
    """
    from sparseport.nls.scoring import digest_of  # loads torch

    if not task.by_choice:
        raise Unsupported(
            "only tasks of choices become tasks of lm-evaluation-harness",
            where=task.name,
            found="written answers",
            fix="take one of arc-easy, arc-challenge, openbookqa, piqa or siqa",
        )
    task.examples(split)  # refuses a split without items
    if limit is not None and limit < 1:
        raise UsageError("a limit is 1 or more", where="--limit", found=limit)
    items = task.choices[split][:limit]
    (delimiter,) = {item.delimiter for item in items}
    name = f"sparseport_{task.name.replace('-', '_')}"
    metrics = [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in ("acc", "acc_norm")]
    settings = {
        "task": name,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": delimiter,
        "metric_list": metrics,
        "metadata": {"version": 1.0, "split": split, "items": len(items), "items_sha256": digest_of(items)},
    }
    rows = [{"context": item.context, "choices": list(item.choices), "gold": item.gold} for item in items]
    with staged_output(folder) as stage:
        # The tag of a function is no YAML that a plain writer knows.
        text = yaml.safe_dump(settings, sort_keys=False) + f"custom_dataset: !function {_ITEMS}.read\n"
        (stage / f"{name}.yaml").write_text(text, encoding="utf-8")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (stage / f"{_ITEMS}.jsonl").write_text(lines, encoding="utf-8")
        (stage / f"{_ITEMS}.py").write_text(_READER, encoding="utf-8")
    return name
