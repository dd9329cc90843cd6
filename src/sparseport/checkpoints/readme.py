"""What a model's README.md says of its origin: the YAML between `---` lines at its top, as model hubs read it.

Nobody's README may stand in the way of an export, so what cannot be read is told and otherwise passed over, and what is
taken over has a form that cannot be mistaken for anything else.

Format: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.paths import bare_file, open_regular
from sparseport.errors import SparseportError

FILE_NAME = "README.md"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""A model's name on a hub: owner/name."""

_LIMIT = 1 << 20
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.S | re.M)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_LINK = re.compile(r"https?://[A-Za-z0-9][\w.\-/~%#?=&+:@]{0,299}")
_NAME = re.compile(r"[\w.+-][\w .+-]{0,98}[\w.+-]")


@dataclass(frozen=True)
class Metadata:
    """What was taken over.

    licenses      identifiers such as apache-2.0
    license_name  name of a license that has no identifier (license: other)
    license_link  where it is written
    base_model    owner/name of the model that this one was made from
    languages     BCP 47 tags
    problem       why something was not taken over, or None
    """

    licenses: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    languages: tuple[str, ...] = ()
    problem: str | None = None


def read_metadata(folder: Path) -> Metadata | None:
    """The metadata of a folder's README.md; None if it has no such file, empty if the file has no metadata."""
    if not (folder / FILE_NAME).exists():
        return None
    try:
        with open_regular(bare_file(folder, FILE_NAME, "model card")) as file:
            data = file.read(_LIMIT + 1)
    except SparseportError as error:
        return Metadata(problem=error.what)
    if len(data) > _LIMIT:
        return Metadata(problem=f"it is larger than {_LIMIT} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Metadata(problem="it is not UTF-8")
    front = _FRONT.match(text)
    return Metadata() if front is None else _taken(front[1])


def _taken(text: str) -> Metadata:
    import yaml

    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return Metadata(problem="its metadata is not YAML")
    if data is None:
        return Metadata()
    return checked(data) if isinstance(data, dict) else Metadata(problem="its metadata is no mapping")


def checked(data: Mapping[str, Any]) -> Metadata:
    """The metadata among a model card's keys: what has another form than it must have is left out, and told."""
    licenses, languages = _all(data.get("license"), _LICENSE), _all(data.get("language"), _LANGUAGE)
    bases = _all(data.get("base_model"), HUB_NAME)
    refused = [key for key, found in (("license", licenses), ("language", languages)) if found is None]
    return Metadata(
        licenses or (),
        _one(data.get("license_name"), _NAME),
        _one(data.get("license_link"), _LINK),
        bases[0] if bases is not None and len(bases) == 1 else None,
        languages or (),
        f"its {' and '.join(refused)} cannot be understood" if refused else None,
    )


def _one(value: Any, form: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _all(value: Any, form: re.Pattern[str]) -> tuple[str, ...] | None:
    """A text or a list of texts, each once; None if one of them has another form."""
    items = [] if value is None else value if isinstance(value, list) else [value]
    # YAML takes the language `no` for false; it is the one such word among them.
    items = ["no" if item is False and form is _LANGUAGE else item for item in items]
    if len(items) > 100 or any(_one(item, form) is None for item in items):
        return None
    return tuple(dict.fromkeys(items))
