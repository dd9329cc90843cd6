"""Run one export: plan, merge layer by layer, write every target, read back, compare, certify, publish."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.branches import branch_notes, hand_over, take_adapter
from sparseport.compress import compress_folder
from sparseport.evidence import Facts, for_target, linear_facts, recipe_facts, revived_note, totals
from sparseport.extras import require_packages
from sparseport.merging import merge_planned
from sparseport.model_card.origin import Origin, origin_of
from sparseport.model_card.writing import with_card
from sparseport.networks import Network, Notes, networks_of
from sparseport.plan import Plan, require_exportable
from sparseport.progress import Progress
from sparseport.publish import check_space, staged_output
from sparseport.recipe import Recipe, Target
from sparseport.sources import Sources, open_sources
from sparseport.targets.read_back import open_reader
from sparseport.targets.writer import TargetWriter, as_stored
from sparseport.verify.adapters import require_adapters
from sparseport.verify.bits import require_read_back
from sparseport.verify.certificate import SCHEMA, Certificate, certified_folders, file_facts
from sparseport.verify.judge import check_numerics
from sparseport.verify.pairs import require_paired
from sparseport.weights.digest import value_digest
from sparseport.weights.linear import Array


@dataclass(frozen=True)
class TargetExport:
    """One runtime's finished folder and its certificate."""

    target: Target
    folder: Path
    certificate: Certificate

    @property
    def name(self) -> str:
        """`openvino`, or `openvino-draft`."""
        return self.certificate.folder_name


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    folder   the recipe's output
    exports  each target's folder with its certificate
    notes    sentences worth knowing
    """

    folder: Path
    exports: list[TargetExport]
    notes: list[str]

    @property
    def certificate(self) -> Certificate:
        """The certificate of the first target; all but drafts' certify the same weights."""
        return self.exports[0].certificate

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "folder": str(self.folder),
            "notes": self.notes,
            "totals": self.certificate.totals,
            "exports": [
                {
                    "target": export.target,
                    "draft": export.certificate.draft is not None,
                    "folder": str(export.folder),
                    "numerics": export.certificate.body["numerics"],
                }
                for export in self.exports
            ],
        }


def plan(recipe: Recipe) -> Plan:
    """What `export` would do, without doing it (`--dry-run`).

    Args:
        recipe: what to export and how.

    Returns:
        Each layer's way through the export, with the reason where a layer is refused, and what the export will need.

    Raises:
        SparseportError: an input cannot be opened or does not fit the others.
    """
    with open_sources(recipe) as sources:
        main, *drafts = networks_of(recipe, sources)
        return replace(main.layers, draft=drafts[0].layers) if drafts else main.layers


def export(recipe: Recipe, progress: Progress | None = None) -> ExportResult:
    """Export a fine-tuned model; the output folder appears whole, proven and certified, or not at all.

    One target fills the output folder itself; several have a folder each in it, made from one merge. With a draft each
    target has two folders, that of the main network, which is the same as without a draft, and that of the draft.

    Args:
        recipe: what to export and how.
        progress: where to report steps; quiet by default.

    Returns:
        The folder, and for each target its own folder and certificate.

    Raises:
        SparseportError: any of its subclasses, each with its exit code; nothing is written then.
    """
    progress = progress or Progress("quiet")
    require_packages(recipe.target)
    with open_sources(recipe) as sources:
        networks = networks_of(recipe, sources)
        for network in networks:
            require_exportable(network.layers)
        notes = Notes(progress)
        for network in networks:
            notes.tell(network)
        check_space(recipe.output, sum(one.layers.output_bytes + one.layers.scratch_bytes for one in networks))
        with staged_output(
            recipe.output, recipe.overwrite, ours=lambda folder: bool(certified_folders(folder))
        ) as stage:
            exports: list[TargetExport] = []
            for network in networks:
                for target, certificate in _export(network, stage, progress).items():
                    certificate.write(network.folder(target, stage))
                    exports.append(TargetExport(target, network.folder(target, recipe.output), certificate))
                notes.tell(network)
            if len(networks) > 1:
                require_paired({stage / export.name: export.certificate for export in exports})
    return ExportResult(recipe.output, exports, notes.told)


