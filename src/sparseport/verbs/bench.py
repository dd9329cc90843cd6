"""`sparseport bench`: how fast folders run on this machine, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseport.errors import EnvironmentProblem, FidelityError, OutputExists, UsageError
from sparseport.progress import Progress

NAME = "bench"
HELP = "Measure folders on this machine: speed, memory, load time; a fresh process each time, in interleaved rounds."
EXAMPLE = "sparseport bench out --rounds 5 --output bench.json"
_WIDE = 180
_KL, _TOP1 = 0.02, 0.95


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
    verb.add_argument(
        "--fleet", action="store_true", help="on every machine of the Ray cluster that RAY_ADDRESS names, in one table"
    )
    swept = verb.add_argument_group("find the fastest settings of exported folders on this machine")
    swept.add_argument("--sweep", action="store_true", help="try runtime settings, each with its drift")
    swept.add_argument("--kl", type=float, metavar="NATS", help="drift allowed: mean KL (default 0.02)")
    swept.add_argument("--top1", type=float, metavar="SHARE", help="and top-1 agreement (default 0.95)")
    swept.add_argument("--prefer", choices=["decode", "prefill"], help="what has to be fast (default decode)")
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
    _refuse_options(options)
    if options.sweep:
        result = _swept(options, asked, progress)
    elif options.fleet:
        result = _fleet(options, asked, progress)
    else:
        result = bench(
            options.paths,
            engines=options.engine,
            devices=options.device,
            asked=asked,
            bandwidth=not options.no_bandwidth,
            peers=options.peers,
            progress=progress,
        )
    if options.json:
        print(json.dumps(result, indent=2))
    elif options.fleet:
        show_fleet(result)
    else:
        show_bench(result)
    if options.output is not None:
        write_result(options.output, result)  # last: what was measured is shown even if the disk is full
    unwritten = options.write and any(not one["written"] for one in result["sweeps"])
    return FidelityError.exit_code if unwritten else 0


def _swept(options: argparse.Namespace, asked: Any, progress: Progress) -> dict[str, Any]:
    from sparseport.bench.sweep import Budget
    from sparseport.bench.sweeping import sweep_folders

    return sweep_folders(
        options.paths,
        Budget(_KL if options.kl is None else options.kl, _TOP1 if options.top1 is None else options.top1),
        asked=asked,
        prefer=options.prefer or "decode",
        peers=options.peers,
        write=options.write,
        numerics=not options.no_numerics,
        text=options.text,
        progress=progress,
    )


def _fleet(options: argparse.Namespace, asked: Any, progress: Progress) -> dict[str, Any]:
    from sparseport.bench.fleet import bench_fleet

    return bench_fleet(
        options.paths, engines=options.engine, asked=asked, bandwidth=not options.no_bandwidth, progress=progress
    )


def _refuse_options(options: argparse.Namespace) -> None:
    """Refuse what would be ignored.

    Raises:
        UsageError: names the option.
    """
    given = {name for name, value in vars(options).items() if value not in (None, False, [])}
    if not options.sweep and given & {"write", "text", "no_numerics", "kl", "top1", "prefer"}:
        raise UsageError("only a sweep has settings to write and a drift to measure", fix="add --sweep")
    for mode, alien in (("sweep", {"engine", "device", "no_bandwidth", "fleet"}), ("fleet", {"device", "peers"})):
        if mode in given and given & alien:
            name = sorted(given & alien)[0].replace("_", "-")
            raise UsageError(f"--{mode} does not go with this option", found=f"--{name}")


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
    """Write a result beside its place and rename it: it is there whole or not at all.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    stage = output.with_name(f".{output.name}.part")
    try:
        stage.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        stage.replace(output)
    except OSError as error:
        raise EnvironmentProblem("the result cannot be written", where=output, found=error) from error
    finally:
        stage.unlink(missing_ok=True)


def show_bench(result: dict[str, Any]) -> None:
    """Print a result as a table, and what was missing; of a sweep also what it chose."""
    from sparseport.show import printable

    console, machine, asked = _console(), result["machine"], result["asked"]
    console.print(
        f"{printable(machine['processor'])}, {machine['cores']} cores; load before {machine['load_before']}, "
        f"after {machine['load_after']}; prompt of {asked['prompt']} tokens, {asked['tokens']} generated, "
        f"{asked['rounds']} rounds"
    )
    console.print(_table([(row["label"], row) for row in result["rows"]]))
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
    for found in result.get("sweeps", ()):
        settings = ", ".join(f"{name}={value}" for name, value in found["settings"].items())
        chosen = (settings or "its engine's own settings") if found["within"] else "no settings within the budget"
        written = "; written into the folder" if found["written"] else ""
        why = f"; not written: {printable(found['why'])}" if found["why"] else ""
        console.print(f"{printable(found['model'])}: {printable(chosen)}{written}{why}", soft_wrap=True)
    if result.get("chosen"):
        console.print(f"fastest within the budget: {printable(result['chosen'])}", soft_wrap=True)


def show_fleet(result: dict[str, Any]) -> None:
    """Print one table of all machines."""
    from sparseport.show import printable

    console = _console()
    rows = []
    for one in result["machines"]:
        machine = one["result"]["machine"]
        console.print(f"{one['name']}: {printable(machine['processor'])}, {machine['cores']} cores")
        rows += [(f"{one['name']}: {row['label']}", row) for row in one["result"]["rows"]]
    console.print(_table(rows))
    for lost in result["lost"]:
        console.print(f"[red]lost[/red]: {lost['name']}: {printable(lost['why'])}", soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)  # a file has room for whole labels
    return console


def _table(rows: list[tuple[str, dict[str, Any]]]) -> Any:
    """Labelled rows; columns that no row has a figure for are left out."""
    from rich.table import Table

    from sparseport.show import printable

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "decode ms/token": lambda row: ranged(row["decode_ms"]),
        "tok/s": lambda row: f"{row['decode_tokens_s']['median']:.1f}",
        "ratio": lambda row: f"{row['ratio']['decode']:.2f}",
        "first token ms": lambda row: ranged(row["first_token_ms"]),
        "ratio ": lambda row: f"{row['ratio']['first_token']:.2f}",
        "load s": lambda row: f"{row['load_s']['median']:.1f}",
        "peak MiB": lambda row: "" if row["peak_mib"] is None else f"{row['peak_mib']['median']:.0f}",
        "size MiB": lambda row: f"{row['size_bytes'] / 2**20:.0f}",
        "of limit": lambda row: "" if row["limit"] is None else f"{row['limit']['reached']:.0%}",
        "J/token": lambda row: "" if row["energy_j"] is None else f"{row['energy_j']['median']:.2f}",
        "KL": lambda row: "" if row["drift"] is None else f"{row['drift']['kl']:.1e}",
        "top-1": lambda row: "" if row["drift"] is None else f"{row['drift']['top1']:.1%}",
    }
    cells = {name: [cell(row) for _, row in rows] for name, cell in columns.items()}
    shown = [name for name in columns if any(cells[name])]
    table = Table("row", *(name.strip() for name in shown))
    for number, (label, _) in enumerate(rows):
        table.add_row(printable(label), *(cells[name][number] for name in shown))
    return table


def ranged(figure: dict[str, Any]) -> str:
    """`12.2 [12.1-12.4]`: the median, and the smallest and largest."""
    return f"{figure['median']:.1f} [{figure['min']:.1f}-{figure['max']:.1f}]"
