"""Turn a torch pickle into a safetensors file, in a process of its own and without running what the pickle says.

Only for `--allow-pickle`: torch reads it with `weights_only=True`, and there is no fallback.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sparseport.checkpoints.paths import open_regular
from sparseport.errors import BadInput

_CHILD = """
import sys
import torch
from safetensors.torch import save_file
tensors = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
if not isinstance(tensors, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in tensors.items()):
    sys.exit("the pickle is not a plain mapping of names to tensors")
save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, sys.argv[2], metadata={"format": "pt"})
"""
_SECONDS = 3600


def convert_pickle(source: Path, target: Path) -> None:
    """Write the tensors of a torch pickle as safetensors.

    Memory in the child process is twice the file; the file's own bytes are never trusted.

    Raises:
        BadInput: E_PICKLE, when torch refuses the file or it is no mapping of names to tensors.
    """
    with open_regular(source):
        pass
    command = [sys.executable, "-I", "-c", _CHILD, str(source.absolute()), str(target.absolute())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BadInput(
            "pickle could not be read as plain tensors",
            where=source,
            found=lines[-1][:300],
            fix="convert it to safetensors in an environment you trust",
            code="E_PICKLE",
        )
