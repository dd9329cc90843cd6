"""Turn a torch pickle into a safetensors file, in a process of its own and without running what the pickle says.

Only for `--allow-pickle`: torch reads it with `weights_only=True`, and there is no fallback.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import parse_json
from sparseport.checkpoints.paths import open_regular
from sparseport.errors import BadInput

_CHILD = """
import sys
import torch
from safetensors.torch import save_file
tensors = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
if not isinstance(tensors, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in tensors.items()):
    sys.exit("the pickle is not a plain mapping of names to tensors")
save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, sys.argv[2], metadata={"format": "pt"})
"""
# A pickle can be small and still describe something huge: one list used a million times, one number seen as a matrix
# of any size. So everything is counted before it is copied.
_NESTED_CHILD = """
import json, os, re, sys
import torch
from safetensors.torch import save_file
source, target, names, depth, nodes, text = sys.argv[1], sys.argv[2], *(json.loads(word) for word in sys.argv[3:])

def as_text(value):
    if type(value) is not str:
        raise TypeError("an enumeration whose value is no text")
    return value

try:
    with torch.serialization.safe_globals([(as_text, name) for name in names]):
        content = torch.load(source, map_location="cpu", weights_only=True)
except Exception as error:
    asked = re.search(r"GLOBAL ([\\w.]+)", str(error))
    if asked:
        sys.exit(f"the pickle asks for {asked[1]}, which is no plain data")
    # torch's own text goes on to recommend reading the file without protection.
    reason = re.search(r"WeightsUnpickler error: (.+)", str(error))
    sys.exit(f"torch cannot read it: {reason[1] if reason else type(error).__name__}")

tensors, budget = {}, {"nodes": nodes, "text": text, "bytes": 4 * os.path.getsize(source) + (1 << 20)}

def spend(kind, amount, where):
    budget[kind] -= amount
    if budget[kind] < 0:
        sys.exit(f"too much data at {where or '/'} (limit on {kind})")

def plain(value, where, level):
    spend("nodes", 1, where)
    if torch.is_tensor(value):
        size = value.numel() * value.element_size()
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            sys.exit(f"the tensor at {where} is not a plain one")
        if size > value.untyped_storage().nbytes():
            sys.exit(f"the tensor at {where} has more elements than are stored")
        spend("bytes", size, where)
        tensors[where] = value
        return None
    if isinstance(value, str):
        spend("text", len(value), where)
        return value
    if value is None or type(value) in (bool, int, float):
        return value
    if not isinstance(value, (dict, list, tuple)):
        sys.exit(f"the value at {where or '/'} is a {type(value).__name__}, which is no plain data")
    if level == depth:
        sys.exit(f"the data is nested deeper than {depth} levels")
    if not isinstance(value, dict):
        return [plain(item, f"{where}/{i}", level + 1) for i, item in enumerate(value)]
    if not all(type(key) is str for key in value):
        sys.exit(f"the mapping at {where or '/'} has a key that is no text")
    spend("text", sum(map(len, value)), where)
    escaped = {key: key.replace("~", "~0").replace("/", "~1") for key in value}
    return {key: plain(item, f"{where}/{escaped[key]}", level + 1) for key, item in value.items()}

if not isinstance(content, dict):
    sys.exit("the pickle is not a mapping")
answer = json.dumps(plain(content, "", 0), allow_nan=False)
save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, target, metadata={"format": "pt"})
print(answer)
"""
_SECONDS = 3600
# Limits on what is no tensor: levels of nesting, values in all, characters in all.
_DEPTH, _NODES, _TEXT = 16, 1_000_000, 64 << 20


def convert_pickle(source: Path, target: Path) -> None:
    """Write the tensors of a torch pickle as safetensors.

    Memory in the child process is twice the file; the file's own bytes are never trusted.

    Raises:
        BadInput: E_PICKLE, when torch refuses the file or it is no mapping of names to tensors.
    """
    _run(_CHILD, source, target)


def convert_nested_pickle(source: Path, target: Path, *, text_enums: Sequence[str] = ()) -> dict[str, Any]:
    """Write the tensors of a pickled mapping as safetensors, and return everything else as plain data.

    Mappings may hold mappings, lists, tuples, text, numbers, true, false, None and tensors, to any depth up to 16.

    source      the pickle
    target      safetensors file to write; a tensor's name is its path as a JSON pointer (RFC 6901), so that no two
                paths share one: content["a/b"][0] is `/a~1b/0`
    text_enums  full names of enumeration classes whose members are read as their text; the classes are not imported

    Returns:
        The mapping with lists for tuples and None in each tensor's place.

    Memory in the child process is twice the file. A file that expands to much more than its size is refused before
    anything is copied.

    Raises:
        BadInput: E_PICKLE, when torch refuses the file, it holds other values, or it is far larger than it looks.
    """
    limits = [json.dumps(value) for value in (list(text_enums), _DEPTH, _NODES, _TEXT)]
    lines = _run(_NESTED_CHILD, source, target, *limits).splitlines() or [""]
    plain: dict[str, Any] = parse_json(lines[-1].encode("utf-8"), where=str(source), what="pickle", code="E_PICKLE")
    return plain


def _run(code: str, source: Path, target: Path, *arguments: str) -> str:
    """Standard output of a child that reads `source` and writes `target`."""
    with open_regular(source):
        pass
    command = [sys.executable, "-I", "-c", code, str(source.absolute()), str(target.absolute()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        done, problem = None, f"no end after {_SECONDS} s"
    if done is None or done.returncode:
        raise BadInput(
            "pickle could not be read as plain tensors",
            where=source,
            found=problem[:300],
            fix="convert it to safetensors in an environment you trust",
            code="E_PICKLE",
        )
    return done.stdout
