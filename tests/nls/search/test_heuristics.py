"""Guesses from the training record, and the record's reader."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict

import pytest
from toy import GROUPS, SIZES, everything

from sparseport.errors import BadInput
from sparseport.nls.search import heuristics
from sparseport.nls.search.candidates import space_digest
from sparseport.nls.search.heuristics import Sample, lowest_loss, most_sampled, read_training_record

A, B, C = (32, 32, 64, 1), (24, 32, 64, 1), (16, 16, 16, 0)


def write(path, entries):
    lines = [{"space_sha256": space_digest(GROUPS)}, *entries]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_record_reads_back(tmp_path):
    dice = random.Random(0)
    samples = [Sample(dice.choice(everything()), dice.random()) for _ in range(50)]
    lines = [{"step": 2 * n, "sizes": list(s.candidate), "loss": s.loss} for n, s in enumerate(samples)]
    assert read_training_record(write(tmp_path / "record", lines), GROUPS) == samples
    # The order of the keys is the writer's; a loss may be a whole number.
    path = write(tmp_path / "other", [{"loss": 1, "sizes": list(A), "step": 7}])
    assert read_training_record(path, GROUPS) == [Sample(A, 1.0)]


HEADER = json.dumps({"space_sha256": space_digest(GROUPS)}).encode() + b"\n"
GOOD = b'{"step": 0, "sizes": [32, 32, 64, 1], "loss": 1.5}\n'


@pytest.mark.parametrize(
    ("second", "code"),
    [
        (b'{"step": 1, "sizes": [32, 32, 64, 1], "loss": 1.5}', "E_RECORD"),  # cut off within the line's end
        (b'{"step": 1, "sizes": [32, 32, 64, 1]', "E_RECORD"),
        (b'{"step": 1, "sizes": [32, 32, 64, 1]}\n', "E_RECORD"),
        (b'{"step": 1, "sizes": [32, 32, 64, 1], "loss": 1.5, "lr": 1}\n', "E_RECORD"),
        (b'{"step": 0, "sizes": [32, 32, 64, 1], "loss": 1.5}\n', "E_RECORD"),
        (b'{"step": 1.0, "sizes": [32, 32, 64, 1], "loss": 1.5}\n', "E_RECORD"),
        (b'{"step": true, "sizes": [32, 32, 64, 1], "loss": 1.5}\n', "E_RECORD"),
        (b'{"step": 1, "sizes": [32, 32, 64, 1], "loss": NaN}\n', "E_RECORD"),
        (b'{"step": 1, "sizes": [32, 32, 64, 1], "loss": 1e999}\n', "E_RECORD"),
        (b'{"step": 1, "sizes": [32, 32, 64, 1], "loss": "1"}\n', "E_RECORD"),
        (b'{"step": 1, "step": 2, "sizes": [32, 32, 64, 1], "loss": 1}\n', "E_RECORD"),
        (b"[]\n", "E_RECORD"),
        (b"\n", "E_RECORD"),
        (b"\xff\n", "E_RECORD"),
        (b'{"step": 1, "sizes": [31, 32, 64, 1], "loss": 1.5}\n', "E_ELASTIC"),
        (b'{"step": 1, "sizes": [32, 32, 64], "loss": 1.5}\n', "E_ELASTIC"),
        (b" " * 200 + GOOD, "E_LIMIT"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(tmp_path, monkeypatch, second, code):
    monkeypatch.setattr(heuristics, "_MAX_LINE", 200)
    path = tmp_path / "record"
    path.write_bytes(HEADER + GOOD + second)
    with pytest.raises(BadInput) as raised:
        read_training_record(path, GROUPS)
    assert raised.value.code == code and raised.value.where.startswith(f"{path}, line 3")


@pytest.mark.parametrize(
    "first",
    [
        b"",
        GOOD,
        HEADER.replace(b"space", b"other"),
        HEADER.replace(b"{", b'{"a": 1, '),
        b'{"space_sha256": "' + b"0" * 64 + b'"}\n',
        b'{"space_sha256": 7}\n',
    ],
)
def test_a_record_of_another_space_or_of_none_is_refused(tmp_path, first):
    path = tmp_path / "record"
    path.write_bytes(first + GOOD)
    with pytest.raises(BadInput, match="E_RECORD") as raised:
        read_training_record(path, GROUPS)
    assert raised.value.where.startswith(f"{path}, line 1")


def test_records_that_are_empty_missing_or_too_large_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "record"
    with pytest.raises(BadInput, match="E_MISSING"):
        read_training_record(path, GROUPS)
    path.touch()
    with pytest.raises(BadInput, match="the training record is empty"):
        read_training_record(path, GROUPS)
    path.write_bytes(HEADER + GOOD + GOOD.replace(b"0", b"1", 1))
    assert len(read_training_record(path, GROUPS)) == 2
    monkeypatch.setattr(heuristics, "_MAX_BYTES", len(HEADER + GOOD))
    with pytest.raises(BadInput, match="E_LIMIT"):
        read_training_record(path, GROUPS)


def test_lowest_loss_means_over_all_samples_of_a_candidate():
    record = [Sample(A, 1.0), Sample(A, 3.0), Sample(B, 1.9), Sample(C, 0.5)]
    assert lowest_loss(record, 5) == [C, B, A]
    assert lowest_loss(record, 2) == [C, B]
    assert lowest_loss(record, 5, minimum_samples=2) == [A]
    with pytest.raises(BadInput, match="expected 3 samples of one sub-network, found at most 2"):
        lowest_loss(record, 5, minimum_samples=3)


def test_ties_do_not_depend_on_the_order_of_the_record():
    record = [Sample(candidate, 1.0) for candidate in everything()]
    assert lowest_loss(record, 3) == lowest_loss(record[::-1], 3) == [A, (32, 32, 64, 0), (32, 32, 48, 1)]
    # 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floats; the means are.
    losses = [(A, 0.1), (A, 0.2), (A, 0.3), (B, 0.3), (B, 0.2), (B, 0.1)]
    assert lowest_loss([Sample(*loss) for loss in losses], 2) == [A, B]


def test_lowest_loss_against_a_second_implementation():
    dice = random.Random(1)
    record = [Sample(dice.choice(everything()), dice.random()) for _ in range(500)]
    losses = defaultdict(list)
    for sample in record:
        losses[sample.candidate].append(sample.loss)
    means = sorted((sum(v) / len(v), c) for c, v in losses.items() if len(v) >= 5)
    assert lowest_loss(record, 6, minimum_samples=5) == [c for _, c in means[:6]]


def test_most_sampled_goes_group_by_group_and_ties_give_the_larger_size():
    record = [Sample(c, 1.0) for c in (A, B, B, C, (16, 24, 16, 0), (32, 24, 48, 0))]
    # Group 0: twice each; group 1: 32 three times; group 2: 64 three times; group 3: three times each.
    assert most_sampled(record, SIZES) == (32, 32, 64, 1)
    dice = random.Random(2)
    record = [Sample(dice.choice(everything()), 1.0) for _ in range(301)]
    for number, size in enumerate(most_sampled(record, SIZES)):
        counts = Counter(sample.candidate[number] for sample in record)
        assert (counts[size], size) == max((count, s) for s, count in counts.items())
