"""Every failure a user can meet, with its exit code and its way out.

A message always has the same four parts: what is wrong, where (file, tensor, index), what was expected against what
was found, and what to do. `str(error)` gives them on one line; the command line prints that line and nothing else.
"""

from __future__ import annotations


class SparseportError(Exception):
    """Base of all errors that sparseport raises on purpose.

    `code` is a short stable name (`E_...`) that scripts may match on; `exit_code` is the process exit status.
    """

    exit_code = 70
    default_code = "E_INTERNAL"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.fix = fix
        self.code = code or self.default_code

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"in {self.where}")
        if self.expected is not None or self.found is not None:
            sides = []
            if self.expected is not None:
                sides.append(f"expected {self.expected}")
            if self.found is not None:
                sides.append(f"found {self.found}")
            parts.append(", ".join(sides))
        if self.fix:
            parts.append(f"to fix: {self.fix}")
        return printable(f"error[{self.code}]: " + "; ".join(parts))

    def as_dict(self) -> dict[str, object]:
        """The error as plain data, for `--json` output."""
        return {
            "code": self.code,
            "exit_code": self.exit_code,
            "what": printable(self.what),
            "where": self.where and printable(self.where),
            "expected": self.expected and printable(self.expected),
            "found": self.found and printable(self.found),
            "fix": self.fix and printable(self.fix),
        }


class UsageError(SparseportError):
    """The command line or the recipe asks for something that does not fit together."""

    exit_code = 2
    default_code = "E_USAGE"


class BadInput(SparseportError):
    """An input file is damaged, contradicts itself, or does not belong with the others."""

    exit_code = 3
    default_code = "E_INPUT"


class FidelityError(SparseportError):
    """What was written, or would be written, is not what the inputs say. Nothing was published."""

    exit_code = 4
    default_code = "E_FIDELITY"


class VerificationError(SparseportError):
    """An exported folder no longer matches its certificate."""

    exit_code = 5
    default_code = "E_VERIFY"


class OutputExists(SparseportError):
    """The output is there already, or another export holds it."""

    exit_code = 6
    default_code = "E_EXISTS"


class Unsupported(SparseportError):
    """The input is well formed, but sparseport does not carry it exactly, so it refuses."""

    exit_code = 7
    default_code = "E_UNSUPPORTED"


class EnvironmentProblem(SparseportError):
    """Disk, memory, permission, device or package versions stand in the way."""

    exit_code = 8
    default_code = "E_ENVIRONMENT"


def printable(text: str) -> str:
    """Text from a file, made safe for a terminal and for one line: control characters become their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
