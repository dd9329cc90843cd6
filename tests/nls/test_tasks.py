"""Tasks: splits that share nothing, the same items everywhere, and readable errors for task files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sparseport.errors import BadInput
from sparseport.nls.tasks import load_task


def test_home_commands_splits_share_no_sentence() -> None:
    task = load_task("home-commands")
    prompts = [{item.prompt for item in split} for split in (task.train, task.validation, task.test)]
    assert [len(split) for split in (task.train, task.validation, task.test)] == [960, 64, 200]
    assert all(len(a) == n for a, n in zip(prompts, (960, 64, 200), strict=True))
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_home_commands_never_drifts() -> None:
    task = load_task("home-commands")
    text = "\n".join(
        f"{item.prompt}\t{item.answer}" for split in (task.train, task.validation, task.test) for item in split
    )
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "6dd4ab9b0f6d9059d7b5107788f766a68c7c519d17e28bc8202983ac883becd2"
    )


def test_every_action_is_tested() -> None:
    kinds = {item.answer.split()[0] for item in load_task("home-commands").test}
    assert kinds == {"light", "heat", "blind", "fan", "music", "door"}


def test_task_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": s, "answer": "x", "split": s}) for s in ("train", "validation", "test"))
    )
    assert load_task(str(path)).test[0].prompt == "test"


def test_a_task_file_measures_nothing_that_it_trains(tmp_path: Path) -> None:
    """Questions of test leave validation and train, those of validation leave train, and all are counted."""
    rows = [
        *(("train", text) for text in ("Say one.", "say two", "Say three", "say four")),
        *(("validation", text) for text in ("Say two!", "Say three?")),
        *(("test", text) for text in ("say three", "SAY ONE")),
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "answer": "x", "split": split}) for split, text in rows))
    task = load_task(str(path))
    kept = [[item.prompt for item in split] for split in (task.train, task.validation, task.test)]
    assert kept == [["say four"], ["Say two!"], ["say three", "SAY ONE"]]
    assert dict(task.left_out) == {"the test asks the same": 1, "validation or test asks the same": 3}
    path.write_text(path.read_text().replace("say four", "say three"))
    with pytest.raises(BadInput, match="every question of train"):
        load_task(str(path))


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', '{"prompt": "a", "answer": "b", "split": "dev"}'])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answer": "b", "split": "train"}\n' + line)
    with pytest.raises(BadInput, match="line 2"):
        load_task(str(path))


def test_empty_split_and_unknown_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answer": "b", "split": "train"}')
    with pytest.raises(BadInput, match="empty"):
        load_task(str(path))
    with pytest.raises(BadInput, match="no such task"):
        load_task("nothing")