def _export(network: Network, stage: Path, progress: Progress) -> dict[Target, Certificate]:
    recipe, sources, layers = network.recipe, network.sources, network.layers
    folders = {target: network.folder(target, stage) for target in recipe.target}
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=stage) as scratch_name:
        scratches = {target: Path(scratch_name) / target for target in recipe.target}
        small = sources.small_tensors()
        with ExitStack() as stack:
            writers: dict[Target, TargetWriter] = {}
            for target in recipe.target:
                folders[target].mkdir(exist_ok=True)
                scratches[target].mkdir()
                writer = _open_writer(target, recipe, sources, layers, folders[target], scratches[target], small)
                writers[target] = stack.enter_context(writer)
            with progress.task(network.step("merging layers"), len(layers.layers)) as step:
                merged = _merge_all(recipe, sources, layers, writers, step)
            layers.notes.extend(revived_note(merged))
            linears = {target: for_target(merged, layers, target) for target in recipe.target}
            for target in recipe.target:
                layers.notes.extend(branch_notes(linears[target], target, recipe.branch_dtype))
            adapters = {target: take_adapter(recipe, target, linears[target]) for target in recipe.target}
            tensors = _add_tensors(recipe, sources, layers, small, writers)
            with progress.task("hashing inputs"):
                inputs = sources.facts()
                origin = _origin(recipe, sources)
                inputs |= {role: inputs.get(role, {}) | files for role, files in origin.files.items()}
                layers.notes.extend(origin.notes)
            for target, writer in writers.items():
                with progress.task(network.step("building the graph", target)):
                    writer.save()
                _take_over(writer, linears[target], tensors[target])
                notes = list(writer.notes)
                if writer.left_out:
                    notes.append(f"{len(writer.left_out)} biases of zeros are left out: the model has no such bias")
                layers.notes.extend(note for note in notes if note not in layers.notes)
        if "openvino" in recipe.target and (recipe.compress.mode != "none" or recipe.embedding == "int8"):
            with progress.task(f"compressing ({recipe.compress.mode}, embedding {recipe.embedding})"):
                parts = folders["openvino"], scratches["openvino"], linears["openvino"], tensors["openvino"]
                compress_folder(recipe, sources, layers, *parts)
            if recipe.compress.dataset is not None:
                inputs["dataset"] = {"sha256": file_facts(recipe.compress.dataset)["sha256"]}
    certificates = {}
    for target in recipe.target:
        body = {
            "schema": SCHEMA,
            "sparseport": version("sparseport"),
            "target": target,
            "recipe": recipe_facts(recipe, target),
            "inputs": inputs,
            "origin": origin.facts,
            "versions": {**writers[target].versions, "numpy": np.__version__},
        }
        facts = linears[target], tensors[target], writers[target].around, adapters[target]
        certificate = Certificate({**body, **_prove(network, target, folders[target], *facts, progress)})
        if network.draft:
            certificate.body["draft"] = {"super_network_sha256": certificate.super_network_sha256()}
        certificates[target] = with_card(certificate, folders[target]) if recipe.card else certificate
    return certificates


def _origin(recipe: Recipe, sources: Sources) -> Origin:
    """What the inputs say of where the model comes from; a converted base has no README.md, but its file speaks."""
    converted = recipe.base if "base" in sources.extra_files else None
    roles = {"base": None if converted else sources.base, "sparse_base": sources.sparse, "adapter": sources.adapter}
    folders = {role: folder.path for role, folder in roles.items() if folder is not None}
    return origin_of(folders, sources.adapter.base_model_name if sources.adapter else "", converted)


