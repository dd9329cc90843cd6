"""A further adapter for a base that was exported already: one more file that the runtime switches on and off.

The folder is made anew beside itself, from links to its own files, and takes its place by one rename: it has the new
adapter and a certificate that speaks of it, or it is as it was.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.branches import branch_facts, require_unmerged
from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.checkpoints.readme import FILE_NAME as CARD
from sparseport.errors import BadInput, OutputExists, Unsupported
from sparseport.extras import require_packages
from sparseport.fitting import Fit, fit_adapter
from sparseport.model_card.writing import with_card
from sparseport.progress import Progress
from sparseport.publish import copy_linked, staged_output
from sparseport.targets.read_back import open_reader
from sparseport.verify.adapters import require_adapters
from sparseport.verify.bits import digest_graph
from sparseport.verify.certificate import FILE_NAME, Certificate, certified_folders, file_facts
from sparseport.verify.folder import require, verify
from sparseport.verify.judge import check_switched
from sparseport.weights.branch import stored_branch
from sparseport.weights.linear import LowRankBranch

SUFFIXES = {"openvino": ".safetensors", "onnx": ".onnx_adapter"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def add_adapter(
    folder: Path | str,
    adapter: Path | str,
    name: str,
    *,
    sub_adapter: str = "maximal",
    search_space: Path | None = None,
    branch_dtype: str = "stored",
    numerics: bool = True,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[Certificate]:
    """Put a further un-merged adapter beside the base of an exported folder.

    An OpenVINO folder takes any adapter for its layers. An ONNX folder has places only for the layers that the adapter
    of its export (`--branches adapter`) had, in that adapter's dtypes. Where a sub-network was exported, the adapter is
    one of the whole model: what lies in blocks that were left out is left out, and the rest is cut like its layers.

    Args:
        folder: an exported folder, of one target or of several; unchanged since.
        adapter: a folder in PEFT's layout, for the base of that export.
        name: what the file is called, without its suffix.
        sub_adapter: maximal, heuristic, minimal, or a JSON file of ranks.
        search_space: its search space, where it is not beside the adapter.
        branch_dtype: `stored`, or `fp16` to round to float16.
        numerics: whether the runtime's results with it are compared with torch's.
        allow_pickle: accept `adapter_model.bin`.
        progress: where to report steps; quiet by default.

    Returns:
        The new certificates, one for each target.

    Raises:
        VerificationError: the folder is not as it was certified.
        BadInput, Unsupported, OutputExists: the adapter does not fit, was trained to be merged, or the name is taken.
        FidelityError: what was written is not the adapter, or the runtime computes something else with it.
    """
    folder, progress = Path(folder).absolute(), progress or Progress("quiet")
    if not _NAME.fullmatch(name):
        raise BadInput("an adapter's name is made of letters, digits, - and _", where="name", found=name[:80])
    parts = certified_folders(folder)
    if not parts:
        raise BadInput("no folder exported by sparseport", where=folder, fix="export the base with --branches adapter")
    for part in parts:
        require(verify(part))
        certificate = Certificate.read(part)
        if certificate.draft is not None:
            raise Unsupported(
                "an adapter that the runtime switches changes the main network and not its draft",
                where=part,
                fix="export the base without --draft",
            )
        require_packages([certificate.target])
        if (part / f"{name}{SUFFIXES[certificate.target]}").exists():
            raise OutputExists("the folder has such an adapter", where=part, found=name, fix="give another name")
    with AdapterFolder.open(adapter, allow_pickle=allow_pickle) as opened:
        require_unmerged(opened)
        fits = {}
        for part in parts:
            config = read_json(part / "config.json", what="model config")
            fits[part] = fit_adapter(opened, Certificate.read(part), config, sub_adapter, search_space)
        with staged_output(folder, overwrite=True, ours=lambda path: bool(certified_folders(path))) as stage:
            copy_linked(folder, stage)
            return [
                _add(stage / part.relative_to(folder), name, opened, fits[part], branch_dtype, numerics, progress)
                for part in parts
            ]


def _add(
    folder: Path,
    name: str,
    adapter: AdapterFolder,
    fit: Fit,
    dtype: str,
    numerics: bool,
    progress: Progress,
) -> Certificate:
    """Write the adapter into one target's folder, read it back, compare it, and seal the certificate anew."""
    certificate = Certificate.read(folder)
    target, file = certificate.target, f"{name}{SUFFIXES[certificate.target]}"
    reader: Any = open_reader(target, folder)  # with what only one target's reader can say
    digest_graph(reader, certificate.linears, certificate.tensors)  # places are known when all weights are
    stored: dict[str, LowRankBranch] = {}
    facts: dict[str, dict[str, Any]] = {}
    with progress.task(f"writing {file}", len(fit.written)) as step:
        for own, module in fit.written.items():
            source = fit.branch(adapter, own)
            branch, changed = stored_branch(source, dtype, module, fold=target == "openvino")
            stored[module] = branch if target == "openvino" else _in_place(reader, module, branch)
            facts[module] = branch_facts(source, stored[module], changed, folded=target == "openvino")
            step()
        _write(folder / file, target, stored, reader)
    with progress.task("reading back"):
        require_adapters(reader, target, {file: facts})
    body = certificate.body
    body["adapters"] = {**certificate.adapters, file: facts}
    body["inputs"] = {**body["inputs"], f"adapter {name}": adapter.sha256()}
    body["files"] = {**certificate.files, file: file_facts(folder / file)}
    if numerics:
        with progress.task("comparing logits"):
            found = check_switched(folder, target, [file])
            body["numerics"] = {**body["numerics"], **found}
    sealed = Certificate(body)
    if CARD in sealed.files:
        sealed = with_card(sealed, folder)  # the card names the adapters
    (folder / FILE_NAME).unlink()  # a link to the old folder's, which stays as it is
    sealed.write(folder)
    return sealed


def _in_place(reader: Any, module: str, branch: LowRankBranch) -> LowRankBranch:
    """A branch in the dtypes of its place in an ONNX graph; float16 is widened where the place takes float32.

    Raises:
        Unsupported: there is no place for it, or one for float16 only.
    """
    place = reader.places().get(module)
    if place is None:
        raise Unsupported(
            "the graph has no place for a layer of this adapter",
            where=module,
            found="places for " + (", ".join(sorted(reader.places())[:3]) or "no layer"),
            fix="export the base again with --branches adapter and an adapter that has all layers",
        )
    wanted = [np.dtype(kind) for kind in place.dtypes]
    a, b = (part.astype(kind) for part, kind in zip((branch.a, branch.b), wanted, strict=True))
    if not (np.array_equal(a, branch.a) and np.array_equal(b, branch.b)):
        raise Unsupported(
            "the graph's places for adapters are in float16, and this adapter is not",
            where=module,
            fix="give branch_dtype fp16 to round it, or export the base again with a float32 adapter",
        )
    return replace(branch, a=a, b=b)


def _write(path: Path, target: str, branches: dict[str, LowRankBranch], reader: Any) -> None:
    if target == "onnx":
        from sparseport.targets.onnx.adapter import write_adapter_file

        write_adapter_file(path, branches)
        return
    from sparseport.checkpoints.peft import PREFIX
    from sparseport.checkpoints.safetensors import spec_of, write_safetensors
    from sparseport.weights.branch import in_order

    orders = reader.orders(list(branches))
    specs = []
    for module, branch in branches.items():
        for side, values in (("A", in_order(branch.a, orders[module])), ("B", branch.b)):
            specs.append(spec_of(f"{PREFIX}{module}.lora_{side}.weight", values))
    write_safetensors(path, specs)
