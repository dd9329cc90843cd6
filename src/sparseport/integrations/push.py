"""An exported folder goes to a hub: proven first, as one commit, and compared with its certificate once it is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparseport.child import Child
from sparseport.errors import BadInput, EnvironmentProblem, UsageError, VerificationError
from sparseport.extras import missing
from sparseport.offline import is_offline, online_environment
from sparseport.progress import Progress
from sparseport.verify.certificate import FILE_NAME, Certificate, exported_folders, file_facts
from sparseport.verify.folder import Verdict, require_all, strangers, verify
from sparseport.verify.pairs import differences_between

# What huggingface_hub and the hub allow, as far as it can be told without them.
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]{1,96}", re.ASCII)
_FORBIDDEN = ("--", "..")


@dataclass(frozen=True)
class HubFile:
    """A file to push.

    name    path in the repository and, with the same slashes, below the folder
    size    bytes
    sha256  of its content, hexadecimal: the certificate's for what it covers
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Push:
    """What there is to push.

    seals  per target and draft, named as their folders are (`openvino`, `openvino-draft`), the seal of its certificate
    """

    folder: Path
    files: tuple[HubFile, ...]
    seals: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def message(self) -> str:
        """The first line of the commit: what the receiver compares with the sender's word."""
        return "sparseport export, certificate " + ", ".join(
            f"{target} {seal}" if len(self.seals) > 1 else seal for target, seal in sorted(self.seals.items())
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in self.files],
            "bytes": self.size,
            "certificate_sha256": self.seals,
        }


def plan_push(folder: Path, also: Sequence[str] = (), progress: Progress | None = None) -> Push:
    """Verify a folder and list what a push of it uploads: certified files, certificates, and `also`. Goes nowhere.

    Args:
        folder: an exported folder of one target, or of several.
        also: files below it that no certificate covers, such as README.md.
        progress: where to report steps; quiet by default.

    Raises:
        UsageError: there is no such folder, or a file of `also` is not in it or is certified anyway.
        VerificationError: the folder is not as it was certified, or holds files that nobody named.
    """
    progress = progress or Progress("quiet")
    if not folder.is_dir():
        raise UsageError("no such folder", where=folder, expected="a folder that sparseport exported")
    named = [_inside(folder, name) for name in also]
    folders = exported_folders(folder)
    verdicts: list[Verdict] = []
    for one in folders:
        with progress.task("verifying" if one == folder else f"verifying {one.name}") as step:
            verdicts.append(_without(verify(one, on_step=step), one, folder, named))
    beside = [] if folders == [folder] else strangers(folder, folders)
    known = {Path(name).parts[0] for name in named}
    strange = [line for line in beside if line.rpartition(": ")[0] not in known]
    require_all(verdicts, differences_between(verdicts) + strange)
    certified = {
        f"{_prefix(verdict.folder, folder)}{name}": (facts["size"], facts["sha256"])
        for verdict in verdicts
        for name, facts in _certificate(verdict).files.items()
    }
    if doubled := sorted(set(named) & set(certified)):
        raise UsageError("the certificate covers this file already", where="--also", found=doubled[0])
    files = [HubFile(name, *facts) for name, facts in certified.items()]
    files += [_file(folder, f"{_prefix(one, folder)}{FILE_NAME}") for one in folders]
    files += [_file(folder, name) for name in named]
    seals = {_certificate(verdict).folder_name: _certificate(verdict).seal() for verdict in verdicts}
    return Push(folder, tuple(sorted(files, key=lambda file: file.name)), seals)


