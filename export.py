"""The door: `python export.py --target openvino --base DIR --adapter DIR --output DIR` is `sparseport export ...`."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from sparseport.cli import main
except ModuleNotFoundError:  # run from a checkout without installing
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
    from sparseport.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
