"""Prune with an importance metric of your own, here RIA (Zhang et al., ICLR 2024), instead of Wanda's.

    python examples/custom_metric.py --base DENSE_DIR --output SPARSE_DIR --sparsity 0.5

The same as a command: PYTHONPATH=examples sparseport sparsify --metric custom_metric:relative_importance
--base DENSE_DIR --output SPARSE_DIR. Needs `pip install 'sparseport[train]'`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparseport.cli import main as sparseport


def relative_importance(weight: Any, input_sq_norms: Any, module: str) -> Any:
    """The smallest are pruned, in each output row; 2:4 and 4:8 take the smallest of each group of columns.

    weight          torch float32 [out, in], a copy
    input_sq_norms  torch float32 [in]: squared norms of the inputs that calibration saw
    module          `model.layers.0.mlp.down_proj`, to treat layers differently
    """
    size = weight.abs()
    relative = size / size.sum(dim=0, keepdim=True) + size / size.sum(dim=1, keepdim=True)
    return relative * input_sq_norms.sqrt() ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--output", required=True)
    options, more = parser.parse_known_args()  # whatever else `sparseport sparsify` takes

    # The metric is imported by its name, so that a recipe file can name it too; this file's folder is on the path.
    metric = f"{Path(__file__).stem}:{relative_importance.__name__}"
    return sparseport(["sparsify", "--base", options.base, "--output", options.output, "--metric", metric, *more])


if __name__ == "__main__":
    sys.exit(main())
