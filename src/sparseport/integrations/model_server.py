"""A model repository of OpenVINO Model Server: exported folders as models that it serves for text generation.

    REPOSITORY/config.json           what the server is started with; one entry per model
    REPOSITORY/NAME/graph.pbtxt      MediaPipe graph with the server's LLM calculator
    REPOSITORY/NAME/openvino/        the exported folder, file by file as it was certified

The server's own tools put graph.pbtxt beside the model's files. Here it stands one floor above them, so that the folder
below still is what its certificate says, and `sparseport verify` still finds nothing that does not belong to it.

Format: OpenVINO Model Server's documentation (LLM calculator, MediaPipe graphs) and its sources of 2026:
`LLMCalculatorOptions` in src/llm/llm_calculator.proto, `models_path` relative to the graph's `base_path`, and that
relative to config.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.checkpoints.json_files import read_json
from sparseport.errors import BadInput, EnvironmentProblem, FidelityError, OutputExists, Unsupported, UsageError
from sparseport.extras import require_packages
from sparseport.progress import Progress
from sparseport.publish import TEMP_PREFIX, check_space, locked, staged_output
from sparseport.verify.certificate import FILE_NAME, Certificate, certified_folders, file_facts
from sparseport.verify.folder import require, verify
from sparseport.verify.runs import OPENVINO_FULL_PRECISION

CONFIG, GRAPH, MODEL = "config.json", "graph.pbtxt", "openvino"
# Without these the server refuses the folder: it takes text and gives text.
_NEEDED = tuple(f"openvino_{part}.{end}" for part in ("tokenizer", "detokenizer") for end in ("xml", "bin"))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DEVICE = re.compile(r"[A-Za-z0-9_.:,]{1,100}")
_GRAPH = """\
# Written by sparseport {version}; the model's certificate has the proof {proof}.
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node {{
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info {{
    tag_index: "LOOPBACK:0"
    back_edge: true
  }}
  input_stream_handler {{
    input_stream_handler: "SyncSetInputStreamHandler"
    options {{
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {{
        sync_set {{
          tag_index: "LOOPBACK:0"
        }}
      }}
    }}
  }}
  node_options {{
    [type.googleapis.com/mediapipe.LLMCalculatorOptions] {{
{options}
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Servable:
    """A model of a repository.

    name      what clients call it
    folder    REPOSITORY/NAME
    config    REPOSITORY/config.json, which names it
    model     the exported folder within
    settings  properties that the server gives to the runtime
    files     files of the exported folder
    linked    whether they are hard links to those of the export, not copies
    """

    name: str
    folder: Path
    config: Path
    model: Path
    settings: Mapping[str, str]
    files: int
    linked: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "config": str(self.config),
            "model": str(self.model),
            "settings": dict(self.settings),
            "files": self.files,
            "linked": self.linked,
        }


def add_servable(
    folder: Path | str,
    repository: Path | str,
    name: str,
    *,
    device: str = "CPU",
    precision: str = "default",
    cache_size: int | None = None,
    hard_links: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Servable:
    """Put an exported OpenVINO folder into a model repository, which is made if it is not there.

    The model appears whole or not at all, and its entry in config.json after it. Other models and their entries are
    left as they are.

    Args:
        folder: an exported folder, unchanged since.
        repository: folder of the repository.
        name: what clients call the model.
        device: where the server runs it (CPU, GPU, NPU).
        precision: `default` as applications run a folder, or `full`: float32 with nothing quantised on the way.
        cache_size: memory for the KV cache in GB; None leaves it to the server.
        hard_links: link the files in place of copying them. They are the export's files then: who writes into one of
            the two folders changes the other.
        overwrite: replace a model of this name that this function made.
        progress: where to report; quiet by default.

    Raises:
        UsageError: the name, the device or their combination cannot be, or another entry has the name.
        VerificationError: the folder is not as it was certified.
        Unsupported: the server would not serve what was exported (another target, no tokenizer, adapters).
        BadInput: the repository's config.json is damaged.
        OutputExists: the model is there already, or another process writes this repository.
        FidelityError: a copy is not what was copied.
        EnvironmentProblem: no hard link can be made, the disk is full, or packages of the target are missing.
    """
    folder, repository = Path(folder).absolute(), Path(repository).absolute()
    progress = progress or Progress("quiet")
    settings = _settings(name, device, precision, cache_size)
    certificate = _servable_certificate(folder)
    target, config = repository / name, repository / CONFIG
    read_config(config, name, target)  # before any work; what counts is read again under the lock
    if target.exists() and not overwrite:
        raise OutputExists("the repository has this model", where=target, fix="give another --name or --overwrite")
    if not hard_links:
        check_space(target, sum(facts["size"] for facts in certificate.files.values()))
    with progress.task(f"verifying {folder.name}") as step:
        require(verify(folder, on_step=step))
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem("cannot make the repository", where=repository, found=error.strerror) from error
    with locked(repository / f"{TEMP_PREFIX}lock-{CONFIG}", repository, "model"):
        entries = read_config(config, name, target)
        with staged_output(target, overwrite, ours=_is_ours) as stage:
            with progress.task("linking" if hard_links else "copying", len(certificate.files)) as step:
                for file, facts in certificate.files.items():
                    _place(folder / file, stage / MODEL / file, facts, hard_links)
                    step()
            certificate.write(stage / MODEL)
            text = graph_text(certificate.proof(), device, settings, cache_size)
            (stage / GRAPH).write_text(text, encoding="utf-8")
        _write_config(config, entries)
    return Servable(name, target, config, target / MODEL, settings, len(certificate.files), hard_links)


def _settings(name: str, device: str, precision: str, cache_size: int | None) -> dict[str, str]:
    """Properties of the runtime for a precision, after the options were looked at."""
    if not _NAME.fullmatch(name) or name == CONFIG:
        allowed = "letters, digits, ., - and _, beginning with a letter or digit"
        raise UsageError("no name for a model", where="--name", expected=allowed, found=name[:80])
    if not _DEVICE.fullmatch(device):
        raise UsageError("no name of a device", where="--device", expected="CPU, GPU or NPU", found=device[:80])
    if cache_size is not None and cache_size < 1:
        raise UsageError("the KV cache has 1 GB or more", where="--cache-size", found=cache_size)
    if precision not in ("default", "full"):
        raise UsageError("no such precision", where="--precision", expected="default or full", found=precision)
    if precision == "full" and device != "CPU":
        raise UsageError("full precision is known for the CPU only", where="--precision full", found=device)
    return dict(OPENVINO_FULL_PRECISION) if precision == "full" else {}


def _servable_certificate(folder: Path) -> Certificate:
    """The certificate of a folder that the server can serve.

    Raises:
        UsageError: the folder holds those of several targets.
        Unsupported: it is not for OpenVINO, has no tokenizer, or has adapters.
        VerificationError: there is no certificate, or it was changed.
    """
    inside = certified_folders(folder)
    if inside and inside != [folder]:
        raise UsageError("this folder holds the exports of several targets", where=folder, fix=f"give {folder / MODEL}")
    certificate = Certificate.read(folder)
    if certificate.target != "openvino":
        raise Unsupported(
            "the server generates text with OpenVINO GenAI only",
            where=folder,
            expected="a folder exported for openvino",
            found=certificate.target,
            fix="export it with --target openvino",
        )
    absent = [name for name in _NEEDED if name not in certificate.files]
    if absent:
        fix = "export it again without --no-tokenizer"
        raise Unsupported("the server needs the model's tokenizer", where=folder, expected=absent[0], fix=fix)
    if certificate.adapters:
        raise Unsupported(
            "the server would serve the base without its adapter",
            where=folder,
            found=", ".join(sorted(certificate.adapters)),
            fix="export it with --branches graph",
        )
    require_packages(["openvino"])
    return certificate


def graph_text(proof: str, device: str, settings: Mapping[str, str], cache_size: int | None = None) -> str:
    """The MediaPipe graph that serves `openvino` beside it, in protobuf's text format.

    Args:
        proof: SHA-256 of what the model's certificate proves, for the reader.
        device: where the model runs.
        settings: properties of the runtime.
        cache_size: memory for the KV cache in GB.
    """
    options = {"models_path": f"./{MODEL}", "device": device}
    if settings:
        options["plugin_config"] = json.dumps(dict(settings))
    # JSON's escapes of ASCII text are protobuf's as well.
    lines = [f"{key}: {json.dumps(value)}" for key, value in options.items()]
    if cache_size is not None:
        lines.append(f"cache_size: {cache_size}")
    return _GRAPH.format(version=__version__, proof=proof, options="\n".join(f"      {line}" for line in lines))


def read_config(path: Path, name: str, folder: Path) -> dict[str, Any]:
    """A repository's config.json with the model's entry in it; both lists that the server knows are there.

    Raises:
        BadInput: it is no JSON object, or its lists hold other things than entries with names.
        UsageError: the name belongs to another entry.
    """
    data = read_json(path, what="model server config") if path.is_file() else {}
    named: dict[str, list[dict[str, Any]]] = {}
    for part in ("model_config_list", "mediapipe_config_list"):
        entries = data.setdefault(part, [])
        named[part] = [_settings_of(entry) for entry in entries] if isinstance(entries, list) else [{}]
        if not all(isinstance(one.get("name"), str) for one in named[part]):
            raise BadInput("not a model server's config", where=f"{path}, {part}", expected="entries with names")
    taken = UsageError("another entry has this name", where=path, found=name, fix="give another --name")
    if any(one["name"] == name for one in named["model_config_list"]):
        raise taken
    same = [one for one in named["mediapipe_config_list"] if one["name"] == name]
    if any(_base_path(one, path.parent) != folder for one in same) or len(same) > 1:
        raise taken
    if not same:
        data["mediapipe_config_list"].append({"name": name, "base_path": folder.name})
    return data


def _settings_of(entry: object) -> dict[str, Any]:
    """What an entry says: models of classic serving have it under `config`; empty for what is no entry."""
    inner = entry.get("config", entry) if isinstance(entry, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _base_path(entry: Mapping[str, Any], root: Path) -> Path | None:
    """Where an entry's graph lies: `base_path` relative to config.json."""
    value = entry.get("base_path", ".")
    return Path(os.path.normpath(root / value)) if isinstance(value, str) else None


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a model as it is made here, with nothing beside."""
    return {path.name for path in folder.iterdir()} == {GRAPH, MODEL} and (folder / MODEL / FILE_NAME).is_file()


def _place(source: Path, target: Path, facts: Mapping[str, Any], link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, target)
        except OSError as error:
            raise UsageError(
                "no hard link can be made",
                where=source,
                found=error.strerror,
                fix="leave --hard-links away, or choose an --output on the same file system",
            ) from error
        return
    shutil.copyfile(source, target)
    if file_facts(target) != dict(facts):
        raise FidelityError("the copy of a file is not what was copied", where=source)


def _write_config(path: Path, data: Mapping[str, Any]) -> None:
    """Write config.json whole: the server reads it again when it changes."""
    partial = path.with_name(f"{TEMP_PREFIX}{path.name}")
    try:
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EnvironmentProblem(
            "the model is in its place, but config.json could not be written",
            where=path,
            found=error.strerror,
            fix="the same command with --overwrite writes it",
        ) from error
