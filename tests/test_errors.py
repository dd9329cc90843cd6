"""Errors: one line with four parts, safe on a terminal, with the exit codes that scripts rely on."""

from __future__ import annotations

import json

import pytest

from sparseport import errors
from sparseport.errors import BadInput, SparseportError, printable

CODES = {
    "SparseportError": (70, "E_INTERNAL"),
    "UsageError": (2, "E_USAGE"),
    "BadInput": (3, "E_INPUT"),
    "FidelityError": (4, "E_FIDELITY"),
    "VerificationError": (5, "E_VERIFY"),
    "OutputExists": (6, "E_EXISTS"),
    "Unsupported": (7, "E_UNSUPPORTED"),
    "EnvironmentProblem": (8, "E_ENVIRONMENT"),
}


def test_every_kind_has_its_exit_code():
    kinds = {
        name: (kind.exit_code, kind("x").code)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, SparseportError)
    }
    assert kinds == CODES


def test_the_message_has_what_where_both_sides_and_a_way_out():
    error = BadInput("bad shape", where="a.bin, tensor w", expected=(1, 2), found=(2, 1), fix="save again", code="E_X")
    assert str(error) == "error[E_X]: bad shape; in a.bin, tensor w; expected (1, 2), found (2, 1); to fix: save again"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "error[E_INPUT]: odd"),
        ({"expected": 0}, "error[E_INPUT]: odd; expected 0"),
        ({"found": ""}, "error[E_INPUT]: odd; found "),
        ({"where": "f"}, "error[E_INPUT]: odd; in f"),
    ],
)
def test_parts_that_are_missing_leave_no_gap(parts, message):
    assert str(BadInput("odd", **parts)) == message


HOSTILE = "a\x1b[31mred\x07\r\nerror[E_FAKE]: \u202efoo\x9b\x00\udc80"
SAFE = r"a\x1b[31mred\x07\r\nerror[E_FAKE]: \u202efoo\x9b\x00\udc80"


def test_text_from_files_cannot_steer_a_terminal_or_add_lines():
    assert printable(HOSTILE) == SAFE
    assert printable("größer 漢 ✓ 'plain'") == "größer 漢 ✓ 'plain'"
    for part in ("where", "expected", "found", "fix"):
        line = str(BadInput("what", **{part: HOSTILE}))
        assert SAFE in line and line.isprintable()
    assert SAFE in str(BadInput(HOSTILE))


def test_plain_data_for_scripts():
    error = BadInput("what", where="f", found=3, fix="do")
    assert error.as_dict() == {
        "code": "E_INPUT",
        "exit_code": 3,
        "what": "what",
        "where": "f",
        "expected": None,
        "found": "3",
        "fix": "do",
    }
    text = json.dumps(BadInput(HOSTILE, where=HOSTILE, expected=HOSTILE, found=HOSTILE, fix=HOSTILE).as_dict())
    assert all(value == SAFE for key, value in json.loads(text).items() if key not in ("code", "exit_code"))
