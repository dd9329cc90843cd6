"""The comparison of ways from a fine-tuned model to a runtime, as `benchmarks/fidelity.py` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparseport.errors import BadInput
from sparseport.report.checked import Fields, read_fields

SHARES = ("codes", "zero_points", "scales", "revived", "embedding", "head")
OURS = "sparseport"


@dataclass(frozen=True)
class Way:
    """One way, read back from its files and compared with the merged model.

    name      as the file has it; `ours` if it is this package's
    changed   share of codes, zero_points, scales, pruned weights that are not zero (`revived`), embedding and head;
              those that were measured
    kl        of the logits at the settings that applications get, in nats; max_abs and top1 likewise
    kl_exact  with products in float32, where it was measured as well
    accuracy  on the task, 0 to 1, or None
    """

    name: str
    ours: bool
    changed: dict[str, float]
    kl: float
    max_abs: float
    top1: float
    kl_exact: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Naive:
    """One file: its name without folders, the machine, versions, items of the task, and the ways in its order."""

    name: str
    machine: dict[str, str]
    versions: dict[str, str]
    items: int | None
    ways: tuple[Way, ...]


def read_naive(path: Path) -> Naive:
    """Read and check a file.

    Raises:
        BadInput: it is missing, of another kind, or damaged.
    """
    data = read_fields(path, "comparison")
    if "rows" not in data.data or "machine" not in data.data:
        raise BadInput(
            "this is no comparison of ways",
            where=path,
            expected="machine and rows",
            found=", ".join(map(str, data.data))[:80] or "nothing",
            fix="make one with benchmarks/fidelity.py",
        )
    machine = data.part("machine")
    ways = tuple(_way(row) for row in data.parts("rows"))
    if not ways:
        raise BadInput("the comparison has no rows", where=path)
    shown = {key: str(machine.data[key]) for key in ("cpu", "cores", "python") if machine.has(key)}
    items = data.count("items") if data.has("items") else None
    return Naive(path.name, shown, machine.texts("versions"), items, ways)


def _way(row: Fields) -> Way:
    name = row.text("path")
    changed = {key: row.number(key) for key in SHARES if row.has(key)}
    if "codes" not in changed or any(share > 1 for share in changed.values()):
        raise BadInput("shares of changed values are from 0 to 1", where=row.where, found=repr(changed)[:120])
    exact = row.maybe("float32")
    return Way(
        name,
        name.startswith(OURS),
        changed,
        row.number("kl"),
        row.number("max_abs"),
        row.number("top1"),
        None if exact is None else exact.number("kl"),
        row.optional("accuracy"),
    )
