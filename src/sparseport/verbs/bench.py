"""`sparseport bench`: how fast folders run on this machine, side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparseport.errors import OutputExists, UsageError
from sparseport.progress import Progress

NAME = "bench"
HELP = "Measure folders on this machine: speed, memory, load time; a fresh process each time, in interleaved rounds."
EXAMPLE = "sparseport bench out --rounds 5 --output bench.json"


def add_bench(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument(
        "paths", nargs="+", type=Path, metavar="DIR", help="exported folder, other tools' folder, checkpoint, or .gguf"
    )
    verb.add_argument(
        "--engine",
        action="append",
        help="openvino-genai, openvino, onnxruntime-genai, torch or llama.cpp; may be given several times "
        "(default: what applications use for each folder)",
    )
    verb.add_argument("--device", action="append", help="CPU, GPU, NPU (default: all that OpenVINO finds)")
    verb.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens to read (default 64)")
    verb.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to generate (default 64)")
    verb.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each row (default 5)")
    verb.add_argument("--warm-up", type=int, default=1, metavar="N", help="generations before each one that counts")
    verb.add_argument("--threads", type=int, default=0, metavar="N", help="threads of each engine (default: its own)")
    verb.add_argument("--pin", metavar="CORES", help="stay on these cores, such as 0,1 or 0-3")
    verb.add_argument("--no-bandwidth", action="store_true", help="do not measure how fast memory is read")
    verb.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON")
    verb.add_argument("--overwrite", action="store_true", help="replace FILE")
    swept = verb.add_argument_group("find the fastest settings of exported folders on this machine")
    swept.add_argument("--sweep", action="store_true", help="try runtime settings, each with its drift")
    swept.add_argument("--kl", type=float, default=0.02, metavar="NATS", help="drift allowed: mean KL (default 0.02)")
    swept.add_argument("--top1", type=float, default=0.95, metavar="SHARE", help="and top-1 agreement (default 0.95)")
    swept.add_argument("--prefer", choices=["decode", "prefill"], default="decode", help="what has to be fast")
    swept.add_argument("--write", action="store_true", help="write each folder's best settings into it, with evidence")
    swept.add_argument("--text", type=Path, metavar="FILE", help="text to measure drift on (default: one of ours)")
    swept.add_argument("--no-numerics", action="store_true", help="skip the logit check of folders that are written")
    verb.add_argument(
        "--peers",
        action="store_true",
        help="also make stock INT4 models from the first folder's weights and measure them: optimum-cli, the ONNX "
        "Runtime model builder, llama.cpp Q4_0",
    )
    verb.set_defaults(run=run_bench, interrupted="no result was written")


def run_bench(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status.

    Raises:
        UsageError: options do not fit together.
        OutputExists: the file to write is there.
    """
    from sparseport.bench.rounds import Asked
    from sparseport.bench.run import bench

    refuse_existing(options.output, options.overwrite)
    asked = Asked(options.prompt, options.tokens, options.rounds, options.warm_up, options.threads, cores(options.pin))
    progress = Progress("quiet" if options.quiet else "auto")
    if options.sweep:
        result = _swept(options, asked, progress)
    else:
        _refuse_sweep_options(options)
        result = bench(
            options.paths,
            engines=options.engine,
            devices=options.device,
            asked=asked,
            bandwidth=not options.no_bandwidth,
            peers=options.peers,
            progress=progress,
        )
    if options.output is not None:
        write_result(options.output, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show_bench(result)
    return 0


def _swept(options: argparse.Namespace, asked: Any, progress: Progress) -> dict[str, Any]:
    from sparseport.bench.sweep import Budget
    from sparseport.bench.sweeping import sweep_folders

    for name in ("engine", "device", "no_bandwidth"):
        if getattr(options, name):
            raise UsageError("a sweep takes the engine that applications use, on the CPU", found=f"--{name}")
    return sweep_folders(
        options.paths,
        Budget(options.kl, options.top1),
        asked=asked,
        prefer=options.prefer,
        peers=options.peers,
        write=options.write,
        numerics=not options.no_numerics,
        text=options.text,
        progress=progress,
    )


def _refuse_sweep_options(options: argparse.Namespace) -> None:
    if options.write or options.text:
        raise UsageError("only a sweep has settings to write and a drift to measure", fix="add --sweep")


def cores(text: str | None) -> tuple[int, ...] | None:
    """`0,2` and `0-3` as numbers of cores.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError("--pin takes numbers of cores", expected="0,1 or 0-3", found=text)
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def refuse_existing(output: Path | None, overwrite: bool) -> None:
    """Say so before anything is measured.

    Raises:
        OutputExists: the file is there.
        UsageError: it is a folder, or its folder is not there.
    """
    if output is None:
        return
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UsageError("--output names a file in a folder that is there", where=output)
    if output.exists() and not overwrite:
        raise OutputExists("output exists already", where=output, fix="choose another --output or give --overwrite")


def write_result(output: Path, result: dict[str, Any]) -> None:
    """Write a result beside its place and rename it: it is there whole or not at all."""
    stage = output.with_name(f".{output.name}.part")
    try:
        stage.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        stage.replace(output)
    finally:
        stage.unlink(missing_ok=True)


def show_bench(result: dict[str, Any]) -> None:
    """Print a result as a table, and what was missing."""
    from rich.console import Console
    from rich.table import Table

    from sparseport.show import printable

    console = Console(emoji=False)
    machine, asked = result["machine"], result["asked"]
    console.print(
        f"{printable(machine['processor'])}, {machine['cores']} cores; load before {machine['load_before']}, "
        f"after {machine['load_after']}; prompt of {asked['prompt']} tokens, {asked['tokens']} generated, "
        f"{asked['rounds']} rounds"
    )
    table = Table("row", "decode ms/token", "tok/s", "ratio", f"first token ms ({asked['prompt']})", "ratio")
    for name in ("load s", "peak MiB", "size MiB", "of limit"):
        table.add_column(name)
    if any(row["energy_j"] for row in result["rows"]):
        table.add_column("J/token")
    for row in result["rows"]:
        cells = [
            printable(row["label"]),
            ranged(row["decode_ms"]),
            f"{row['decode_tokens_s']['median']:.1f}",
            f"{row['ratio']['decode']:.2f}",
            ranged(row["first_token_ms"]),
            f"{row['ratio']['first_token']:.2f}",
            f"{row['load_s']['median']:.1f}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']['median']:.0f}",
            f"{row['size_bytes'] / 2**20:.0f}",
            "" if row["limit"] is None else f"{row['limit']['reached']:.0%}",
        ]
        if len(table.columns) > len(cells):
            cells.append("" if row["energy_j"] is None else f"{row['energy_j']['median']:.2f}")
        table.add_row(*cells)
    console.print(table)
    bandwidth = machine["bandwidth_gb_s"]
    if bandwidth:
        console.print(f"memory is read at {ranged(bandwidth)} GB/s; a token reads every weight once")
    if not any(row["energy_j"] for row in result["rows"]):
        console.print("energy: this machine does not tell")
    for failed in result["failed"]:
        console.print(f"[red]failed[/red]: {printable(failed['label'])}: {printable(failed['why'])}", soft_wrap=True)
    for device in result["devices"]:
        if not device["present"]:
            console.print(f"no {device['name']}: {device['why']}")
    for missing in result["missing"]:
        console.print(f"without {missing['engine']}: {missing['why']}; {missing['fix']}", markup=False)


def ranged(figure: dict[str, Any]) -> str:
    """`12.2 [12.1-12.4]`: the median, and the smallest and largest."""
    return f"{figure['median']:.1f} [{figure['min']:.1f}-{figure['max']:.1f}]"
