"""`sparseport push`: an exported folder goes to a hub, and what is there is held against its certificate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparseport.progress import Progress

NAME = "push"
HELP = "Verify an exported folder, push it to a hub as one commit, and compare what is there with the certificate."
EXAMPLE = "sparseport push out/openvino my-name/my-model --private"


def add_push(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument("folder", type=Path, help="exported folder, or one with openvino/ and onnx/ in it")
    verb.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the hub (HF_ENDPOINT names another one)")
    verb.add_argument("--private", action="store_true", help="make the repository private; one that exists has to be")
    verb.add_argument("--exist-ok", action="store_true", help="commit to a repository that is there already")
    verb.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if needed (default: main)")
    verb.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="FILE",
        help="a file of the folder that no certificate covers, such as README.md; may be given more than once",
    )
    verb.add_argument("--dry-run", action="store_true", help="verify, list files and sizes, and stop; goes nowhere")
    verb.set_defaults(
        run=run_push, interrupted="the repository may have been made; the same command with --exist-ok goes on"
    )


def run_push(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status.

    Raises:
        SparseportError: see `sparseport.integrations.push`.
    """
    from sparseport.integrations.push import check_names, hub_environment, plan_push, push

    check_names(options.repo_id, options.revision)
    if not options.dry_run:
        hub_environment()  # before the folder is read, which takes a while
    progress = Progress("quiet" if options.quiet else "auto")
    plan = plan_push(options.folder, options.also, progress)
    if options.dry_run:
        result = {"repo_id": options.repo_id, "dry_run": True, **plan.as_dict()}
        show = _show_plan
    else:
        result = push(
            plan,
            options.repo_id,
            private=options.private,
            exist_ok=options.exist_ok,
            revision=options.revision,
            progress=progress,
        )
        show = _show_result
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


def _show_plan(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from sparseport.show import printable

    console = Console(emoji=False)
    table = Table("file", "bytes", "SHA-256", title=f"for {printable(result['repo_id'])}", title_justify="left")
    for file in result["files"]:
        table.add_row(printable(file["name"]), f"{file['size']:,}", file["sha256"][:16])
    console.print(table)
    console.print(f"{len(result['files'])} files, {result['bytes']:,} bytes; nothing was sent")
    _show_seals(console, result)


def _show_result(result: dict[str, Any]) -> None:
    from rich.console import Console

    from sparseport.show import printable

    console = Console(emoji=False)
    kind = "private" if result["private"] else "public"
    console.print(f"[bold]{printable(result['url'])}[/bold] ({kind})", soft_wrap=True)
    what = "nothing was new at" if result["unchanged"] else "commit"
    console.print(f"  {what} {result['commit']} on {printable(result['revision'])}", soft_wrap=True)
    console.print(f"  {result['files']} files, {result['bytes']:,} bytes: all are there as certified")
    for name in result["others"]:
        console.print(f"  also there, not covered: {printable(name)}", soft_wrap=True)
    _show_seals(console, result)
    console.print(
        f"  receivers: hf download {printable(result['repo_id'])} --revision {result['commit']} --local-dir DIR, then "
        "sparseport verify DIR --ignore-extra, and compare certificate_sha256",
        soft_wrap=True,
        highlight=False,
    )


def _show_seals(console: Any, result: dict[str, Any]) -> None:
    for target, seal in sorted(result["certificate_sha256"].items()):
        console.print(f"  certificate_sha256 {target}: {seal}", soft_wrap=True, highlight=False)
