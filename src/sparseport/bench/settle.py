"""Write chosen settings into a finished folder, where its runtimes find them, and seal its certificate anew.

OpenVINO's CPU plugin takes some properties from the IR itself (`rt_info`, section `runtime_options`), so that every
application gets them. `openvino_config.json` has all of them, for whoever compiles a model in code of their own. ONNX
Runtime's stand in `genai_config.json`, which onnxruntime-genai reads. The evidence lies beside them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from sparseport.bench.knobs import Settings
from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.child import Child
from sparseport.errors import BadInput, FidelityError
from sparseport.model_card.text import FILE_NAME as CARD
from sparseport.model_card.writing import with_card
from sparseport.progress import Progress
from sparseport.publish import copy_linked, staged_output
from sparseport.verify.certificate import FILE_NAME, Certificate, certified_folders, file_facts
from sparseport.verify.folder import require, verify
from sparseport.verify.judge import check_numerics

EVIDENCE = "sparseport.sweep.json"
CONFIG = "openvino_config.json"
IN_THE_IR = ("DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION")
"""Properties that OpenVINO's CPU plugin takes from an IR unless the application sets them."""

# Where the information about the model as a whole ends, which comes last in an IR.
_MODEL_INFO_END = "\t</rt_info>\n</net>\n"
_OPTIONS = re.compile(r"\t\t<runtime_options>\n(.*?)\t\t</runtime_options>\n", re.DOTALL)
_OPTION = re.compile(r'\t\t\t<(\w+) value="([^"]*)" />\n')


def settle(
    folder: Path,
    settings: Settings,
    evidence: dict[str, Any],
    *,
    at_rest: Callable[[Path], dict[str, float]] | None = None,
    numerics: bool = True,
    progress: Progress | None = None,
) -> Certificate:
    """Give a folder its settings: whole, or it stays as it was.

    Args:
        folder: an exported folder of one target, unchanged since.
        settings: what a sweep chose; without any, earlier ones are taken back.
        evidence: what the sweep measured, as plain data.
        at_rest: measures the drift of the folder as applications find it, and raises if it is too much. The evidence
            gets it as `at_rest`: some settings have no place in a folder that every application looks at.
        numerics: whether logits at the new default settings are compared with the reference again. Without it, the
            certificate says of changed settings that they were not compared.
        progress: where to report steps.

    Returns:
        The new certificate.

    Raises:
        VerificationError: the folder is not as it was certified.
        FidelityError: the runtime does not take the settings from the folder.
    """
    folder, progress = folder.absolute(), progress or Progress("quiet")
    require(verify(folder))
    before = Certificate.read(folder)
    with staged_output(folder, overwrite=True, ours=lambda path: bool(certified_folders(path))) as stage:
        copy_linked(folder, stage)
        write = _write_onnx if before.target == "onnx" else _write_openvino
        changed, replaced = write(stage, settings, _replaced(stage))
        if at_rest is not None:
            with progress.task("drift of the folder by itself"):
                evidence = {**evidence, "at_rest": at_rest(stage)}
        _replace(stage / EVIDENCE, json.dumps({**evidence, "replaced": replaced}, indent=2) + "\n")
        body = dict(before.body)
        body["files"] = dict(before.files)
        for name in (*changed, EVIDENCE):
            body["files"].pop(name, None)
            if (stage / name).is_file():
                body["files"][name] = file_facts(stage / name)
        if numerics and body["numerics"].get("run"):
            with progress.task("comparing logits"):
                body["numerics"] = check_numerics(stage, before.target, before.portable, sorted(before.adapters))
        elif any(body["files"].get(name) != before.files.get(name) for name in changed):
            body["numerics"] = {"run": False}
        # A card that shows measured logits and speeds would show those of other settings.
        sealed = with_card(Certificate(body), stage) if CARD in before.files else Certificate(body)
        (stage / FILE_NAME).unlink()
        sealed.write(stage)
        require(verify(stage))
    return sealed


