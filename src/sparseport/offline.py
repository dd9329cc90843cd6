"""Keep the libraries below us off the network: no hub look-ups, no telemetry."""

from __future__ import annotations

import os
import sys


def go_offline() -> None:
    """Switch off hub access and telemetry for this process and its children; call before those libraries load.

    OpenVINO's converters and NNCF send usage events through the package `openvino_telemetry`. Marked as absent, both
    fall back to stubs of their own; their documented opt-out is a file in the user's home, which is not ours to write.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