def push(
    plan: Push,
    repo_id: str,
    *,
    private: bool = False,
    exist_ok: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload what was planned as one commit, and hold what is there against the certificate.

    The only step of sparseport that opens a connection to a hub, in a process of its own. The token is that of
    huggingface_hub (its environment variables or `hf auth login`).

    Args:
        plan: from `plan_push`.
        repo_id: OWNER/NAME.
        private: make the repository private; one that is there already has to be.
        exist_ok: the repository may be there already.
        revision: branch to commit to, made if it is not there; None for the main one.
        progress: where to report steps; quiet by default.

    Returns:
        `repo_id`, `url`, `revision`, `commit`, `unchanged` (nothing was new), `private`, `files`, `bytes`,
        `certificate_sha256` per target and draft, and `others`: files of the repository that were not pushed.

    Raises:
        BadInput: no repository can be called so.
        EnvironmentProblem: offline, no or not the right token (E_TOKEN), or the hub fails (E_HUB).
        OutputExists: the repository is there already.
        VerificationError: what is there now is not what was certified.
    """
    check_names(repo_id, revision)
    progress = progress or Progress("quiet")
    bars = progress.style == "bars"
    environment = hub_environment(bars)
    request = {
        "folder": str(plan.folder.resolve()),
        "files": [[file.name, file.size, file.sha256] for file in plan.files],
        "repo_id": repo_id,
        "message": plan.message(),
        "private": private,
        "exist_ok": exist_ok,
        "revision": revision,
    }
    label = f"pushing {len(plan.files)} files, {plan.size / 2**20:.1f} MiB"
    if bars:
        progress.note(label)  # the library below shows its own bars
        found = _upload(request, environment, show_errors=True)
    else:
        with progress.task(label):
            found = _upload(request, environment, show_errors=False)
    if found["differences"]:
        shown = "; ".join(found["differences"][:5])
        raise VerificationError(
            f"{len(found['differences'])} files in the repository are not what was certified: {shown}",
            where=f"{found['url']} at {found['commit']}",
            fix="push again with --exist-ok; tell the receivers not to use this commit",
        )
    result = {key: found[key] for key in ("repo_id", "url", "revision", "commit", "unchanged", "private", "others")}
    return {**result, "files": len(plan.files), "bytes": plan.size, "certificate_sha256": plan.seals}


def check_names(repo_id: str, revision: str | None) -> None:
    """Refuse names that no hub takes, before anything is verified or sent.

    Raises:
        BadInput: E_REPO.
    """
    parts = repo_id.split("/")
    if (
        not _REPO_ID.fullmatch(repo_id)
        or any(text in repo_id for text in _FORBIDDEN)
        or any(part.startswith((".", "-")) or part.endswith((".", "-", ".git")) for part in parts)
    ):
        raise BadInput(
            "no repository can be called so",
            where="REPO_ID",
            expected="OWNER/NAME of letters, digits, -, _ and ., with no -- or .. and no - or . at an end",
            found=repo_id[:120],
            code="E_REPO",
        )
    if revision is not None and (not revision or not revision.isprintable() or " " in revision):
        raise BadInput("no branch can be called so", where="--revision", found=revision[:120], code="E_REPO")


def hub_environment(bars: bool = False) -> dict[str, str]:
    """The environment of the process that talks to the hub; with `bars`, it shows progress bars of its own.

    Raises:
        EnvironmentProblem: E_OFFLINE, the user's environment says to stay offline; or huggingface_hub is not installed.
    """
    environment = online_environment(bars)
    if is_offline(environment):
        raise EnvironmentProblem(
            "the environment says to stay offline",
            where="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE",
            code="E_OFFLINE",
            fix="unset it for this command: HF_HUB_OFFLINE=0 sparseport push ...",
        )
    if find_spec("huggingface_hub") is None:
        raise missing("huggingface_hub", "hub")
    return environment


def _upload(request: dict[str, Any], environment: dict[str, str], show_errors: bool) -> dict[str, Any]:
    with Child("sparseport.integrations.hub", request, environment, show_errors) as child:
        return child.result()


def _without(verdict: Verdict, one: Path, folder: Path, named: Sequence[str]) -> Verdict:
    """A verdict that does not mind the files that the user named."""
    prefix = _prefix(one, folder)
    allowed = {f"{name.removeprefix(prefix)}: not in the certificate" for name in named if name.startswith(prefix)}
    return replace(verdict, differences=[line for line in verdict.differences if line not in allowed])


def _certificate(verdict: Verdict) -> Certificate:
    assert verdict.certificate is not None  # `verify` has one, or raises
    return verdict.certificate


def _prefix(one: Path, folder: Path) -> str:
    """What stands before the names of a target's files in the repository."""
    return "" if one == folder else f"{one.name}/"


def _file(folder: Path, name: str) -> HubFile:
    facts = file_facts(folder / name)
    return HubFile(name, facts["size"], facts["sha256"])


def _inside(folder: Path, name: str) -> str:
    """A file's path below the folder, with slashes.

    Raises:
        UsageError: it is no file in the folder.
    """
    path = folder / name
    inside = path.is_file() and not path.is_symlink() and path.resolve().is_relative_to(folder.resolve())
    if not inside or path.name == FILE_NAME:
        raise UsageError("no such file in the folder", where="--also", expected=f"a file in {folder}", found=name)
    return path.resolve().relative_to(folder.resolve()).as_posix()
