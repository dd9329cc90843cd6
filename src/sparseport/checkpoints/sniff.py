"""Recognise files that are not what their name says, so that the error can say what they are."""

from __future__ import annotations

SNIFF_BYTES = 512

_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (torch.save writes these pickles); convert it to safetensors"),
    (b"\x80\x02", "a Python pickle; convert it to safetensors"),
    (b"\x80\x03", "a Python pickle; convert it to safetensors"),
    (b"\x80\x04", "a Python pickle; convert it to safetensors"),
    (b"\x80\x05", "a Python pickle; convert it to safetensors"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x89HDF\r\n", "an HDF5 file"),
)


def recognise(head: bytes) -> str | None:
    """What the first bytes of a file give away about it, or None.

    head  the first bytes of the file; `SNIFF_BYTES` are enough
    """
    for prefix, meaning in _PREFIXES:
        if head.startswith(prefix):
            return meaning
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "an HTML or XML page (a failed download?); download it again"
    return None