def _open_writer(
    target: Target,
    recipe: Recipe,
    sources: Sources,
    layers: Plan,
    folder: Path,
    scratch: Path,
    small: Mapping[str, Any],
) -> TargetWriter:
    base, config = sources.base, sources.written_config()
    if target == "onnx":
        from sparseport.targets.onnx.writer import OnnxWriter

        return OnnxWriter(
            folder,
            scratch,
            base.path,
            config,
            small,
            recipe.tokenizer,
            recipe.embedding,
            recipe.onnx,
            recipe.branches,
        )
    from sparseport.targets.openvino.writer import OpenVinoWriter

    dtype = _dtype_label(recipe, layers)
    return OpenVinoWriter(folder, scratch, base.path, config, small, recipe.tokenizer, dtype, recipe.branches)


def _merge_all(
    recipe: Recipe,
    sources: Sources,
    layers: Plan,
    writers: Mapping[Target, TargetWriter],
    step: Callable[[], None],
) -> Facts:
    """Merge every layer once, hand it to every writer, and return what the certificates say of it."""
    facts = {}
    for layer in layers.layers:
        merged = merge_planned(recipe, sources, layer)
        for target, writer in writers.items():
            writer.add_linear(layer.name, merged.weight, layer.stored[target].layout)
        facts[layer.name] = linear_facts(layer, merged, sources, recipe)
        if merged.branch is not None:
            facts[layer.name]["branch"] = hand_over(layer.name, merged.branch, writers, recipe)
        sources.release()
        step()
    return facts


def _add_tensors(
    recipe: Recipe, sources: Sources, layers: Plan, small: Mapping[str, Array], writers: Mapping[Target, TargetWriter]
) -> dict[Target, Facts]:
    """Hand embedding, head and other matrices over; the writers have the small tensors already."""
    facts: dict[Target, Facts] = {target: {} for target in writers}
    for source in layers.tensors:
        name = sources.written_name(source)
        assert name is not None, "the plan has only tensors that are written"
        values = small[name] if name in small else sources.base.read(source)
        changed = 0
        stored = values
        own: dict[Target, dict[str, Any]] = {target: {} for target in writers}
        if values.ndim >= 2:
            stored, changed = as_stored(values, recipe.embedding, name)
            own = {target: writer.add_tensor(name, stored) for target, writer in writers.items()}
        for target in writers:
            facts[target][name] = {
                "shape": list(values.shape),
                "source_dtype": values.dtype.name,
                "changed": changed,
                "readback": {},
                "value_sha256": value_digest(stored),
                **own[target],
            }
        sources.release()
    return facts


def _take_over(writer: TargetWriter, linears: Facts, tensors: Facts) -> None:
    """What the writer says of the graph enters the facts; tensors that it left out leave them."""
    for name in writer.left_out:
        del tensors[name]
    for name, facts in writer.certified().items():
        (linears if name in linears else tensors)[name] |= facts


def _prove(
    network: Network,
    target: Target,
    folder: Path,
    linears: Facts,
    tensors: Facts,
    around: dict[str, Any],
    adapters: dict[str, Facts],
    progress: Progress,
) -> dict[str, Any]:
    """Read a written folder back, compare its logits, and return these parts of its certificate.

    Raises:
        FidelityError: a weight is not the one that was merged, or the logits are not the model's.
    """
    with progress.task(network.step("reading back", target), len(linears)) as step:
        reader = open_reader(target, folder)
        require_read_back(reader, target, linears, tensors, around, step)
        require_adapters(reader, target, adapters)
    numerics: dict[str, Any] = {"run": False}
    if network.recipe.numerics:
        with progress.task(network.step("comparing logits", target)):
            numerics = check_numerics(folder, target, network.recipe.onnx.portable, sorted(adapters))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "linears": linears,
        "tensors": tensors,
        **({"graph": around} if around else {}),
        **({"adapters": adapters} if adapters else {}),
        "totals": totals(linears),
        "numerics": numerics,
        "files": {path.relative_to(folder).as_posix(): file_facts(path) for path in files},
    }


def _dtype_label(recipe: Recipe, layers: Plan) -> str:
    if any(layer.group_size for layer in layers.layers) or recipe.compress.mode.startswith("int4"):
        return "int4"
    if recipe.compress.mode.startswith("int8"):
        return "int8"
    return "fp32" if any(form.label == "f32" for layer in layers.layers for form in layer.stored.values()) else "fp16"
