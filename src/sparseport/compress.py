"""NNCF weight compression after the swap: floating-point layers and the embedding, never a layer that is INT4 already.

The mask must survive: every compressed layer is read back, and a mode that revives pruned weights (NNCF's GPTQ does)
is either repaired by the mask or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparseport.child import Child
from sparseport.errors import FidelityError, UsageError
from sparseport.merge.layer import prune_again
from sparseport.plan import Plan
from sparseport.recipe import Recipe
from sparseport.sources import Sources
from sparseport.targets.openvino import readback
from sparseport.weights.digest import digest
from sparseport.weights.linear import QuantizedWeight
from sparseport.weights.mask import revived


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
        UsageError: options that do not go together.
        FidelityError: a mode revived pruned weights and the mask policy is `strict`.
    """
    check_options(recipe)
    xml = folder / "openvino_model.xml"
    floating = [layer.module for layer in layers.layers if layer.group_size is None]
    request = recipe.compress.model_dump(mode="json") | {
        "source": str(xml),
        "output": str(scratch / "compressed.xml"),
        "tokenizer": str(folder),
        "keep": [f"{module}.weight" for module in floating] if recipe.compress.mode == "none" else [],
        "matrices": [name for name, facts in tensors.items() if len(facts["shape"]) >= 2],
        "embedding": recipe.embedding,
    }
    with Child("sparseport.targets.openvino.nncf_step", request) as child:
        child.result()
    _repair(scratch / "compressed.xml", xml, recipe, sources, set(floating), linears)
    for facts in tensors.values():
        if recipe.embedding == "int8" and len(facts["shape"]) >= 2:
            facts["stored"] = "nncf int8_asym"


def check_options(recipe: Recipe) -> None:
    """Refuse combinations that NNCF would refuse late or ignore.

    Raises:
        UsageError: names the options.
    """
    options = recipe.compress
    four_bits = options.mode.startswith("int4")
    if (options.scale_estimation or options.gptq) and options.dataset is None:
        raise UsageError(
            "data-aware compression needs a dataset",
            where="--compress-dataset",
            fix="give a text file, one sample a line",
        )
    if not four_bits and (options.awq or options.scale_estimation or options.gptq or options.ratio != 1.0):
        raise UsageError(
            "ratio, awq, scale estimation and gptq belong to 4-bit modes", where="--compress", found=options.mode
        )


def _repair(
    compressed: Path,
    xml: Path,
    recipe: Recipe,
    sources: Sources,
    floating: set[str],
    linears: dict[str, dict[str, Any]],
) -> None:
    """Check every compressed layer against its mask, put pruned weights back where allowed, and save."""
    import openvino as ov

    model = readback.read_model(compressed)
    mended: list[Any] = []
    for item in list(readback.weights(model)):
        module = item.name.removesuffix(".weight")
        if module not in floating or not isinstance(item.weight, QuantizedWeight):
            continue
        facts = linears[module]
        weight = item.weight
        mask = sources.dense(module, facts["rule"]).mask if "mask_sha256" in facts else None
        back = revived(weight, mask) if mask is not None else 0
        if mask is not None and back:
            if recipe.mask_policy != "reapply":
                raise FidelityError(
                    "NNCF revived pruned weights",
                    where=module,
                    found=f"{back} weights",
                    code="E_MASK",
                    fix="`--mask-policy reapply` prunes them again; without gptq NNCF keeps zeros",
                )
            weight = prune_again(weight, mask)  # type: ignore[assignment]
            mended.append(_replace_codes(model, item, weight))
            facts["re_pruned"] = back
        facts |= {
            "bits": weight.bits,
            "group_size": weight.group_size,
            "stored_group_size": weight.group_size,
            "stored": f"{item.element_type} g{weight.group_size}",
            "compressed_sha256": digest(weight),
        }
    for module in floating:
        if recipe.compress.mode != "none" and "compressed_sha256" not in linears[module]:
            raise FidelityError(
                "NNCF did not compress this layer",
                where=module,
                code="E_COMPRESS",
                fix="choose another --compress mode or group size",
            )
    ov.save_model(model, xml, compress_to_fp16=False)
    del model, mended


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
