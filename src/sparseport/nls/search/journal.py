"""The journal of a search: one JSON line per evaluation, on disk before the search goes on.

The first line says which search it is; every other line is one evaluation, in the order in which they ended:

    {"sparseport_search_journal": 1, "space": "<sha256>", "evaluation": "<sha256>", "objectives": [...], ...}
    {"sizes": [32, 24], "values": {"accuracy": 0.5, "macs": 1000.0}, "seconds": 1.5}

A line without its end is what a crash in the middle of a write leaves; it is overwritten. Any other damage is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import parse_json
from sparseport.checkpoints.paths import open_regular
from sparseport.errors import BadInput, EnvironmentProblem, SparseportError, UsageError
from sparseport.nls.search.candidates import Candidate, Group, check_candidate, space_digest
from sparseport.nls.search.objectives import Evaluation, Objective, check_values
from sparseport.publish import TEMP_PREFIX, locked, sync_folder

SCHEMA = 1
_SCHEMA_KEY = "sparseport_search_journal"
_MAX_BYTES = 1 << 30
_KEYS = {"sizes", "values", "seconds"}
_MEANING = {
    "space": "the search space",
    "evaluation": "what an evaluation depends on (model, adapter, data, measuring)",
    "objectives": "the objectives",
}


@dataclass(frozen=True)
class RunIdentity:
    """What makes two searches the same one.

    groups      of the search space
    evaluation  SHA-256 of everything that decides what an evaluation yields
    objectives  in their order
    strategy    settings of the strategy with its seed; what only says when to stop is none of them, so that a finished
                search can go on
    """

    groups: Sequence[Group]
    evaluation: str
    objectives: Sequence[Objective]
    strategy: Mapping[str, Any]

    def header(self) -> dict[str, Any]:
        """The first line of the journal as plain data."""
        header = {
            _SCHEMA_KEY: SCHEMA,
            "space": space_digest(self.groups),
            "evaluation": self.evaluation,
            "objectives": [
                {"name": objective.name, "direction": objective.direction, "unit": objective.unit}
                for objective in self.objectives
            ],
            "strategy": dict(self.strategy),
        }
        # As it reads back: a tuple becomes a list.
        return dict(json.loads(json.dumps(header, allow_nan=False)))


class Journal:
    """Evaluations that are safe on disk; made by `open_journal`.

    done  sub-network -> its evaluation
    """

    def __init__(self, path: Path, file: FileIO, done: dict[Candidate, Evaluation]) -> None:
        self.path = path
        self.done = done
        self._file = file

    def add(self, evaluation: Evaluation) -> None:
        """Append an evaluation; it is on disk when this returns.

        Raises:
            EnvironmentProblem: the disk is full or the file cannot be written.
        """
        _append(
            self._file,
            {"sizes": list(evaluation.candidate), "values": evaluation.values, "seconds": evaluation.seconds},
            self.path,
        )
        self.done[evaluation.candidate] = evaluation

    def sha256(self) -> str:
        """SHA-256 of the file as it is now."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


@contextmanager
def open_journal(path: Path, identity: RunIdentity) -> Iterator[Journal]:
    """Begin a journal, or go on with one; no other process can, until the block ends or this process dies.

    Raises:
        UsageError: E_JOURNAL, the journal is another search's; names what differs.
        BadInput: E_JOURNAL for a damaged line, by its number; E_PATH or E_LIMIT for what is no journal at all.
        OutputExists: E_LOCKED, another process writes this journal.
        EnvironmentProblem: the journal cannot be written.
    """
    path = Path(path).absolute()
    header = identity.header()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem("cannot make the journal's folder", where=path.parent, found=error.strerror) from error
    with locked(path.with_name(f"{TEMP_PREFIX}lock-{path.name}"), path, "search"):
        done, end = _read(path, header, identity) if path.exists() else ({}, 0)
        try:
            file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        except OSError as error:
            raise EnvironmentProblem("cannot write the journal", where=path, found=error.strerror) from error
        with file:
            file.truncate(end)
            file.seek(end)
            if end == 0:
                _append(file, header, path)
                sync_folder(path.parent)
            yield Journal(path, file, done)


