"""The child process that talks to a hub through huggingface_hub; see `push`, which starts it.

What is sent is one commit. What is there afterwards is read from the hub's own listing of that commit: sizes of all
files; the SHA-256 of those that lie in large-file storage; of the others git's blob id, which is compared with that of
bytes whose SHA-256 is the certified one. The certificates themselves are downloaded again and compared byte for byte.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparseport.errors import BadInput, EnvironmentProblem, OutputExists, SparseportError, UsageError
from sparseport.verify.certificate import FILE_NAME

_AGAIN = "run the same command again, with --exist-ok; what has arrived is not sent twice, a commit is whole or absent"
# Timeout, conflict with another commit, too many requests: the same request may pass later.
_LATER = (408, 409, 412, 429)
_COMPARING = "comparing commit"
_LOGIN = "`hf auth login` with a token that may write, or set HF_TOKEN"


def upload(
    folder: str,
    files: list[list[Any]],
    repo_id: str,
    message: str,
    private: bool,
    exist_ok: bool,
    revision: str | None,
) -> dict[str, Any]:
    """Push files to a repository as one commit and compare what is there.

    Args:
        folder: where the files lie.
        files: name, size in bytes and SHA-256 of each.
        repo_id, message, private, exist_ok, revision: see `push.push`.

    Returns:
        What `push.push` returns of the repository, and `differences`, one line for each file that is not as it was.

    Raises:
        SparseportError: see `push.push`.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise EnvironmentProblem("there is no token for the hub", code="E_TOKEN", fix=_LOGIN)
    stage = ["creating the repository"]
    try:
        # True: the machine's token is sent even where it is not sent by default, because a push without one is refused.
        return _upload(HfApi(token=True), stage, Path(folder), files, repo_id, message, private, exist_ok, revision)
    except SparseportError:
        raise
    except Exception as error:
        # Without its traceback: a server may echo in its answer what it was sent, and the text of that is not ours.
        raise _problem(error, stage[-1], repo_id, token) from None


def _upload(
    api: Any,
    stage: list[str],
    folder: Path,
    files: list[list[Any]],
    repo_id: str,
    message: str,
    private: bool,
    exist_ok: bool,
    revision: str | None,
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd

    url = api.create_repo(repo_id, private=private or None, exist_ok=exist_ok)
    repo_id = url.repo_id
    if revision is not None and not revision.startswith("refs/"):
        stage.append("making the branch")
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    stage.append("asking about the repository")
    before = api.model_info(repo_id, revision=revision)
    if private and not before.private:
        raise UsageError(
            "the repository is there already, and everybody can read it",
            where=repo_id,
            fix="make it private on the hub first, or leave --private out; nothing was uploaded",
            code="E_PUBLIC",
        )
    stage.append("uploading")
    operations = [CommitOperationAdd(name, str(folder / name)) for name, _, _ in files]
    api.preupload_lfs_files(repo_id, operations, revision=revision, free_memory=False)
    stage.append("committing")
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    stage.append(f"{_COMPARING} {commit.oid}")
    listed = {item.path: item for item in api.list_repo_tree(repo_id, recursive=True, revision=commit.oid)}
    there = {path: item for path, item in listed.items() if hasattr(item, "blob_id")}
    differences = [line for name, size, sha256 in files for line in _different(folder, name, size, sha256, there)]
    differences += _different_certificates(api, repo_id, commit.oid, folder, [name for name, _, _ in files])
    return {
        "repo_id": repo_id,
        "url": str(url),
        "revision": revision or "main",
        "commit": commit.oid,
        "unchanged": commit.oid == before.sha,
        "private": bool(before.private),
        "others": sorted(set(there) - {name for name, _, _ in files}),
        "differences": differences,
    }


def _different(folder: Path, name: str, size: int, sha256: str, there: dict[str, Any]) -> list[str]:
    """What the hub's listing says differently about a file."""
    item = there.get(name)
    if item is None:
        return [f"{name}: not in the repository"]
    if item.size != size:
        return [f"{name}: {item.size} bytes, certified {size}"]
    if item.lfs is not None:
        return [] if item.lfs.sha256 == sha256 and item.lfs.size == size else [f"{name}: content changed"]
    data = (folder / name).read_bytes()  # small: the hub takes large files into its other storage
    if hashlib.sha256(data).hexdigest() != sha256:
        return [f"{name}: changed in the folder while it was pushed"]
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return [] if item.blob_id == blob else [f"{name}: content changed"]


def _different_certificates(api: Any, repo_id: str, commit: str, folder: Path, names: list[str]) -> list[str]:
    """Certificates that come back from the hub as other bytes."""
    differences = []
    with tempfile.TemporaryDirectory(prefix="sparseport-") as scratch:
        for name in names:
            if Path(name).name == FILE_NAME:
                found = api.hf_hub_download(repo_id, name, revision=commit, local_dir=scratch)
                if Path(found).read_bytes() != (folder / name).read_bytes():
                    differences.append(f"{name}: comes back as other bytes")
    return differences


def _problem(error: Exception, stage: str, repo_id: str, token: str) -> SparseportError:
    """What the parent raises for an exception of huggingface_hub or of the connection, without the token."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    told = next((one for one in _causes(error) if isinstance(one, HfHubHTTPError | HFValidationError)), None)
    status = told.response.status_code if isinstance(told, HfHubHTTPError) else None
    said = (getattr(told, "server_message", None) or "") if told else ""
    last = told or list(_causes(error))[-1]
    text = f"HTTP {status} {said}".strip() if status else f"{type(last).__name__}: {last}"
    found = " ".join(text.replace(token, "***").split())[:300]
    facts: dict[str, Any] = {"where": f"{repo_id}, {stage}", "found": found}
    if isinstance(told, HFValidationError):
        return BadInput("huggingface_hub refuses the name", code="E_REPO", **facts)
    if status in (401, 403):
        what = "the hub does not accept the token" if status == 401 else "the token may not write there"
        return EnvironmentProblem(what, code="E_TOKEN", fix=_LOGIN, **facts)
    if status == 409 and stage == "creating the repository":
        return OutputExists(
            "the repository is there already", fix="give --exist-ok to commit to it, or choose another name", **facts
        )
    if status == 404:
        return BadInput("the hub has no such repository or branch", code="E_REPO", fix="look at the names", **facts)
    if status is not None and 400 <= status < 500 and status not in _LATER:
        return BadInput("the hub refuses this", code="E_HUB", **facts)
    # After a connection that was refused, huggingface_hub 1.21 tries again with a client that it has closed.
    connection = any(isinstance(one, httpx.TransportError | ConnectionError) for one in _causes(error))
    connection = connection or "client has been closed" in text
    what = "the hub failed" if status else "the connection to the hub failed" if connection else "the push failed"
    if stage == "committing":
        what += ", and it is not known whether the commit arrived"
    elif stage.startswith(_COMPARING):
        what += ", and the commit that is there was not compared"
    return EnvironmentProblem(what, code="E_HUB", fix=_AGAIN, **facts)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


if __name__ == "__main__":
    from sparseport.child import serve

    serve(upload, online=True)
