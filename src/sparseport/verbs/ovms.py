"""`sparseport ovms`: an exported folder as a model of OpenVINO Model Server's repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparseport.verbs.output import print_result, progress_for

NAME = "ovms"
HELP = "Put an exported OpenVINO folder into a model repository of OpenVINO Model Server."
EXAMPLE = "sparseport ovms out --output models --name my-model"


def add_ovms(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument("folder", type=Path, help="folder exported for openvino")
    verb.add_argument("--output", type=Path, required=True, metavar="REPOSITORY", help="made if it is not there")
    verb.add_argument("--name", required=True, help="what clients call the model")
    verb.add_argument("--device", default="CPU", help="CPU (default), GPU or NPU: where the server runs it")
    verb.add_argument(
        "--precision",
        choices=["default", "full"],
        default="default",
        help="as applications get it (default), or in float32 with nothing quantised on the way (CPU only)",
    )
    verb.add_argument("--cache-size", type=int, metavar="GB", help="memory for the KV cache (default: the server's)")
    verb.add_argument("--hard-links", action="store_true", help="link the files in place of copying them")
    verb.add_argument("--overwrite", action="store_true", help="replace a model that this verb made")
    verb.set_defaults(run=run_ovms, interrupted="the repository is as it was, or has the whole model")


def run_ovms(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    from sparseport.integrations.model_server import add_servable

    made = add_servable(
        options.folder,
        options.output,
        options.name,
        device=options.device,
        precision=options.precision,
        cache_size=options.cache_size,
        hard_links=options.hard_links,
        overwrite=options.overwrite,
        progress=progress_for(options),
    )

    def show() -> None:
        how = "hard-linked" if made.linked else "copied"
        print(f"{made.name}: {made.files} files {how} to {made.model}")
        print(f"start:  ovms --config_path {made.config} --rest_port 8000")
        print(f"verify: sparseport verify {made.model}")

    print_result(made.as_dict(), options.json, show)
    return 0