@contextmanager
def unsettled(folder: Path) -> Iterator[Path]:
    """The folder as it was before any sweep: itself, or for as long as the block runs a copy beside it.

    The copy's files are links to the folder's, where the file system has them.
    """
    if not (folder / EVIDENCE).is_file():
        yield folder
        return
    beside = folder.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir=beside if os.access(beside, os.W_OK) else None) as name:
        copy = Path(name) / folder.absolute().name
        copy_linked(folder, copy)
        write = _write_onnx if Certificate.read(folder).target == "onnx" else _write_openvino
        write(copy, {}, _replaced(copy))
        (copy / EVIDENCE).unlink()
        yield copy


def runtime_options(xml: str) -> dict[str, str]:
    """The runtime options that an IR's text has."""
    section = _OPTIONS.search(xml)
    return dict(_OPTION.findall(section[1])) if section else {}


def with_runtime_options(xml: str, options: dict[str, str], where: object) -> str:
    """An IR's text with these runtime options, in place of those it has.

    Raises:
        BadInput: the text has no information about the model to put them into.
    """
    lines = "".join(f"\t\t\t<{name} value={quoteattr(value)} />\n" for name, value in options.items())
    section = f"\t\t<runtime_options>\n{lines}\t\t</runtime_options>\n" if options else ""
    place = _OPTIONS.search(xml)
    if place is not None:
        return xml[: place.start()] + section + xml[place.end() :]
    head, end, tail = xml.rpartition(_MODEL_INFO_END)
    if not end:
        raise BadInput("the IR has no rt_info of its model", where=where)
    return head + section + end + tail


def taken_properties(folder: str, names: list[str]) -> dict[str, Any]:
    """What OpenVINO's CPU plugin says of properties, for a folder compiled without any; a child's step."""
    import openvino as ov

    compiled = ov.Core().compile_model(Path(folder) / "openvino_model.xml", "CPU")
    return {name: _plain(compiled.get_property(name)) for name in names}


def _replaced(stage: Path) -> dict[str, Any]:
    """What an earlier sweep put other values in place of: name -> value, None for none."""
    file = stage / EVIDENCE
    return dict(read_json(file, what=EVIDENCE).get("replaced", {})) if file.is_file() else {}


def _write_openvino(stage: Path, settings: Settings, earlier: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Both places; returns the names of files that changed, and what the IR had before any sweep.

    Raises:
        FidelityError: the plugin does not take what the IR says.
    """
    graph = stage / "openvino_model.xml"
    text = graph.read_text(encoding="utf-8")
    inside = {name: str(settings[name]) for name in IN_THE_IR if name in settings}
    options, replaced = _exchanged(runtime_options(text), inside, earlier)
    _replace(graph, with_runtime_options(text, options, graph.name))
    (stage / CONFIG).unlink(missing_ok=True)
    if settings:
        write_json(stage / CONFIG, settings)
    if inside:
        with Child("sparseport.bench.settle", {"folder": str(stage), "names": sorted(inside)}) as child:
            taken = child.result()
        if taken != inside:
            raise FidelityError("OpenVINO does not take settings from the IR", expected=inside, found=taken)
    return [graph.name, CONFIG], replaced


def _write_onnx(stage: Path, settings: Settings, earlier: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """`genai_config.json`; returns its name, and the session options that it had before any sweep."""
    file = stage / "genai_config.json"
    config = read_json(file, what=file.name)
    decoder = config["model"]["decoder"]
    decoder["session_options"], replaced = _exchanged(decoder["session_options"], settings, earlier)
    file.unlink()
    write_json(file, config)
    return [file.name], replaced


def _exchanged(
    options: dict[str, Any], settings: Settings, earlier: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options as they were before any sweep, with these settings; and what those took the place of."""
    original = {name: value for name, value in {**options, **earlier}.items() if value is not None}
    return {**original, **settings}, {name: original.get(name) for name in settings}


def _replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)  # a link to the old folder's, which stays as it is
    file.write_text(text, encoding="utf-8")


def _plain(value: Any) -> str:
    """A property as text, in the words in which it is set."""
    name = getattr(value, "get_type_name", None)
    return str(name() if name else value)


if __name__ == "__main__":
    from sparseport.child import serve

    serve(taken_properties)
