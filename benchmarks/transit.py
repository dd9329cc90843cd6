"""How small exported folders become on their way: `sparseport pack` beside a tar through gzip and through Zstandard.

    python benchmarks/transit.py INT4=demo/openvino ONNX=demo/onnx both=demo/both FP16=out

Each folder is packed by every way, and unpacked again; archives go to a temporary folder beside the first one. Times
are processor seconds of one thread: the stock ways run in this process too, through the same libraries as the tools.
"""

from __future__ import annotations

import argparse
import gzip
import resource
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from common import machine, save, table

from sparseport.transit.pack import pack
from sparseport.transit.unpack import unpack

Reader = Callable[[BinaryIO], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="LABEL=FOLDER", help="exported folders, and what to call them")
    parser.add_argument("--no-stock", action="store_true", help="only sparseport")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": {**machine(), "zstandard": version("zstandard")}, "folders": {}}
    for given in options.folders:
        label, _, name = given.partition("=")
        result["folders"][label] = measure(Path(name), stock=not options.no_stock)
        print(report(label, result["folders"][label]), flush=True)
    if not options.no_stock:
        print(f"written to {save('transit', result)}")


def measure(folder: Path, stock: bool) -> dict[str, Any]:
    """Sizes and times of one folder by every way."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix="transit-", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        ways = {"sparseport pack": ours(folder, scratch)}
        if stock:
            ways["tar, gzip -9"] = theirs(folder, scratch, gzip_write, lambda file: gzip.GzipFile(fileobj=file))
            ways["tar, zstd -19 --long=28"] = theirs(folder, scratch, zstd_write, zstd_read)
    return {"size": size, "ways": ways}


def ours(folder: Path, scratch: Path) -> dict[str, Any]:
    before = seconds()
    packed = pack(folder, scratch / "a.sparseport")
    middle = seconds()
    unpack(scratch / "a.sparseport", scratch / "out")
    after = seconds()
    assert sizes(scratch / "out") == sizes(folder)
    shutil.rmtree(scratch / "out")
    elements = [tally.as_dict() for tally in packed.tallies]
    return {"size": packed.size, "pack_s": middle - before, "unpack_s": after - middle, "elements": elements}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file, by its path in the folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def theirs(folder: Path, scratch: Path, write: Callable[[Path, BinaryIO], None], read: Reader) -> dict[str, Any]:
    path = scratch / "a.tar.z"
    before = seconds()
    with path.open("wb") as file:
        write(folder, file)
    middle = seconds()
    with path.open("rb") as file, tarfile.open(fileobj=read(file), mode="r|") as archive:
        archive.extractall(scratch / "out", filter="data")
    after = seconds()
    shutil.rmtree(scratch / "out")
    return {"size": path.stat().st_size, "pack_s": middle - before, "unpack_s": after - middle}


def gzip_write(folder: Path, file: BinaryIO) -> None:
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=zlib.Z_BEST_COMPRESSION, mtime=0) as stream:
        tar_into(folder, stream)


def zstd_write(folder: Path, file: BinaryIO) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(19, window_log=28, enable_ldm=True)
    with zstandard.ZstdCompressor(compression_params=settings).stream_writer(file, closefd=False) as stream:
        tar_into(folder, stream)


def zstd_read(file: BinaryIO) -> Any:
    return zstandard.ZstdDecompressor(max_window_size=1 << 28).stream_reader(file)


def tar_into(folder: Path, stream: Any) -> None:
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        archive.add(folder, arcname=folder.name)


def seconds() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def report(label: str, result: dict[str, Any]) -> str:
    """Markdown tables of one folder."""
    size = result["size"]
    rows = []
    for name, way in result["ways"].items():
        times = (f"{way[key]:.0f}" for key in ("pack_s", "unpack_s"))
        rows.append([name, f"{way['size']:,}", f"{way['size'] / size:.1%}", *times])
    text = f"\n{label}: {size:,} bytes\n\n{table(['', 'bytes', 'share', 'pack s', 'unpack s'], rows)}\n\n"
    kinds = [
        [
            f"{one['tensors']} {'sparse' if one['sparse'] else 'dense'}",
            f"{one['elements']:,}",
            f"{one['zeros']:.1%}",
            str(one["bits"]),
            f"{one['packed_bits']:.3f}",
            "" if one["entropy_bits"] is None else f"{one['entropy_bits']:.3f}",
        ]
        for one in result["ways"]["sparseport pack"]["elements"]
    ]
    return text + table(["tensors", "elements", "zeros", "bits", "packed", "entropy"], kinds)


if __name__ == "__main__":
    main()
