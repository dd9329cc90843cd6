"""Whether the libraries below us would send usage data when somebody else starts them; sparseport keeps them silent."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_YES = {"1", "ON", "YES", "TRUE"}


def telemetry(versions: Mapping[str, str], environment: Mapping[str, str], home: Path) -> dict[str, Any]:
    """The state of each library that sends usage data, as they are when used outside sparseport.

    OpenVINO's converters and NNCF send unless a file in the user's home declines; they also stay silent where the
    variable CI is `true`. huggingface_hub sends unless one of three variables is set.

    Args:
        versions: installed distributions by canonical name.
        environment: variables as the user set them.
        home: the user's home.
    """
    found: dict[str, Any] = {"sparseport": "sends nothing, and keeps the libraries below silent in its own processes"}
    if "openvino-telemetry" in versions:
        file = _consent_file(environment, home)
        consent = _first_line(file)
        if environment.get("CI", "").lower() == "true":
            state = "silent (CI=true)"
        elif consent == "0":
            state = "silent (declined)"
        elif consent == "1":
            state = "sends (accepted)"
        elif consent is None:
            state = "sends (nobody declined); `opt_in_out --opt_out` declines"
        else:
            state = "silent (its file holds neither 0 nor 1)"
        found["openvino"] = state
    if "huggingface-hub" in versions:
        names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
        told = next((name for name in names if environment.get(name, "").upper() in _YES), None)
        found["huggingface_hub"] = f"silent ({told})" if told else "sends; HF_HUB_DISABLE_TELEMETRY=1 declines"
    return found


def _consent_file(environment: Mapping[str, str], home: Path) -> Path:
    if sys.platform == "win32":
        return Path(environment.get("LOCALAPPDATA", home)) / "Intel Corporation" / "openvino_telemetry"
    return home / "intel" / "openvino_telemetry"


def _first_line(file: Path) -> str | None:
    if not os.path.lexists(file):
        return None
    try:
        return (file.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[0].strip()
    except OSError:
        return ""
