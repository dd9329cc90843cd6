"""Folders of one export held against each other: targets with targets, and each draft with its main network.

A draft has other weights than its main network on purpose. What makes the two a pair: they were cut out of one
super-network (the same input files, by SHA-256), and they read and write the same tokens. OpenVINO GenAI 2026.4 itself
compares only the length of one encoded sentence and three token ids.
"""

from __future__ import annotations

from pathlib import Path

from sparseport.checkpoints.json_files import read_json
from sparseport.errors import FidelityError, SparseportError
from sparseport.layout import DRAFTS, main_of
from sparseport.targets.tokenizer_files import TOKENIZER_FILES
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import Verdict, unequal_weights

# What makes tokens of text: the base's own files, and the vocabulary that OpenVINO's tokenizer took from them. The
# graphs around that number their operations differently from run to run.
_TOKENIZER = (*TOKENIZER_FILES, "openvino_tokenizer.bin", "openvino_detokenizer.bin")


def differences_between(verdicts: list[Verdict]) -> list[str]:
    """What is wrong between the folders of one export; a folder alone, a draft's too, has nothing to fit to."""
    if len(verdicts) < 2:
        return []
    drafts = [verdict for verdict in verdicts if verdict.folder.name in DRAFTS]
    mains = [verdict for verdict in verdicts if verdict.folder.name not in DRAFTS]
    differences = unequal_weights(mains) + [f"drafts: {one}" for one in unequal_weights(drafts)]
    if not drafts:
        return differences
    found = {verdict.folder: verdict.certificate for verdict in verdicts if verdict.certificate is not None}
    return differences + unpaired(found)


def unpaired(certificates: dict[Path, Certificate]) -> list[str]:
    """What keeps each draft from being the draft of the main network beside it.

    Args:
        certificates: of the folders of one export that have drafts.
    """
    differences = []
    for folder, certificate in certificates.items():
        name, drafts = folder.name, certificate.draft is not None
        if drafts != (name in DRAFTS):
            differences.append(f"{name}: the certificate is that of {'a draft' if drafts else 'a main network'}")
        elif drafts:
            main = folder.with_name(main_of(name))
            if main not in certificates:
                differences.append(f"{name}: there is no certified main network beside it")
            else:
                wrong = _apart(main, certificates[main], folder, certificate)
                differences += [f"{name}: {difference}" for difference in wrong]
    return differences


def require_paired(certificates: dict[Path, Certificate]) -> None:
    """Refuse folders that are no pairs.

    Raises:
        FidelityError: lists the differences.
    """
    if differences := unpaired(certificates):
        raise FidelityError(
            "draft and main network are no pair",
            found="; ".join(differences),
            code="E_PAIRING",
            fix="export both again",
        )


def _apart(main: Path, one: Certificate, draft: Path, other: Certificate) -> list[str]:
    """Where a draft and a main network do not belong together."""
    differences = []
    if one.target != other.target:
        differences.append(f"it is for {other.target}, and the main network for {one.target}")
    stated = (other.draft or {}).get("super_network_sha256")
    if stated != other.super_network_sha256():
        differences.append("the certificate names another super-network than its own inputs")
    ours, theirs = one.super_network, other.super_network
    roles = [role for role in sorted({*ours, *theirs}) if ours.get(role) != theirs.get(role)]
    if roles:
        differences.append(f"it comes from another super-network than the main network ({', '.join(roles)} differ)")
    sizes = [_vocabulary(folder) for folder in (main, draft)]
    if sizes[0] != sizes[1]:
        differences.append(f"it knows {sizes[1]} tokens, and the main network {sizes[0]}")
    tokenizers = [_tokenizer(certificate) for certificate in (one, other)]
    names = [name for name in sorted({*tokenizers[0], *tokenizers[1]}) if len({t.get(name) for t in tokenizers}) > 1]
    if names:
        differences.append(f"its tokenizer is another one ({', '.join(names)})")
    return differences


def _tokenizer(certificate: Certificate) -> dict[str, str]:
    """File name -> SHA-256 of what makes tokens of text."""
    return {name: facts["sha256"] for name, facts in certificate.files.items() if name in _TOKENIZER}


def _vocabulary(folder: Path) -> object:
    """Rows of the embedding as config.json says; None if it cannot be read, which is a difference of its own."""
    try:
        return read_json(folder / "config.json", what="model config").get("vocab_size")
    except (OSError, SparseportError):
        return None
