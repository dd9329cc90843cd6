"""Put the model card into a written folder: a file like the others, with its place in the certificate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.readme import FILE_NAME
from sparseport.model_card.facts import model_facts
from sparseport.model_card.text import Measured, model_card
from sparseport.verify.certificate import Certificate, file_facts


def with_card(
    certificate: Certificate, folder: Path, measured: Sequence[Measured] = (), *, logits: bool = False
) -> Certificate:
    """Write README.md into a folder and return the certificate that knows it.

    Args:
        certificate: of the folder, not written yet.
        folder: the folder; a README.md in it is replaced, and where it is a link, what it leads to is left alone.
        measured, logits: see `model_card`.

    Raises:
        VerificationError: the certificate contradicts itself; see `model_facts`.
    """
    config = read_json(folder / "config.json", what="config.json")
    text = model_card(model_facts(certificate, config), measured, logits=logits)
    path = folder / FILE_NAME
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return Certificate({**certificate.body, "files": {**certificate.files, FILE_NAME: file_facts(path)}})
