"""Read a certificate and list every layer: the rule that made it, how it is stored, its sparsity. No runtime is needed.

python examples/read_certificate.py OUT_DIR/openvino
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparseport import Certificate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()

    certificate = Certificate.read(options.folder)  # raises if a single byte of it was changed
    print(f"{'layer':44} {'shape':>13} {'rule':15} {'rank':>4} {'stored':8} {'sparsity':>8}  digest")
    for name, facts in certificate.linears.items():
        shape = "x".join(str(length) for length in facts["shape"])
        pruned = f"{float(facts['sparsity']):8.2%}" if "sparsity" in facts else f"{'dense':>8}"
        digest = facts.get("compressed_sha256", facts["weight_sha256"])
        equal = facts["readback"][certificate.target] == digest
        print(
            f"{name:44} {shape:>13} {facts['rule']:15} {facts.get('rank', ''):>4} {facts['stored']:8} {pruned}  "
            f"{digest[:12]} {'read back equal' if equal else 'DIFFERENT ON DISK'}"
        )
    totals = certificate.totals
    print(
        f"{totals['linears']} layers, {totals['int4_linears']} in INT4; {totals['pruned']:,} of "
        f"{totals['masked_weights']:,} weights pruned, {totals['revived']} of those not zero"
    )
    for label, run in certificate.body["numerics"].items():
        if isinstance(run, dict) and "kl" in run:
            print(f"logits at {label}: KL {run['kl']}, top-1 agreement {run['top1']}")
    print(f"proof {certificate.proof()}")


if __name__ == "__main__":
    main()
