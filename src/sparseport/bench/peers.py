"""What one would run instead, made from the very weights of an exported folder: their speed and their drift.

Each peer starts from the dequantised model in float32, which is what a user without sparseport has after merging.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparseport.bench.subjects import Kind, Subject
from sparseport.child import Child
from sparseport.errors import EnvironmentProblem, SparseportError, UsageError

GROUP_SIZE = 64


@dataclass(frozen=True)
class Peer:
    """A stock way to an INT4 model.

    name      what rows call it
    kind      what it writes
    engine    what runs that
    packages  what has to be installed, by the names of imports
    fix       how
    make      dequantised checkpoint, output -> None
    """

    name: str
    kind: Kind
    engine: str
    packages: tuple[str, ...]
    fix: str
    make: Callable[[Path, Path], None]


def make_peers(
    subject: Subject, scratch: Path, on_step: Callable[[], None] = lambda: None
) -> tuple[list[tuple[Peer, Subject]], list[dict[str, str]]]:
    """Make every peer that is installed.

    Args:
        subject: a certified folder.
        scratch: folder for the dequantised model and what is made of it.
        on_step: called after each.

    Returns:
        What was made, and what is `missing`: `engine`, `why`, `fix`, as a result has it.

    Raises:
        UsageError: sparseport did not export the folder.
    """
    if not subject.certified:
        raise UsageError("peers are made from the weights of a folder that sparseport exported", where=subject.path)
    made: list[tuple[Peer, Subject]] = []
    missing: list[dict[str, str]] = []
    dense = scratch / "dequantised"
    for peer in PEERS:
        absent = [name for name in peer.packages if find_spec(name) is None]
        if absent:
            missing.append({"engine": peer.name, "why": f"{absent[0]} is not installed", "fix": peer.fix})
            on_step()
            continue
        if not dense.is_dir():
            write_dequantised(subject, dense)
        output = scratch / (f"{peer.name}.gguf" if peer.kind == "gguf" else peer.name)
        try:
            peer.make(dense, output)
            made.append((peer, Subject(output, peer.kind, peer.name)))
        except SparseportError as error:
            missing.append({"engine": peer.name, "why": str(error), "fix": "measure without it"})
        on_step()
    shutil.rmtree(dense, ignore_errors=True)
    return made, missing


def write_dequantised(subject: Subject, output: Path) -> None:
    """Write the model that a certified folder holds as a checkpoint in float32, tokenizer included."""
    with Child(f"{__package__}.dequantised", {"folder": str(subject.path), "output": str(output)}) as child:
        child.result()


def optimum_int4(checkpoint: Path, output: Path) -> None:
    """optimum-cli's INT4, every layer in groups of 64 (its default of 128 refuses small models)."""
    cli = Path(sys.executable).with_name("optimum-cli")
    if not cli.is_file():
        raise EnvironmentProblem("optimum-cli is not installed beside this Python", where=cli.name)
    options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--ratio", "1.0"]
    _run([str(cli), "export", "openvino", "--model", str(checkpoint), *options, "--group-size", str(GROUP_SIZE),
          str(output)])  # fmt: skip


def builder_int4(checkpoint: Path, output: Path) -> None:
    """onnxruntime-genai's model builder at its own INT4: groups of 32, int8 activations."""
    cache = output.with_name("builder-cache")
    module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    _run([*module, "-m", str(checkpoint), "-o", str(output), "-p", "int4", "-e", "cpu", "-c", str(cache)])
    shutil.rmtree(cache, ignore_errors=True)


def gguf_q4_0(checkpoint: Path, output: Path) -> None:
    """A GGUF file of Q4_0, its head Q8_0: llama.cpp's fastest 4-bit format on CPUs."""
    with Child(f"{__package__}.gguf_peer", {"checkpoint": str(checkpoint), "output": str(output)}) as child:
        child.result()


def _run(command: list[str]) -> None:
    """Run a command.

    Raises:
        EnvironmentProblem: it fails; the end of its output is quoted.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        name = "the model builder" if "-m" in command[:2] else Path(command[0]).name
        raise EnvironmentProblem(f"{name} failed", found=lines[-1] if lines else f"status {done.returncode}")


PEERS = (
    Peer(
        "optimum-cli INT4",
        "openvino",
        "openvino-genai",
        ("optimum", "openvino", "openvino_genai"),
        "pip install 'sparseport[openvino]'",
        optimum_int4,
    ),
    Peer(
        "model builder INT4",
        "onnx",
        "onnxruntime-genai",
        ("onnxruntime_genai", "onnx_ir"),
        "pip install 'sparseport[onnx]'",
        builder_int4,
    ),
    Peer(
        "llama.cpp Q4_0",
        "gguf",
        "llama.cpp",
        ("llama_cpp", "gguf"),
        "pip install llama-cpp-python gguf (it is compiled: half an hour on 2 cores)",
        gguf_q4_0,
    ),
)
