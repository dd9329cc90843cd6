"""Merge one QA-SparsePEFT layer by hand and compare its digest with the certificate: what an export does, in ten lines.

    python examples/merge_one_layer.py --base INT4_DIR --sparse-base SPARSE_DIR --adapter ADAPTER_DIR \
        --export OUT_DIR/openvino --layer model.layers.0.self_attn.q_proj

Needs numpy only: neither torch nor a runtime.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparseport import Certificate
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.merge.qa_sparse_peft import merge_qa_sparse_peft
from sparseport.weights.digest import digest, mask_digest
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import mask_of, revived
from sparseport.weights.rounding import RoundingRule


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "sparse-base", "adapter", "export"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--layer", default="model.layers.0.self_attn.q_proj")
    options = parser.parse_args()
    layer = options.layer
    certified = Certificate.read(options.export).linears[layer]

    with ModelFolder.open(options.base) as base, ModelFolder.open(options.sparse_base) as sparse:
        frozen = open_linears(base).read(layer)  # codes uint8 [out, in], scales and zero-points [out, groups]
        assert isinstance(frozen, QuantizedWeight), "the base is not INT4"
        values = sparse.read(f"{layer}.weight")  # [out, in]
        mask = mask_of(values)
        with AdapterFolder.open(options.adapter) as adapter:
            branch = adapter.branch(layer).at_rank(certified["rank"])  # leading ranks; the scaling stays alpha / r_max
            # codes = clamp(round(W / scales) + zero_points), W = sparse + scaling * (B A) * mask
            rule = RoundingRule(certified["rounding"])
            merged = merge_qa_sparse_peft(DenseWeight(values, mask), frozen, branch, layer, rule)

    changed = int((merged.codes != frozen.codes).sum())
    print(f"{layer}: {changed:,} of {merged.codes.size:,} codes moved, {revived(merged, mask)} pruned ones revived")
    equal = digest(merged) == certified["weight_sha256"] and mask_digest(mask) == certified["mask_sha256"]
    print("equal to the certificate" if equal else "NOT what was exported", digest(merged))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
