"""The switches that keep libraries off the network, and the one child process that may go online."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseport import offline
from sparseport.offline import go_offline, is_offline, online_environment, set_here, take_back

NAMES = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_VERBOSITY")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_set_here", set())
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    for name in (*NAMES, "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what is set below
        monkeypatch.delenv(name)


def test_what_we_set_is_ours_and_is_taken_back() -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    switched = go_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert set_here() == switched == {*NAMES[:3], "TOKENIZERS_PARALLELISM"}
    assert go_offline() == set() and set_here() == switched
    take_back(switched)
    assert not {*os.environ} & switched and set_here() == set()


def test_only_our_own_switch_is_opened() -> None:
    go_offline()
    open_, with_bars = online_environment(), online_environment(bars=True)
    assert "HF_HUB_OFFLINE" not in open_ and open_["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in with_bars and with_bars["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "1" and not is_offline(open_)


def test_the_users_own_switch_stays() -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    go_offline()
    environment = online_environment(bars=True)
    assert is_offline(environment) and environment["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "0"},
        {"HF_HUB_OFFLINE": "on"},
        {"TRANSFORMERS_OFFLINE": "YES"},
        {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "1"},
    ],
)
def test_offline_is_what_huggingface_hub_takes_for_it(environment: dict[str, str]) -> None:
    """Its constant is computed by its own code, from the file alone: importing the package takes long."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    file = Path(huggingface_hub.__file__).with_name("constants.py")
    code = f"import runpy; print(runpy.run_path({str(file)!r})['HF_HUB_OFFLINE'])"
    keep = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "SYSTEMROOT")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], env={**keep, **environment}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(is_offline(environment)), done.stderr
