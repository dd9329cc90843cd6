"""May a folder pass whose logits were compared with the reference?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseport.child import Child
from sparseport.errors import FidelityError


def check_numerics(folder: Path, target: str, portable: bool = False, adapters: Sequence[str] = ()) -> dict[str, Any]:
    """Compare the folder's logits with the dequantised reference, in a process of its own; see `compare_logits`.

    Adapters in files are switched on and off in another one; see `verify.switched`.

    Raises:
        FidelityError: they differ by more than the tolerance at full precision, or are not finite.
    """
    with Child("sparseport.verify.numerics", {"folder": str(folder), "target": target, "portable": portable}) as child:
        result = child.result()
    judged = judge_numerics(result, folder.name)
    return judged | check_switched(folder, target, adapters) if adapters else judged


def check_switched(folder: Path, target: str, adapters: Sequence[str]) -> dict[str, Any]:
    """Let the folder's runtime switch adapters on and off, in a process of its own; see `verify.switched`.

    Raises:
        FidelityError: the results differ from torch's by more than the tolerance, or are not finite.
    """
    request = {"folder": str(folder), "target": target, "adapters": list(adapters)}
    with Child("sparseport.verify.switched", request) as child:
        return judge_numerics(child.result(), folder.name)


def judge_numerics(result: dict[str, Any], where: str) -> dict[str, Any]:
    """The comparison of logits as the certificate has it, if it may pass.

    Args:
        result: what `verify.numerics.compare_logits` found.
        where: name of the folder, for messages.

    Raises:
        FidelityError: the logits differ by more than the tolerance at full precision, or are not finite.
    """
    runs = {label: run for label, run in result.items() if isinstance(run, dict)}
    for label, run in runs.items():
        # Infinities and NaN at settings that applications use would be a broken model, whatever the weights are.
        if not all(math.isfinite(float(run[key])) for key in ("max_abs", "kl") if key in run):
            raise FidelityError(
                "logits are not finite",
                where=f"{where}, {label.replace('_', ' ')} settings",
                found=run["max_abs"],
                code="E_NUMERICS",
                fix="the model overflows in the runtime's precision: use a base in a wider range, or report this",
            )
    for label, run in runs.items():
        if "allowed" in run and not float(run["judged_max_abs"]) <= float(run["allowed"]):
            raise FidelityError(
                f"logits differ from the dequantised reference {_at(label)}",
                where=where,
                expected=f"max |difference| <= {run['allowed']}",
                found=f"{run['judged_max_abs']} against {run['judged_against']}",
                code="E_NUMERICS",
                fix="report this with the model's config; `--no-numerics` skips the check",
            )
    return {"run": True, **result}


def _at(label: str) -> str:
    """`at full precision`, `with adapter.safetensors`."""
    return label if label.startswith(("with ", "without ")) else f"at {label.replace('_', ' ')}"
