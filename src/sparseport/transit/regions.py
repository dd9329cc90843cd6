"""Which bytes of a folder's files are tensors, and how a file is cut into parts that are packed alike.

The map helps the packer; nothing depends on it. A file that is not understood, or only in part, is packed as bytes.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from sparseport.checkpoints.safetensors_header import header_length, parse_header
from sparseport.errors import SparseportError
from sparseport.transit.layout import Elements, Extent, Part, Region
from sparseport.transit.onnx_map import onnx_regions
from sparseport.transit.openvino_map import ir_regions

# Smaller tensors of one element size are packed together: each stream of the coder carries a table.
_OWN_PART = 64 << 10

_SAFETENSORS_BITS = {"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "I8": 8}


def map_folder(folder: Path, names: Iterable[str]) -> dict[str, list[Region]]:
    """The tensors in a folder's files, by file name; sorted, without overlaps, inside their files.

    Args:
        folder: the folder.
        names: its files, relative, with slashes.
    """
    known = set(names)
    found: dict[str, list[Region]] = {}
    for name in sorted(known):
        path = folder / name
        if path.suffix == ".xml" and (data := Path(name).with_suffix(".bin").as_posix()) in known:
            found.setdefault(data, []).extend(_ir(path))
        elif path.suffix == ".onnx":
            for file, regions in _onnx(path).items():
                found.setdefault((Path(name).parent / file).as_posix(), []).extend(regions)
        elif path.suffix == ".safetensors":
            found.setdefault(name, []).extend(_safetensors(path))
    return {name: _fitting(found[name], (folder / name).stat().st_size) for name in sorted(found) if name in known}


def _ir(path: Path) -> list[Region]:
    try:
        return ir_regions(path)
    except (ValueError, KeyError, AttributeError, ElementTree.ParseError):
        return []


def _onnx(path: Path) -> dict[str, list[Region]]:
    try:
        return onnx_regions(path)
    except (ValueError, OSError):
        return {}


def _safetensors(path: Path) -> list[Region]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = header_length(file.read(8), size, path.name)
            infos, _ = parse_header(file.read(length), size, path.name)
    except (SparseportError, struct.error):
        return []
    regions = []
    for info in infos.values():
        bits = _SAFETENSORS_BITS.get(info.stored)
        if bits and info.shape and info.nbytes:
            columns = info.nbytes * 8 // bits // info.shape[0]
            regions.append(Region(info.begin, info.nbytes, Elements(bits, columns)))
    return regions


def _fitting(regions: list[Region], size: int) -> list[Region]:
    """Regions that a file of `size` bytes can have: whole rows, inside the file, each byte in one region at most."""
    kept: list[Region] = []
    for region in sorted(regions, key=lambda one: (one.offset, -one.size)):
        begin = kept[-1].end if kept else 0
        if region.size > 0 and region.offset >= begin and region.end <= size and region.elements.is_whole(region.size):
            kept.append(region)
    return _with_early_points(kept, size)


def _with_early_points(regions: list[Region], size: int) -> list[Region]:
    """Zero-points are unpacked before the codes that need them, so none may lie in a tensor that has some itself."""
    coded = [region for region in regions if region.elements.points is not None]
    starts = [region.offset for region in coded]

    def usable(region: Region) -> bool:
        points = region.elements.points
        if points is None or not region.elements.points_fit(region.size, size):
            return points is None
        before = bisect.bisect_left(starts, points.end(region.elements.bits)) - 1
        return before < 0 or coded[before].end <= points.offset

    return [one if usable(one) else replace(one, elements=replace(one.elements, points=None)) for one in regions]


def parts_of(regions: list[Region], size: int) -> list[Part]:
    """A file as parts in the order in which they are packed: zero-points before the codes that need them.

    Args:
        regions: as `map_folder` gives them.
        size: of the file in bytes.
    """
    rest: list[Extent] = []
    small: dict[int, list[Extent]] = {}
    large: list[Region] = []
    position = 0
    for region in [*regions, None]:
        begin = size if region is None else region.offset
        if begin > position:
            rest.append((position, begin - position))
        if region is None:
            break
        position = region.end
        if region.size >= _OWN_PART or region.elements.points or region.elements.centre:
            large.append(region)
        else:
            small.setdefault(region.elements.bits, []).append((region.offset, region.size))
    parts = [Part(tuple(rest))] if rest else []
    # Elements of small tensors stand in no common rows.
    parts += [Part(tuple(extents), _single_file(bits)) for bits, extents in sorted(small.items())]
    large.sort(key=lambda region: region.elements.points is not None)
    return parts + [Part(((region.offset, region.size),), region.elements) for region in large]


def _single_file(bits: int) -> Elements:
    # Two 4-bit elements to a row, so that any number of bytes is a number of rows.
    return Elements(bits, 2 if bits == 4 else 1)
