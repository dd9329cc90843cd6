"""Tasks of data sets: lm-evaluation-harness' texts, splits without a common question, and answers judged as it does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import BadInput, UsageError
from sparseport.nls.tasks import MultipleChoice, Task, load_task
from sparseport.nls.tasks.answers import cut, flexible, judge, last_number, strict
from sparseport.nls.tasks.choosing import CHOOSING
from sparseport.nls.tasks.data_sets import question_key, split_off_validation
from sparseport.nls.tasks.word_problems import WORD_PROBLEMS

ROWS = [{"question": f"Is it {n}?", "choices": ["yes", "no", "perhaps"], "gold": n % 3} for n in range(20)]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("arc_easy", "openbookqa"):
        _write(tmp_path / "mc" / f"{name}.train.jsonl", ROWS)
        _write(tmp_path / "mc" / f"{name}.test.jsonl", [{**ROWS[3], "question": " is  it 3? "}, ROWS[3]])
    return tmp_path


def test_contexts_and_continuations_are_those_of_the_harness(data: Path) -> None:
    arc, book = load_task("arc-easy", data), load_task("openbookqa", data)
    assert arc.choices["test"][1] == MultipleChoice("Question: Is it 3?\nAnswer:", ("yes", "no", "perhaps"), 0)
    assert arc.choices["test"][1].continuations == (" yes", " no", " perhaps")
    assert book.choices["test"][1].context == "Is it 3?"
    assert arc.by_choice and not load_task("home-commands").by_choice


def test_training_text_is_the_text_that_is_scored(data: Path) -> None:
    task = load_task("arc-easy", data)
    for split in ("train", "validation", "test"):
        for example, item in zip(getattr(task, split), task.choices[split], strict=True):
            assert (example.prompt, example.answer) == (item.context, item.continuations[item.gold])
            assert example.form == "continuation"


def test_no_question_is_on_two_sides(data: Path) -> None:
    """Question 3 stands in the test in another spelling, and its items are dropped from training and counted."""
    task = load_task("arc-easy", data)
    sides = [{item.context for item in task.choices[split]} for split in ("train", "validation", "test")]
    assert [len(side) for side in sides] == [16, 3, 2]
    assert not sides[0] & sides[1] and not any("it 3?" in context for context in sides[0] | sides[1])
    assert dict(task.left_out) == {"the test asks the same": 1}


SAME = [
    ("Tom has 9 balls . How many ?", "Tom has 9 balls. How many?"),
    ("He didn\u2019t pay $ 2.50 .", "He did n't pay $2.50"),
    ("There were 1,426 houses", "there were 1426 houses"),
    ("a 5-year-old boy", "A 5 year old boy"),
    ("2 + 3 = ?", "2+3=?"),
    ("?!", " ?! "),
]
OTHER = [
    ("It costs 1.5", "It costs 15"),
    ("2 + 3", "2 - 3"),
    ("sort 1 23", "sort 12 3"),
    ("1/2 of it", "12 of it"),
    ("?!", "!?"),
    ("\u0915\u093f", "\u0915\u0940"),
]


@pytest.mark.parametrize(("one", "other", "same"), [(*p, True) for p in SAME] + [(*p, False) for p in OTHER])
def test_spellings_of_one_question(one: str, other: str, same: bool) -> None:
    assert (question_key(one) == question_key(other)) == same


@pytest.mark.parametrize("name", ["mawps", "svamp", "math-data"])
def test_word_problems_share_no_question_in_another_spelling(name: str, tmp_path: Path) -> None:
    """Every question of the training file comes twice, as each of two collections spells it; the test has some."""
    spelt = [f"Ann has {n}.5 plums , and eats {{}} . How many are left ?" for n in range(30)]
    rows = [{"question": text.format(1), "answer": "2"} for text in spelt]
    rows += [{"question": text.format(1).replace(" ,", ",").replace(" .", ".").replace(" ?", "?"), "answer": "2"}
             for text in spelt]  # fmt: skip
    for file in ("mawps.train", "math_data"):
        _write(tmp_path / "math" / f"{file}.jsonl", rows)
    _write(tmp_path / "math" / "mawps.valid.jsonl", rows[-3:])
    for file in ("gsm8k.test", "mawps.test", "svamp.test"):
        _write(tmp_path / "math" / f"{file}.jsonl", [{**row, "question": row["question"].upper()} for row in rows[:5]])
    task = load_task(name, tmp_path)
    assert len(task.validation) >= 10 and len(task.train) >= 40
    _require_apart(task)
    assert dict(task.left_out)["the test asks the same"] == 10


def test_home_commands_share_no_sentence_in_another_spelling() -> None:
    _require_apart(load_task("home-commands"))


def _require_apart(task: Task) -> None:
    """No question on two sides, by another spelling rule than the one that made the splits."""
    sides = [{_bare(item.prompt) for item in split} for split in (task.train, task.validation, task.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9.]|(?<!\d)\.|\.(?!\d)", "", text.lower())


@given(st.lists(st.integers(0, 60), max_size=80), st.sets(st.integers(0, 60)))
def test_splits_hold_every_item_once(train: list[int], test: set[int]) -> None:
    kept, validation, dropped = split_off_validation(train, sorted(test), str)
    assert sorted([*kept, *validation]) == sorted(n for n in train if n not in test)
    assert not set(kept) & set(validation)
    assert dropped == sum(n in test for n in train)
    assert len(set(validation)) == len(set(train) - test) // 5
    again = split_off_validation(sorted(train), sorted(test), str)[1]
    assert again == validation, "the order of the file decides nothing"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "", "choices": ["a", "b"], "gold": 0},
        {"question": "q", "choices": ["a"], "gold": 0},
        {"question": "q", "choices": ["a", ""], "gold": 0},
        {"question": "q", "choices": ["a", "b"], "gold": 2},
        {"question": "q", "choices": ["a", "b"], "gold": True},
        {"question": "q", "choices": "ab", "gold": 0},
        {"choices": ["a", "b"], "gold": 0},
    ],
)
def test_bad_rows_are_named(data: Path, row: dict[str, Any]) -> None:
    _write(data / "mc" / "arc_easy.train.jsonl", [ROWS[0], row])
    with pytest.raises(BadInput, match=r"arc_easy\.train\.jsonl, line 2"):
        load_task("arc-easy", data)


def test_data_folder_is_asked_for_and_only_where_it_belongs(data: Path) -> None:
    with pytest.raises(UsageError, match="--data"):
        load_task("arc-easy")
    with pytest.raises(UsageError, match="arc-easy"):
        load_task("home-commands", data)
    with pytest.raises(BadInput, match=r"gsm8k\.test\.jsonl"):
        load_task("gsm8k", _with_train_only(data))


def _with_train_only(data: Path) -> Path:
    _write(data / "math" / "gsm8k.train.jsonl", [{"question": "q", "answer": "1\n#### 1"}])
    return data


def test_a_task_without_training_items_says_so(data: Path) -> None:
    _write(data / "mc" / "piqa.test.jsonl", ROWS)
    task = load_task("piqa", data)
    assert len(task.examples("test")) == 20
    with pytest.raises(UsageError, match="train"):
        task.examples("train")


def test_word_problems_end_in_their_number(tmp_path: Path) -> None:
    rows = [
        {"instruction": "One?", "output": "\nA: It is 3 - 2 = 1. The answer is 1.", "answer": "1.0"},
        {"instruction": "Wrong?", "output": "\nA: The answer is 5.", "answer": "6.0"},
        {"instruction": "Letter?", "output": "\nRationale: The answer is (D).", "answer": "D"},
        {"instruction": "Asked?", "output": "\nA: The answer is 7.", "answer": "7"},
    ]
    _write(tmp_path / "math" / "math_data.jsonl", rows)
    _write(tmp_path / "math" / "svamp.test.jsonl", [{"instruction": "asked?", "output": "nonsense 3", "answer": "7.0"}])
    task = load_task("svamp", tmp_path)
    assert [(item.prompt, item.answer, item.form) for item in task.train] == [
        ("Question: One?\nAnswer:", " It is 3 - 2 = 1. The answer is 1.", "text")
    ]
    assert task.test[0].answer == " 7"
    assert dict(task.left_out) == {
        "the test asks the same": 1,
        "the rationale ends in another number": 1,
        "the answer is no number": 1,
    }


TEXTS = [
    "She makes $18.\n#### 18",
    "#### 1,234.50 and then\n#### 5",
    "The answer is $1,234.",
    "it is 7",
    "no number",
    "",
    "-3 #### -3.",
    "about 3.5.",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("wanted", [" so\n#### 18", " x #### 1,234.5", " y\n#### -3", " z #### 7"])
def test_gsm8k_is_judged_as_the_harness_judges_it(text: str, wanted: str) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    ours = judge("gsm8k", [text], [wanted])
    for name, own, theirs in (
        ("strict_match", strict, RegexFilter(r"#### (\-?[0-9\.\,]+)")),
        ("flexible_extract", flexible, RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)),
    ):
        found = next(iter(theirs.apply([[text]], [{}])))[0]
        assert own(text) == found
        score = exact_match_hf_evaluate(
            [found], [wanted], regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"], ignore_case=True
        )
        assert ours[name] == (bool(score["exact_match"]),)


def test_numbers_and_texts() -> None:
    assert [last_number(text) for text in TEXTS] == [18.0, 5.0, 1234.0, 7.0, None, None, -3.0, 3.5]
    right = judge("number", ["it is 10.0", "11", "none", "9.9995"], ["10", "10", "10", "10"])["number_match"]
    assert right == (True, False, False, True)
    assert judge("exact", ["a", "b"], ["a", "a"]) == {"exact_match": (True, False)}
    assert cut(" 4 apples\nQuestion: x</s>", ("</s>", "Question:")) == "4 apples"


@pytest.mark.shared
def test_real_data_sets(shared_dir: Path) -> None:
    """Item counts of the published files, and what a training mixture shares with the tests."""
    folder = shared_dir / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets in {shared_dir}")
    sizes = {}
    for name in (*CHOOSING, *WORD_PROBLEMS):
        task = load_task(name, folder)
        sizes[name] = (len(task.train), len(task.validation), len(task.test))
        _require_apart(task)
    assert sizes["arc-easy"] == (1794, 449, 2376) and sizes["openbookqa"][2] == 500 and sizes["gsm8k"][2] == 1319
    assert load_task("svamp", folder).left_out["the test asks the same"] == 640
    assert load_task("math-data", folder).left_out["the test asks the same"] == 1417
