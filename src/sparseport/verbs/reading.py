"""Options about how a checkpoint is to be read: the same for every verb that reads one."""

from __future__ import annotations

import argparse

READING = ("allow_pickle", "gptq_zeros", "ignore_extra")
"""Their names, in parsed options and in a recipe; None where they were not given."""


def add_reading(verb: argparse.ArgumentParser) -> None:
    """Give a verb these options."""
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