def _read(path: Path, header: dict[str, Any], identity: RunIdentity) -> tuple[dict[Candidate, Evaluation], int]:
    """The evaluations of a journal, and the length of its whole lines in bytes."""
    with open_regular(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise BadInput("the journal is too large", where=path, expected=f"at most {_MAX_BYTES} bytes", code="E_LIMIT")
    *lines, rest = data.split(b"\n")
    if not lines:
        if not _line(header).startswith(rest):  # somebody's file, or another search's first line
            raise _no_journal(path, rest)
        return {}, 0
    _check_header(lines[0], header, path)
    done: dict[Candidate, Evaluation] = {}
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}, line {number}"
        try:
            evaluation = _evaluation(line, where, identity)
        except SparseportError as error:
            raise _damaged(where, error.what, error.found) from error
        if evaluation.candidate in done:
            raise _damaged(where, "this sub-network has been evaluated in an earlier line", None)
        done[evaluation.candidate] = evaluation
    return done, len(data) - len(rest)


def _check_header(line: bytes, header: dict[str, Any], path: Path) -> None:
    try:
        found = parse_json(line, where=f"{path}, line 1", what="journal", code="E_JOURNAL")
    except BadInput as error:
        raise _no_journal(path, line) from error
    if not isinstance(found, dict) or _SCHEMA_KEY not in found:
        raise _no_journal(path, line)
    if found == header:
        return
    if found[_SCHEMA_KEY] != SCHEMA:
        raise UsageError(
            "the journal has another schema",
            where=path,
            expected=SCHEMA,
            found=repr(found[_SCHEMA_KEY])[:40],
            fix="use the version of sparseport that wrote it, or name a new journal",
            code="E_JOURNAL",
        )
    name, expected, other = _difference(found, header)
    raise UsageError(
        f"the journal belongs to another search: {name} is different",
        where=path,
        expected=expected,
        found=other,
        fix="name a new journal, or search with the settings of this one",
        code="E_JOURNAL",
    )


def _difference(found: dict[str, Any], header: dict[str, Any]) -> tuple[str, str, str]:
    """The first thing in which two first lines differ: its name, and how it looks in `header` and in `found`."""
    for key in ("space", "evaluation", "objectives"):
        if found.get(key) != header[key]:
            return _MEANING[key], _short(header[key]), _short(found.get(key))
    ours, theirs = header["strategy"], found.get("strategy")
    if isinstance(theirs, dict):
        for key in [*ours, *theirs]:
            if ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs):
                return f"the strategy's {key}", _short(ours.get(key)), _short(theirs.get(key))
    return "its first line", ", ".join(header), ", ".join(map(str, found))


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        return ", ".join(f"{item['name']} ({item.get('direction')}, {item.get('unit')})" for item in value)
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _evaluation(line: bytes, where: str, identity: RunIdentity) -> Evaluation:
    entry = parse_json(line, where=where, what="journal", code="E_JOURNAL")
    if not isinstance(entry, dict) or set(entry) != _KEYS or not isinstance(entry["values"], dict):
        raise BadInput("it is no evaluation", found=repr(line[:80].decode("utf-8", "replace")))
    seconds = entry["seconds"]
    if type(seconds) not in (int, float) or seconds < 0:
        raise BadInput("seconds is no time", found=repr(seconds)[:40])
    values = check_values(entry["values"], identity.objectives, where)
    return Evaluation(check_candidate(entry["sizes"], identity.groups, where), values, float(seconds))


def _damaged(where: str, what: str, found: str | None) -> BadInput:
    return BadInput(
        f"the journal is damaged: {what}",
        where=where,
        found=found,
        fix="restore the file, or delete the damaged line: what it held is evaluated again",
        code="E_JOURNAL",
    )


def _no_journal(path: Path, line: bytes) -> BadInput:
    return BadInput(
        "the file is no journal of a search",
        where=f"{path}, line 1",
        expected=f'{{"{_SCHEMA_KEY}": {SCHEMA}, ...}}',
        found=repr(line[:80].decode("utf-8", "replace")),
        fix="name another journal; a file that is there is only added to",
        code="E_JOURNAL",
    )


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=True, allow_nan=False, separators=(", ", ": ")).encode("ascii") + b"\n"


def _append(file: FileIO, entry: dict[str, Any], path: Path) -> None:
    try:
        line = _line(entry)
        while line:  # an unbuffered file may take a part of it
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentProblem(
                "no space left for the journal",
                where=path,
                code="E_NOSPC",
                fix="free some space and search again: what is in the journal is not evaluated again",
            ) from error
        raise EnvironmentProblem("cannot write the journal", where=path, found=error.strerror) from error
