"""Keep the libraries below us off the network: no hub look-ups, no telemetry."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

_HUB = "HF_HUB_OFFLINE"
_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
# What huggingface_hub takes for yes.
_YES = {"1", "ON", "YES", "TRUE"}
_set_here: set[str] = set()


def go_offline() -> set[str]:
    """Switch off hub access and telemetry for this process and its children; call before those libraries load.

    OpenVINO's converters and NNCF send usage events through the package `openvino_telemetry`. Marked as absent, both
    fall back to stubs of their own; their documented opt-out is a file in the user's home, which is not ours to write.

    Returns:
        The variables that were set now, for `take_back`.
    """
    return go_quiet() | _switch({_HUB: "1", _BARS: "1"})


def go_quiet() -> set[str]:
    """Switch off telemetry alone: for the one step that may reach a hub, because it was asked to."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return _switch(quiet)


def _switch(values: dict[str, str]) -> set[str]:
    """Set the variables that the user has not set; returns their names."""
    missing = {name for name in values if name not in os.environ}
    os.environ.update({name: values[name] for name in missing})
    _set_here.update(missing)
    return missing


def take_back(switched: Iterable[str]) -> None:
    """Undo `go_offline` for the variables that it set."""
    for name in switched:
        os.environ.pop(name, None)
        _set_here.discard(name)


def online_environment(bars: bool = False) -> dict[str, str]:
    """The environment for a child process that may reach a hub: as it is, without the switch that we set ourselves.

    With `bars`, huggingface_hub also shows its progress bars, unless the user switched them off.
    """
    ours = {_HUB, _BARS} & _set_here if bars else {_HUB} & _set_here
    return {name: value for name, value in os.environ.items() if name not in ours}


def is_offline(environment: dict[str, str]) -> bool:
    """Whether an environment keeps huggingface_hub off the network, by its own rule."""
    return (environment.get(_HUB) or environment.get("TRANSFORMERS_OFFLINE") or "").upper() in _YES


def set_here() -> frozenset[str]:
    """Variables that this module set: they say nothing about what the user chose."""
    return frozenset(_set_here)
