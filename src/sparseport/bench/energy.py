"""Energy of the whole processor package, where Linux shows it (RAPL, `/sys/class/powercap`).

Kernels since 5.10 let only root read it, because of side channels; a virtual machine most often has none.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/class/powercap")


def read(root: Path = _ROOT) -> dict[str, tuple[int, int]] | None:
    """Per package, its counter in microjoules and where that begins anew; None if the machine does not tell."""
    found = {}
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
        if zone.name.count(":") != 1:
            continue  # a part of a package, which counts it already
        try:
            counter, limit = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            return None
        found[zone.name] = (counter, limit)
    return found or None


def between(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> float:
    """Joules between two readings, which must be less than one turn of the counter apart."""
    total = 0
    for zone, (start, limit) in before.items():
        spent = after[zone][0] - start
        total += spent if spent >= 0 else spent + limit
    return total / 1e6
