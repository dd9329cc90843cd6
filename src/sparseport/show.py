"""Results as a person reads them on a terminal."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparseport.errors import printable as _printable
from sparseport.inspection import Inspection, LayerReport
from sparseport.pipeline import ExportResult
from sparseport.plan import Plan
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import Verdict

# What the runs of the numeric check are called; see `verify.runs`.
_SETTINGS = {
    "default": "default settings",
    "fast": "--onnx-accuracy fast",
    "openvino_full_precision": "full precision, run by OpenVINO",
    "openvino": "default settings, run by OpenVINO",
}


def printable(text: object) -> str:
    """Text from files or users, safe for a terminal and for rich's markup."""
    return escape(_printable(str(text)))


def _console(width: int | None = None) -> Console:
    return Console(width=width, emoji=False)  # `:smile:` in a file name is no picture


def _print_command(console: Console, label: str, command: str) -> None:
    """A command to copy: no markup and no colours, because escapes for them would change it, and no line breaks."""
    console.print(f"{label}{_printable(command)}", markup=False, highlight=False, soft_wrap=True)


def show_plan(plan: Plan) -> None:
    """Print a dry run: every layer, what would be refused, and the estimates; then the same for a draft."""
    _show_plan(plan, "plan")
    if plan.draft is not None:
        _show_plan(plan.draft, "draft")


def _show_plan(plan: Plan, title: str) -> None:
    console = _console()
    table = Table(title=title, title_justify="left")
    targets = list(dict.fromkeys(target for layer in plan.layers for target in layer.stored))
    for name in ("layer", "rule", "rank", "shape", "source", *targets):
        table.add_column(name, overflow="fold")
    for layer in plan.layers:
        rank = "" if layer.rank is None else str(layer.rank)
        shape = f"{layer.shape[0]}x{layer.shape[1]}"
        stored = [layer.stored[target].label for target in targets if target in layer.stored]
        if layer.refused:
            stored = [f"[red]refused: {printable(layer.refused)}[/red]"]
        table.add_row(printable(layer.module), layer.rule, rank, shape, layer.source, *stored)
    console.print(table)
    rules = Counter(layer.rule for layer in plan.layers)
    console.print("rules: " + ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items())))
    console.print(
        f"output {plan.output_bytes >> 20} MiB, scratch {plan.scratch_bytes >> 20} MiB on disk; "
        f"memory about {plan.memory_mib} MiB"
        + (f", {plan.numerics_memory_mib} MiB while logits are compared" if plan.numerics_memory_mib else "")
    )
    for note in plan.notes:
        console.print(f"note: {printable(note)}")


def show_export(result: ExportResult) -> None:
    """Print what was exported and what is proven about it."""
    console = _console()
    totals = result.certificate.totals
    console.print(f"[bold]{printable(result.folder)}[/bold]")
    console.print(
        f"  {totals['linears']} linear layers, {totals['weights']:,} weights, {totals['int4_linears']} in INT4"
    )
    if totals["masked_weights"]:
        console.print(
            f"  sparsity {float(totals['sparsity']):.2%}: {totals['pruned']:,} pruned, "
            f"{totals['revived']:,} of them not zero"
        )
    for export in result.exports:
        if len(result.exports) > 1:
            console.print(f"  [bold]{export.name}[/bold]")
        equal, total = read_back(export.certificate)
        console.print(f"  read back from disk: {equal} of {total} layers equal")
        if export.certificate.body["numerics"]["run"]:
            show_numerics(export.certificate.body["numerics"])
        else:
            console.print("  logits: not compared (--no-numerics)")
    _print_command(console, "  proof again any time: ", f"sparseport verify {shlex.quote(str(result.folder))}")


def read_back(certificate: Certificate) -> tuple[int, int]:
    """How many linear layers stood on the disk as they were merged (or compressed), and how many layers there are."""
    layers = certificate.linears.values()
    equal = sum(
        facts["readback"].get(certificate.target) == facts.get("compressed_sha256", facts["weight_sha256"])
        for facts in layers
    )
    return equal, len(layers)


def show_numerics(numerics: dict[str, Any]) -> None:
    """Print both answers of the numeric check."""
    console = _console()
    for label, run in numerics.items():
        if not isinstance(run, dict):
            continue
        name = _SETTINGS.get(label, label.replace("_", " "))
        name = label if label.startswith(("with ", "without ")) else f"at {name}"
        if "allowed" in run:
            console.print(
                f"  logits {printable(name)}: max |difference| {run['judged_max_abs']} "
                f"against torch {run['judged_against']} (allowed {run['allowed']})"
            )
        else:
            console.print(f"  logits {printable(name)}: KL {run['kl']}, top-1 agreement {float(run['top1']):.2%}")


