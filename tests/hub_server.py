"""A hub in this process: the endpoints that huggingface_hub uses to create a repository, commit to it and list it.

It listens on 127.0.0.1, keeps everything in memory, and can be told to fail. Written after the requests that
huggingface_hub 1.21 sends without Xet; large files go through Git LFS's batch API.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_SecretSecretSecretSecretSecretSec"
LARGE = (".bin", ".data", ".onnx", ".safetensors", ".onnx_adapter")
Fault = Callable[["Handler"], bool]
"""Answers a request in the hub's place; returns whether it did."""


@dataclass
class Stored:
    """A file of a commit."""

    data: bytes
    large: bool

    def facts(self, path: str) -> dict[str, Any]:
        """What the hub's listing says of it."""
        sha256 = hashlib.sha256(self.data).hexdigest()
        git = self.data
        if self.large:
            git = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(self.data)}\n".encode()
        facts = {"type": "file", "path": path, "size": len(self.data), "oid": git_blob(git)}
        return facts | ({"lfs": {"oid": sha256, "size": len(self.data), "pointerSize": len(git)}} if self.large else {})


@dataclass
class Repository:
    """Commits by their ids, and the last one of each branch."""

    private: bool
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Stored], message: str) -> str:
        """Add a commit to a branch; returns its id."""
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def at(self, revision: str) -> dict[str, Stored] | None:
        """Files of a commit or a branch."""
        return self.commits.get(self.branches.get(revision, revision))


class Hub:
    """The hub's state, and what it was asked.

    faults    answer in the hub's place, by the name of the endpoint
    on_commit changes files of a commit after it was made
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.on_commit: Callable[[dict[str, Stored]], None] = lambda files: None
        self.asked: list[str] = []
        self.endpoint = ""

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """A new repository, with the file that hubs put there."""
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": Stored(b"*.bin filter=lfs\n", False)}, "initial commit")
        return repository


def git_blob(data: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def fail(status: int, message: str = "", times: int = 10**9) -> Fault:
    """A fault: answer with a status, and a message in the body, so many times."""
    left = [times]

    def fault(handler: Handler) -> bool:
        if left[0] <= 0:
            return False
        left[0] -= 1
        handler.read_body()
        handler.answer({"error": message or f"status {status}"}, status)
        return True

    return fault


def drop(times: int = 10**9) -> Fault:
    """A fault: read a part of the request, then close the connection."""
    left = [times]

    def fault(handler: Handler) -> bool:
        if left[0] <= 0:
            return False
        left[0] -= 1
        handler.rfile.read(min(16, int(handler.headers.get("Content-Length", 0))))
        handler.close_connection = True
        handler.connection.shutdown(2)
        return True

    return fault


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def read_body(self) -> bytes:
        """The request's body, whether its length is told or it comes in chunks."""
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _serve(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        name, act = self._route(parts)
        self.hub.asked.append(name)
        if name in self.hub.faults and self.hub.faults[name](self):
            return
        body = self.read_body()
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not authorised and name not in ("object", "unknown"):
            self.answer({"error": "Invalid username or password."}, 401)
            return
        act(body)

    def _route(self, parts: list[str]) -> tuple[str, Callable[[bytes], None]]:
        if parts == ["api", "repos", "create"]:
            return "create", self._create
        if parts == ["api", "validate-yaml"]:
            return "validate", lambda body: self.answer({"errors": [], "warnings": []})
        if parts[:1] == ["objects"]:
            return "object", lambda body: self._object(parts[1], body)
        if parts[2:3] == ["resolve"]:
            return "resolve", lambda body: self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[1:2] and parts[1].endswith(".git"):
            return "batch", self._batch
        if parts[:2] == ["api", "models"]:
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
            repository = self.hub.repositories.get(repo_id)
            if repository is None:
                missing = {"X-Error-Code": "RepoNotFound"}
                return "info", lambda body: self.answer({"error": "Repository not found"}, 404, missing)
            if not rest or rest[0] == "revision":
                return "info", lambda body: self._info(repo_id, repository, rest[1] if rest else "main")
            acts: dict[str, Callable[[Repository, str, bytes], None]] = {
                "branch": self._branch,
                "preupload": self._preupload,
                "commit": self._commit,
                "tree": self._tree,
            }
            if rest[0] in acts:
                return rest[0], lambda body: acts[rest[0]](repository, rest[1], body)
        return "unknown", lambda body: self.answer({"error": "no such endpoint"}, 404)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repositories:
            self.answer({"error": "You already created this model repo", **url}, 409)
            return
        self.hub.create(repo_id, asked.get("visibility") == "private")
        self.answer(url)

    def _info(self, repo_id: str, repository: Repository, revision: str) -> None:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self.answer({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        self.answer({"id": repo_id, "sha": sha, "private": repository.private, "siblings": [], "tags": []})

    def _branch(self, repository: Repository, name: str, body: bytes) -> None:
        known = name in repository.branches
        repository.branches.setdefault(name, repository.branches["main"])
        self.answer({"error": "Reference already exists"} if known else {}, 409 if known else 200)

    def _preupload(self, repository: Repository, revision: str, body: bytes) -> None:
        there = repository.at(revision)
        if there is None:
            self.answer({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            stored = there.get(path)
            oid = None if stored is None else stored.facts(path)
            known = {} if oid is None else {"oid": oid["lfs"]["oid"] if "lfs" in oid else oid["oid"]}
            mode = "lfs" if path.endswith(LARGE) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.answer({"files": files})

    def _batch(self, body: bytes) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/objects/{one['oid']}"}}
            objects.append(one if one["oid"] in self.hub.objects else {**one, "actions": upload})
        self.answer({"transfer": "basic", "objects": objects})

    def _object(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer({"error": "the content has another SHA-256"}, 400)
            return
        self.hub.objects[oid] = body
        self.answer({})

    def _commit(self, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.at(branch) or {})
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Stored(self.hub.objects[value["oid"]], True)
        self.hub.on_commit(files)
        oid = repository.commit(branch, files, message)
        repo_id = next(name for name, one in self.hub.repositories.items() if one is repository)
        self.answer({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})

    def _tree(self, repository: Repository, revision: str, body: bytes) -> None:
        files = repository.at(revision) or {}
        folders = sorted({path.rpartition("/")[0] for path in files if "/" in path})
        listed: list[dict[str, Any]] = [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
        self.answer([*listed, *(stored.facts(path) for path, stored in sorted(files.items()))])

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        stored = (self.hub.repositories[repo_id].at(revision) or {}).get(path)
        if stored is None:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": revision, "ETag": f'"{stored.facts(path)["oid"]}"'}
        self.answer(stored.data, 200, headers)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
