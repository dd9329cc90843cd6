"""Which exported folder is talked to and with which adapter, after a quick look at its certificate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.layers import longest_stated
from sparseport.errors import BadInput, UsageError, VerificationError
from sparseport.nls.adapters import NONE, active_adapter
from sparseport.verify.certificate import Certificate, exported_folders


@dataclass(frozen=True)
class ChatFolder:
    """An exported folder of one target.

    adapter  file of the adapter that is switched on; None for the base alone, and where there is none
    """

    path: Path
    certificate: Certificate
    adapter: str | None

    @property
    def target(self) -> str:
        """The runtime that it was exported for."""
        return self.certificate.target


def open_folder(path: Path, target: str | None = None, adapter: str | None = None) -> ChatFolder:
    """Find the folder to talk to, and hold its files against its certificate by their names and sizes.

    Args:
        path: an exported folder, or one with the folders of several targets in it. Drafts beside main networks are
            not talked to.
        target: which of them; None takes OpenVINO's if there are several.
        adapter: an adapter in the folder, by its file's name with or without suffix, or `none`. None: the only one.

    Raises:
        UsageError: there is no such folder, target or adapter, or several adapters and none was chosen.
        VerificationError: there is no certificate, it was changed, or a file is missing or of another size.
    """
    if not path.is_dir():
        raise UsageError("no such folder", where=path, expected="a folder that sparseport exported")
    found = {folder: Certificate.read(folder) for folder in exported_folders(path)}
    drafts = [folder for folder, certificate in found.items() if certificate.draft is not None]
    if len(found) > len(drafts):
        found = {folder: certificate for folder, certificate in found.items() if folder not in drafts}
    by_target = {certificate.target: folder for folder, certificate in found.items()}
    chosen = by_target.get(target) if target else by_target.get("openvino", next(iter(found)))
    if chosen is None:
        raise UsageError(
            "the folder has no such target", where=path, expected=", ".join(sorted(by_target)), found=target
        )
    certificate = found[chosen]
    check_sizes(chosen, certificate)
    return ChatFolder(chosen, certificate, active_adapter(chosen, _file_of(certificate, adapter)))


def check_sizes(folder: Path, certificate: Certificate) -> None:
    """The quick check: every certified file is there and has its size. Changed content is found by `verify` alone.

    Raises:
        VerificationError: names the first file that is not.
    """
    for name, facts in sorted(certificate.files.items()):
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["size"]:
            raise VerificationError(
                "a file of the folder is not as it was certified",
                where=file,
                expected=f"{facts['size']} bytes",
                found="no file" if size is None else f"{size} bytes",
                fix="copy the folder again from its source, or export it again",
            )


def context_length(folder: ChatFolder) -> int | None:
    """Tokens of a conversation that the model reads at most, by its config; None if that does not say."""
    if folder.target == "onnx":
        length = read_json(folder.path / "genai_config.json", what="genai_config.json")["model"].get("context_length")
        return length if isinstance(length, int) else None
    return longest_stated(read_json(folder.path / "config.json", what="config.json"))


def require_tokenizer(folder: ChatFolder) -> None:
    """Refuse a folder that was exported without its tokenizer.

    Raises:
        BadInput: E_TOKENIZER.
    """
    name = "openvino_tokenizer.xml" if folder.target == "openvino" else "tokenizer.json"
    if not (folder.path / name).is_file():
        raise BadInput(
            "the folder has no tokenizer",
            where=folder.path / name,
            code="E_TOKENIZER",
            fix="export it again without --no-tokenizer",
        )


def _file_of(certificate: Certificate, wanted: str | None) -> str | None:
    """The file of an adapter that was named without its suffix; anything else as it is."""
    if wanted is None or wanted == NONE:
        return wanted
    return next((file for file in certificate.adapters if wanted in (file, Path(file).stem)), wanted)