def show_verdicts(verdicts: list[Verdict], numerics: list[dict[str, Any] | None], unequal: list[str]) -> None:
    """Print the verdict of each folder, with its logits if they were compared, and what differs between folders."""
    console = _console()
    for difference in unequal:
        console.print(f"[red]{printable(difference)}[/red]", soft_wrap=True)
    for verdict, found in zip(verdicts, numerics, strict=True):
        for difference in verdict.differences:
            console.print(f"[red]{printable(difference)}[/red]", soft_wrap=True)
        name = f"{verdict.folder.name}: " if len(verdicts) > 1 else ""
        console.print(
            f"{printable(name)}{len(verdict.differences)} differences in {verdict.files} files, {verdict.linears} "
            f"linear layers and {verdict.tensors} other tensors"
        )
        if found:
            show_numerics(found)


def show_demo(result: dict[str, Any]) -> None:
    """Print the demo's closing table."""
    console = _console()
    table = Table("model", "accuracy", "size", "sparsity", title=f"task {result['task']}", title_justify="left")
    for row in result["table"]:
        table.add_row(row["model"], row["accuracy"], row["size"], row["sparsity"])
    console.print(table)
    console.print(f"asked:    {printable(result['example']['prompt'])}")
    console.print(f"answered: {printable(result['example']['answer'])}")
    console.print(
        f"codes that differ between training forward and merge: {result['code_differences']['different']} of "
        f"{result['code_differences']['codes']:,}"
    )
    found = result["verify"]
    console.print(
        f"verify: {len(found['differences'])} differences in {found['files']} files, {found['linears']} linear layers "
        f"and {found['tensors']} other tensors; folder {printable(result['folder'])}"
    )


def show_inspection(found: Inspection, every_layer: bool) -> None:
    """Print what a checkpoint is: facts, layers, what an export keeps and loses, and what to run next."""
    console = _console()
    if not console.is_terminal:
        console = _console(200)  # in a log or a pipe nothing has to fit a screen
    console.print(f"[bold]{printable(found.title)}[/bold]")
    facts = {**({"written by": found.writer} if found.writer else {}), **found.facts}
    for label, value in facts.items():
        console.print(f"  {printable(label)}: {printable(value)}")
    if found.layers:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("layer", "n", "shape", "format", "scales", "z", "zeros", "N:M", "stored as"):
            table.add_column(
                name,
                overflow="fold",
                no_wrap=name not in ("layer", "stored as"),
                justify="right" if name == "n" else "left",
            )
        for row in _layer_rows(found.layers, every_layer):
            table.add_row(*(printable(cell) for cell in row))
        console.print(table)
    for heading, lines in (("keeps", found.keeps), ("loses", found.loses), ("mind", found.warnings)):
        for line in lines:
            console.print(f"{heading}: {printable(line)}")
    for command in found.next:
        _print_command(console, "next:  ", command)


def _layer_rows(layers: list[LayerReport], every_layer: bool) -> list[tuple[str, ...]]:
    """One row per layer, or per kind of layer: same last name, shape and format."""
    groups: dict[tuple[object, ...], list[LayerReport]] = {}
    for layer in layers:
        name = layer.module if every_layer else layer.module.rpartition(".")[2]
        key = (name, layer.shape, layer.format, layer.scales, layer.act_order, layer.stored, layer.refused)
        groups.setdefault(key, []).append(layer)
    return [_layer_row(str(key[0]), group) for key, group in groups.items()]


def _layer_row(name: str, group: list[LayerReport]) -> tuple[str, ...]:
    first = group[0]
    shares = [layer.zeros / layer.weights for layer in group]
    low_share, high_share = f"{min(shares):.1%}", f"{max(shares):.1%}"
    points = [layer.zero_points for layer in group if layer.zero_points is not None]
    low, high = min((p[0] for p in points), default=0), max((p[1] for p in points), default=0)
    patterns = {layer.pattern for layer in group}
    return (
        name,
        str(len(group)),
        f"{first.shape[0]}x{first.shape[1]}",
        first.format + (" act-order" if first.act_order else ""),
        first.scales if points else "",
        "" if not points else f"{low}" if low == high else f"{low}..{high}",
        low_share if low_share == high_share else f"{low_share}-{high_share}",
        patterns.pop() if len(patterns) == 1 else "some",
        first.stored if first.refused is None else f"refused: {first.refused}",
    )
