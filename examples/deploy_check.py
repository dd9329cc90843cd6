"""A step of a deployment that lets no changed bit through: verify folders, report as JSON, exit with a status.

    python examples/deploy_check.py out/openvino out/onnx
    python examples/deploy_check.py out/openvino --proof PROOF_SHA256

Status 0: every folder is as it was certified. 5: one is not. Others: see docs/errors.md. A certificate is no signature,
so whoever may change a folder may seal it anew: `--proof` is the `proof_sha256` that you noted when you exported.
"""

from __future__ import annotations

import argparse
import json
import sys

from sparseport import SparseportError, verify_export
from sparseport.errors import VerificationError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--proof", help="proof_sha256 that the first folder's certificate has to have")
    options = parser.parse_args()

    status = 0
    for number, folder in enumerate(options.folders):
        try:
            verdict = verify_export(folder)  # every file by SHA-256, every weight by the digest of its values
        except SparseportError as error:  # no certificate, a damaged one, or a package is missing
            print(json.dumps({"folder": folder, "ok": False, "error": error.as_dict()}))
            status = status or error.exit_code
            continue
        differences = list(verdict.differences)
        if number == 0 and options.proof and verdict.certificate and verdict.certificate.proof() != options.proof:
            differences.append("sparseport.json: not the proof that was expected")
        print(json.dumps({"folder": folder, "ok": not differences, "differences": differences}))
        if differences:
            status = status or VerificationError.exit_code
    return status


if __name__ == "__main__":
    sys.exit(main())
