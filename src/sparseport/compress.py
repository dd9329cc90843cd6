"""NNCF weight compression after the swap: floating-point layers and the embedding, never a layer that is INT4 already.

The mask must survive: every compressed layer is read back, and a mode that revives pruned weights (NNCF's GPTQ does)
is either repaired by the mask or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparseport.child import Child
from sparseport.errors import FidelityError
from sparseport.merge.layer import prune_again
from sparseport.merging import merge_planned
from sparseport.plan import Plan
from sparseport.recipe import Recipe
from sparseport.sources import Sources
from sparseport.targets.openvino import readback
from sparseport.verify.certificate import decimal
from sparseport.weights.digest import digest
from sparseport.weights.linear import Array, DenseWeight, Mask, QuantizedWeight
from sparseport.weights.mask import revived
from sparseport.weights.rounding import error_in_steps

# Half a step of rounding, and up to half a step of clipping at the end of a symmetric grid.
_STEPS_OF_ROUNDING = 1.01


def compress_folder(
    recipe: Recipe,
    sources: Sources,
    layers: Plan,
    folder: Path,
    scratch: Path,
    linears: dict[str, dict[str, Any]],
    tensors: dict[str, dict[str, Any]],
) -> None:
    """Compress the folder's IR in place with NNCF and record what each layer became in `linears` and `tensors`.

    Raises:
        FidelityError: a mode revived pruned weights and the mask policy is `strict`.
    """
    xml = folder / "openvino_model.xml"
    floating = [layer.name for layer in layers.layers if layer.group_size is None]
    request = recipe.compress.model_dump(mode="json") | {
        "source": str(xml),
        "output": str(scratch / "compressed.xml"),
        "tokenizer": str(folder),
        "keep": [f"{module}.weight" for module in floating] if recipe.compress.mode == "none" else [],
        "branches": [
            f"{module}.lora_{side}.weight" for module, facts in linears.items() if "branch" in facts for side in "AB"
        ],
        "matrices": [name for name, facts in tensors.items() if len(facts["shape"]) >= 2],
        "embedding": recipe.embedding,
    }
    with Child("sparseport.targets.openvino.nncf_step", request) as child:
        child.result()
    _repair(scratch / "compressed.xml", xml, recipe, sources, layers, linears, tensors)


def _repair(
    compressed: Path,
    xml: Path,
    recipe: Recipe,
    sources: Sources,
    layers: Plan,
    linears: dict[str, dict[str, Any]],
    tensors: dict[str, dict[str, Any]],
) -> None:
    """Check every compressed weight against its source and its mask, mend it where allowed, and save."""
    import openvino as ov

    model = readback.read_model(compressed)
    floating = {layer.name: layer for layer in layers.layers if layer.group_size is None}
    # Without data NNCF rounds to nearest, within a step; its data-aware options move weights on purpose.
    limit = None if recipe.compress.gptq or recipe.compress.scale_estimation else _STEPS_OF_ROUNDING
    mended: list[Any] = []
    for item in readback.weights(model):
        module = item.name.removesuffix(".weight")
        weight = item.weight
        if not isinstance(weight, QuantizedWeight):
            continue
        if module in floating:
            merged = merge_planned(recipe, sources, floating[module]).weight
            assert isinstance(merged, DenseWeight)
            back = 0 if merged.mask is None else revived(weight, merged.mask)
            if merged.mask is not None and back:
                weight = _prune_again(weight, merged.mask, back, module, recipe)
                mended.append(_replace_codes(model, item, weight))
                linears[module]["re_pruned"] = back
            linears[module] |= _facts(item.element_type, weight, merged.values, limit, module)
        elif recipe.embedding == "int8" and item.name in tensors:
            source = sources.base.read(item.name)
            tensors[item.name] |= _facts(item.element_type, weight, source, _STEPS_OF_ROUNDING, item.name)
        sources.release()
    wanted = [linears[module] | {"name": module} for module in floating if recipe.compress.mode != "none"]
    if recipe.embedding == "int8":
        wanted += [facts | {"name": name} for name, facts in tensors.items() if len(facts["shape"]) >= 2]
    for facts in wanted:
        if "compressed_sha256" not in facts:
            raise FidelityError(
                "NNCF did not compress this weight",
                where=facts["name"],
                code="E_COMPRESS",
                fix="choose another --compress mode or group size",
            )
    ov.save_model(model, xml, compress_to_fp16=False)
    del model, mended


def _prune_again(weight: QuantizedWeight, mask: Mask, back: int, module: str, recipe: Recipe) -> QuantizedWeight:
    if recipe.mask_policy != "reapply":
        raise FidelityError(
            "NNCF revived pruned weights",
            where=module,
            found=f"{back} weights",
            code="E_MASK",
            fix="`--mask-policy reapply` prunes them again; without gptq NNCF keeps zeros",
        )
    pruned = prune_again(weight, mask)
    assert isinstance(pruned, QuantizedWeight)
    return pruned


def _facts(
    element_type: str, weight: QuantizedWeight, source: Array, limit: float | None, where: str
) -> dict[str, Any]:
    """What the certificate says of a compressed weight, after comparing it with its source.

    Raises:
        FidelityError: a value is further from its source than rounding explains.
    """
    largest, mean = error_in_steps(weight, source)
    if limit is not None and largest > limit:
        raise FidelityError(
            "the compressed weight is not the source's",
            where=where,
            expected=f"at most {limit} quantisation steps away",
            found=f"{largest:.2f}",
            code="E_COMPRESS",
        )
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "stored_group_size": weight.group_size,
        "stored": f"{element_type} g{weight.group_size}",
        "compressed_sha256": digest(weight),
        "compression_error_steps": {"max": decimal(largest, 3), "mean": decimal(mean, 3)},
    }


def _replace_codes(model: Any, item: readback.ReadBack, weight: QuantizedWeight) -> Any:
    """Swap the codes constant of a layer for one with the same type and shape and new codes."""
    import openvino as ov

    from sparseport.weights.packing import pack_nibbles_low_first

    node = next(
        op for op in model.get_ops() if op.get_friendly_name() == item.name and op.get_type_name() == "Constant"
    )
    signed = item.element_type.startswith("i")
    codes = weight.codes ^ np.uint8(2 ** (weight.bits - 1)) if signed else weight.codes
    data = pack_nibbles_low_first(codes) if weight.bits == 4 else np.ascontiguousarray(codes)
    tensor = ov.Tensor(data.reshape(-1), node.get_output_shape(0), node.get_element_type())
    constant = ov.op.Constant(tensor, shared_memory=True)
    constant.set_friendly_name(item.name)
    for consumer in list(node.output(0).get_target_inputs()):
        consumer.replace_source_output(constant.output(0))
    # OpenVINO does not keep the bytes alive; the caller does, until the model is saved.
    return tensor, data
