"""`sparseport doctor`: is this environment fit for sparseport, and what to do where it is not."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sparseport.errors import EnvironmentProblem, UsageError
from sparseport.progress import Progress

NAME = "doctor"
HELP = "Look at packages, their known conflicts, devices and this machine, and say what stands in the way."
EXAMPLE = "sparseport doctor --json"

_COLOURS = {"broken": "red", "warning": "yellow", "note": "cyan"}


def add_doctor(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument("--no-devices", dest="devices", action="store_false", help="do not load the runtimes to ask them")
    verb.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for each runtime to answer (default 60)"
    )
    verb.set_defaults(run=run_doctor, interrupted="nothing was changed")


def run_doctor(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status: 0 if sparseport can be used, 8 if something is broken.

    Raises:
        UsageError: a time limit that is none.
    """
    from sparseport.doctor.report import examine
    from sparseport.offline import set_here

    if not options.timeout > 0:
        raise UsageError("a time limit is larger than 0", where="--timeout", found=options.timeout)
    progress = Progress("quiet" if options.quiet else "auto")
    with progress.task("looking"):
        report = examine(options.timeout, options.devices, own_switches=set_here())
    result = report.as_dict()
    broken = [problem for problem in report.problems if problem.level == "broken"]
    error = EnvironmentProblem(
        f"{len(broken)} {'thing is' if len(broken) == 1 else 'things are'} broken: "
        + ", ".join(dict.fromkeys(problem.name for problem in broken)),
        fix="see the list above",
        code="E_BROKEN",
    )
    if broken:
        result["error"] = error.as_dict()
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show_report(result)
    if broken:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def show_report(result: dict[str, Any]) -> None:
    """Print the report: machine, packages, what can be done, devices, telemetry, and the problems last."""
    from rich.console import Console
    from rich.table import Table

    from sparseport.show import printable

    console = Console(emoji=False, highlight=False)
    found = result["machine"]
    console.print(f"[bold]sparseport {result['sparseport']}[/bold], Python {found['python']}, {found['system']}")
    console.print(f"  {printable(found['processor'])}: {_cores(found['cores'])}; {_memory(found['memory'])}")
    for name, place in found["disk"].items():
        console.print(f"  {_gib(place['free'])} free {name} ({printable(place['path'])})", soft_wrap=True)
    for feature in found["features"]:
        sign = "yes" if feature["present"] else "no"
        console.print(f"  {feature['name']} {sign}: {feature['means']}", soft_wrap=True)
    table = Table("package", "installed", "tested", title="packages", title_justify="left")
    for row in result["packages"]:
        colour = {"tested": "green", "other": "yellow", "absent": "dim"}[row["state"]]
        table.add_row(row["name"], f"[{colour}]{printable(row['installed'] or '-')}[/{colour}]", row["tested"] or "-")
    console.print(table)
    for one in result["purposes"]:
        state = "ready" if one["ready"] else f"missing {', '.join(one['missing'])}: {one['install']}"
        console.print(f"  {one['purpose']}: {printable(state)}", soft_wrap=True)
    _show_devices(console, result["devices"])
    for name, state in result["telemetry"].items():
        console.print(f"  telemetry, {name}: {state}", soft_wrap=True)
    for problem in result["problems"]:
        colour = _COLOURS[problem["level"]]
        console.print(
            f"[{colour}]{problem['level']}[/{colour}]: {printable(problem['what'])} ({printable(problem['found'])}); "
            f"to fix: {printable(problem['fix'])}",
            soft_wrap=True,
        )
    if not result["problems"]:
        console.print("nothing stands in the way")


def _show_devices(console: Any, devices: dict[str, Any]) -> None:
    from sparseport.show import printable

    for runtime, answer in devices.items():
        if "error" in answer:
            console.print(f"  {runtime}: [red]{printable(answer['error'])}[/red]", soft_wrap=True)
            continue
        listed = answer.get("providers", answer.get("devices"))
        names = [
            one if isinstance(one, str) else f"{one['name']} ({one['full_name']}; {', '.join(one['capabilities'])})"
            for one in listed
        ]
        console.print(f"  {runtime} {printable(answer['version'])}: {printable(', '.join(names))}", soft_wrap=True)
        for name, why in answer.get("missing", {}).items():
            console.print(f"    no {name}: {printable(why)}", soft_wrap=True)


def _cores(cores: dict[str, Any]) -> str:
    usable = "" if cores["usable"] in (None, cores["all"]) else f", {cores['usable']} of them usable here"
    allowed = "" if cores["allowed"] is None else f", {cores['allowed']:.1f} allowed by the control group"
    return f"{cores['all']} cores{usable}{allowed}"


def _memory(memory: dict[str, Any]) -> str:
    allowed = "" if memory["allowed"] is None else f", {_gib(memory['allowed'])} allowed by the control group"
    return f"memory {_gib(memory['all'])}, {_gib(memory['free'])} free{allowed}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
