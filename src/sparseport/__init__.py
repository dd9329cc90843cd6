"""sparseport: carry sparse and INT4 fine-tuned language models to their runtimes, bit for bit, with proof.

The public functions are loaded on first use, so that importing the package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "add_adapter": "sparseport.further",
    "export": "sparseport.pipeline",
    "pack": "sparseport.transit.pack",
    "unpack": "sparseport.transit.unpack",
    "Recipe": "sparseport.recipe",
    "verify": "sparseport.verify.folder",
    "Certificate": "sparseport.verify.certificate",
}

__all__ = ["Certificate", "Recipe", "add_adapter", "export", "pack", "unpack", "verify"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sparseport' has no attribute {name!r}")
