"""The command line: one verb, one function. `sparseport VERB --help` shows each with an example."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.errors import EnvironmentProblem, SparseportError, VerificationError
from sparseport.offline import go_offline, take_back
from sparseport.verbs import (
    bench,
    chat,
    doctor,
    evaluate,
    export,
    finetune,
    ovms,
    pack,
    push,
    quantize,
    report,
    run,
    search,
    sparsify,
    unpack,
)
from sparseport.verbs.output import add_output, print_judged, print_result, progress_for
from sparseport.verbs.reading import READING, add_reading


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the process exit status (see `sparseport.errors` for their meaning)."""
    with _own_process():
        return _run(_parser().parse_args(arguments))


def run_parsed(options: argparse.Namespace) -> int:
    """Run a verb whose options another command line parsed; returns the exit status, as `main` does."""
    with _own_process():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
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
    telemetry = "openvino_telemetry" in sys.modules
    switched = go_offline()
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    handler = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        take_back(switched)
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
    export.add_export(_verb(verbs, export.NAME, export.HELP, export.EXAMPLE))
    _add_verify(verbs)
    _add_inspect(verbs)
    _add_demo(verbs)
    sparsify.add_sparsify(_verb(verbs, sparsify.NAME, sparsify.HELP, sparsify.EXAMPLE))
    quantize.add_quantize(_verb(verbs, quantize.NAME, quantize.HELP, quantize.EXAMPLE))
    finetune.add_finetune(_verb(verbs, finetune.NAME, finetune.HELP, finetune.EXAMPLE))
    search.add_search(_verb(verbs, search.NAME, search.HELP, search.EXAMPLE))
    evaluate.add_evaluate(_verb(verbs, evaluate.NAME, evaluate.HELP, evaluate.EXAMPLE))
    bench.add_bench(_verb(verbs, bench.NAME, bench.HELP, bench.EXAMPLE))
    report.add_report(_verb(verbs, report.NAME, report.HELP, report.EXAMPLE))
    run.add_run(_verb(verbs, run.NAME, run.HELP, run.EXAMPLE))
    ovms.add_ovms(_verb(verbs, ovms.NAME, ovms.HELP, ovms.EXAMPLE))
    pack.add_pack(_verb(verbs, pack.NAME, pack.HELP, pack.EXAMPLE))
    unpack.add_unpack(_verb(verbs, unpack.NAME, unpack.HELP, unpack.EXAMPLE))
    chat.add_chat(_verb(verbs, chat.NAME, chat.HELP, chat.EXAMPLE))
    push.add_push(_verb(verbs, push.NAME, push.HELP, push.EXAMPLE))
    doctor.add_doctor(_verb(verbs, doctor.NAME, doctor.HELP, doctor.EXAMPLE))
    return parser


def _verb(verbs: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=help_text)
    add_output(verb, help_text, example)
    return verb


def _add_verify(verbs: Any) -> None:
    verb = _verb(
        verbs, "verify", "Compare an exported folder with its certificate, bit for bit.", "sparseport verify out"
    )
    verb.add_argument("folder", type=Path, help="exported folder, or one that holds a folder for each target")
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
        with progress_for(options).task(f"verifying {folder.name}" if several else "verifying") as step:
            try:
                verdict = verify(folder, strict=not options.ignore_extra, on_step=step)
            except VerificationError as error:
                if not several:
                    raise
                verdict = Verdict(folder, 0, 0, 0, [str(error)])  # the other folder is looked at all the same
        verdicts.append(verdict)
        numerics.append(None)
        if verdict.ok and options.numerics and verdict.certificate:
            with progress_for(options).task("comparing logits"):
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
    return print_judged(
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
    add_reading(verb)
    verb.set_defaults(run=_run_inspect, interrupted="nothing was written")


def _run_inspect(options: argparse.Namespace) -> int:
    from sparseport.inspection import inspect
    from sparseport.show import show_inspection

    with progress_for(options).task("reading") as step:
        given = {name: getattr(options, name) for name in READING if getattr(options, name) is not None}
        found = inspect(options.path, **given, on_layer=step)
    print_result(found.as_dict(), options.json, lambda: show_inspection(found, options.layers))
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

    result = run_demo(options.config, options.work_dir, tuple(options.set), progress_for(options), wheel=options.wheel)
    return print_judged(result, options, lambda: show_demo(result), lambda: require_verified(result))


if __name__ == "__main__":
    sys.exit(main())
