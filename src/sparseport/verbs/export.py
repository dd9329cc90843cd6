"""`sparseport export`: fine-tuned checkpoints to a runtime's folder. `optimum-cli export sparseport` is the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparseport.errors import UsageError
from sparseport.verbs.output import print_judged, print_result, progress_for
from sparseport.verbs.reading import READING, add_reading

NAME = "export"
HELP = "Export a fine-tuned model to a runtime's folder, proven and certified."
EXAMPLE = "sparseport export --target openvino --base sparse-int4 --sparse-base sparse --adapter adapter --output out"

_FIELDS = (
    "base",
    "sparse_base",
    "adapter",
    "sub_adapter",
    "search_space",
    "draft",
    "target",
    "output",
    "rounding",
    "embedding",
    "gguf_dtype",
    "nncf_base_dtype",
    *READING,
    "branches",
    "branch_dtype",
    "mask_policy",
    "tokenizer",
    "card",
    "numerics",
    "overwrite",
)


def add_export(verb: argparse.ArgumentParser, base: Sequence[str] = ("--base",)) -> None:
    """Give the verb its options; `base` are the names of the option for the base model."""
    verb.add_argument("--config", type=Path, help="recipe file; other options override it")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    verb.add_argument(
        *base, dest="base", metavar="BASE", help="folder of the base model: dense, sparse, or INT4; or a .gguf file"
    )
    verb.add_argument("--sparse-base", help="sparse floating-point base that the INT4 base was made from")
    verb.add_argument("--adapter", help="folder of the fine-tuned adapter")
    verb.add_argument("--sub-adapter", metavar="WHICH", help="maximal (default), heuristic, minimal, or a JSON file")
    verb.add_argument("--search-space", metavar="FILE", help="its search space, where it is not beside the adapter")
    verb.add_argument(
        "--draft",
        metavar="WHICH",
        help="export a second sub-network as the draft for speculative decoding: heuristic, minimal, or a JSON file",
    )
    verb.add_argument(
        "--target",
        action="append",
        choices=["openvino", "onnx"],
        help="runtime to export to (default openvino); may be given twice",
    )
    verb.add_argument("--output", help="folder to write")
    verb.add_argument("--rounding", choices=["sqft", "paper"], help="QA-SparsePEFT rounding rule (default sqft)")
    verb.add_argument("--embedding", choices=["fp16", "fp32", "int8"], help="how embedding and head are stored")
    verb.add_argument("--gguf-dtype", choices=["float16", "float32"], help="dtype of a GGUF base (default float16)")
    verb.add_argument(
        "--nncf-base-dtype",
        choices=["stored", "bfloat16", "float32"],
        help="dtype that the base was in when an NNCF checkpoint was tuned or stripped (default stored: as its files)",
    )
    add_reading(verb)
    verb.add_argument(
        "--branches",
        choices=["refuse", "graph", "adapter"],
        help="an adapter that no merge keeps exact (dense on a sparse or INT4 base): refuse (default), keep it beside "
        "its base in the graph, or as a file that the runtime switches on and off",
    )
    verb.add_argument(
        "--branch-dtype",
        choices=["stored", "fp16"],
        help="dtype of un-merged branches: as in the adapter's files (default), or rounded to float16",
    )
    verb.add_argument(
        "--mask-policy",
        choices=["strict", "keep-codes", "reapply"],
        help="when an input breaks its own mask: refuse (default), keep and record, or prune again",
    )
    compress = verb.add_argument_group("NNCF compression of floating-point layers (INT4 layers are never touched)")
    compress.add_argument(
        "--compress",
        dest="compress.mode",
        metavar="MODE",
        choices=["none", "int8_sym", "int8_asym", "int4_sym", "int4_asym"],
        help="none (default), int8_sym, int8_asym, int4_sym, int4_asym",
    )
    compress.add_argument(
        "--compress-ratio",
        dest="compress.ratio",
        type=float,
        metavar="SHARE",
        help="share of layers in 4 bits, the rest in 8",
    )
    compress.add_argument(
        "--compress-group-size",
        dest="compress.group_size",
        type=int,
        metavar="N",
        help="input columns per group (default 64; -1: one group per row)",
    )
    compress.add_argument("--compress-dataset", dest="compress.dataset", metavar="FILE", help="one sample a line")
    for name, text in (
        ("scale-estimation", "NNCF's scale estimation; needs a dataset"),
        ("gptq", "NNCF's GPTQ; needs a dataset, and revives pruned weights"),
    ):
        key = f"compress.{name.replace('-', '_')}"
        compress.add_argument(f"--compress-{name}", dest=key, action="store_true", default=None, help=text)
    compress.add_argument(
        "--draft-compress",
        dest="draft_compress.mode",
        metavar="MODE",
        choices=["none", "int8_sym", "int8_asym", "int4_sym", "int4_asym"],
        help="the same for the draft alone, which --compress leaves as it is",
    )
    onnx = verb.add_argument_group("the ONNX target")
    onnx.add_argument(
        "--onnx-format",
        dest="onnx.format",
        choices=["nbits", "qdq"],
        help="INT4 layers as MatMulNBits of ONNX Runtime (default), or as standard operators only",
    )
    onnx.add_argument(
        "--onnx-accuracy",
        dest="onnx.accuracy",
        choices=["exact", "fast"],
        help="products in float32 (default), or with activations rounded to int8, which is faster and drifts",
    )
    onnx.add_argument(
        "--onnx-portable",
        dest="onnx.portable",
        action="store_true",
        default=None,
        help="a model.onnx that OpenVINO's read_model runs as well: groups of 32, 64 or 128 only",
    )
    verb.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_false",
        default=None,
        help="leave tokenizer and detokenizer out",
    )
    verb.add_argument("--no-card", dest="card", action="store_false", default=None, help="leave README.md out")
    verb.add_argument(
        "--no-numerics",
        dest="numerics",
        action="store_false",
        default=None,
        help="skip the comparison of logits (the bits are proven all the same)",
    )
    verb.add_argument("--overwrite", action="store_true", default=None, help="replace an existing output")
    verb.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    verb.set_defaults(run=run_export, interrupted="no half-written output was left")


def run_export(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status.

    Raises:
        UsageError: the base or the output is missing, or options do not fit together.
    """
    from sparseport import pipeline
    from sparseport.plan import require_exportable
    from sparseport.recipe import apply_settings, load_job, make_recipe
    from sparseport.show import show_export, show_plan

    given = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    for key, value in vars(options).items():
        section, dot, name = key.partition(".")
        if dot and value is not None:
            given.setdefault(section, {})[name] = value
    apply_settings(given, tuple(options.set))
    if options.config:
        recipe = load_job(options.config, export=given).export
    else:
        for name in ("base", "output"):
            if not given.get(name):
                raise UsageError(f"--{name} is missing", fix=f"give --{name} DIR, or a --config that names it")
        recipe = make_recipe(given)
    if options.dry_run:
        plan = pipeline.plan(recipe)
        return print_judged(plan.as_dict(), options, lambda: show_plan(plan), lambda: require_exportable(plan))
    result = pipeline.export(recipe, progress_for(options))
    print_result(result.as_dict(), options.json, lambda: show_export(result))
    return 0
