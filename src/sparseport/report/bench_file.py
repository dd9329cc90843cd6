"""What `sparseport bench --output FILE` wrote, with or without --sweep, as checked data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparseport.errors import BadInput, Unsupported
from sparseport.report.checked import Fields, read_fields

SCHEMA = 1
KINDS = ("sparseport-bench", "sparseport-sweep")
EVIDENCE = "sparseport.sweep.json"
"""File in a folder that a sweep gave its settings: what was measured of it then."""


@dataclass(frozen=True)
class Summary:
    """A measured quantity: median, least and largest of so many samples."""

    median: float
    least: float
    largest: float
    samples: int


@dataclass(frozen=True)
class Row:
    """What was measured of one model at some settings.

    decode, prefill    tokens per second
    first_token_ms     until the first token, after a prompt of `Bench.prompt` tokens
    ratio              this row's time for a token by that of the file's first row, median over rounds
    limit              tokens per second that the memory's bandwidth allows, and the share of it that decoding reaches
    kl, top1, max_abs  of the logits, against the dequantised model
    seal               the folder's certificate, by its SHA-256
    """

    label: str
    model: str
    engine: str
    device: str
    settings: dict[str, str]
    size: int
    decode: Summary
    prefill: Summary
    first_token_ms: Summary
    load_s: Summary | None
    peak_mib: Summary | None
    energy_j: Summary | None
    ratio: float | None
    limit: tuple[float, float] | None
    kl: float | None
    top1: float | None
    max_abs: float | None
    seal: str | None


@dataclass(frozen=True)
class Bench:
    """One file.

    name       of the file, without folders
    machine    label -> text, in the order to print
    versions   package -> version
    load       of the machine before and after, as the system counts waiting processes
    absent     device -> why it was not there
    missing    engine -> why it is missing and how to get it
    failed     label -> why it failed
    chosen     index of the row that a sweep chose, or None
    """

    name: str
    version: str
    machine: dict[str, str]
    versions: dict[str, str]
    load: tuple[float | None, float | None]
    asked: dict[str, str]
    prompt: int
    devices: dict[str, str]
    absent: dict[str, str]
    missing: dict[str, tuple[str, str]]
    failed: tuple[tuple[str, str, str], ...]
    rows: tuple[Row, ...]
    chosen: int | None


def read_bench(path: Path) -> Bench:
    """Read and check a file.

    Raises:
        BadInput: it is missing, no such file, damaged, or has values that no measurement gives.
        Unsupported: a newer sparseport wrote it.
    """
    data = read_fields(path, "bench file")
    schema, kind = data.data.get("schema"), data.data.get("kind")
    if kind not in KINDS:
        raise BadInput(
            "this is no bench file",
            where=path,
            expected=f"kind {' or '.join(KINDS)}",
            found=repr(kind)[:40],
            fix="make one with `sparseport bench DIR --output FILE`",
        )
    if type(schema) is int and schema > SCHEMA:
        raise Unsupported(
            "the bench file has a newer schema",
            where=path,
            expected=f"<= {SCHEMA}",
            found=schema,
            fix="upgrade sparseport",
        )
    if type(schema) is not int or schema != SCHEMA:
        raise BadInput("the bench file has no known schema", where=path, expected=SCHEMA, found=repr(schema)[:40])
    machine, asked = data.part("machine"), data.part("asked")
    rows = tuple(_row(row) for row in data.parts("rows", required=True))
    devices = list(data.parts("devices"))
    return Bench(
        path.name,
        data.text("sparseport", "unknown"),
        _machine(machine),
        machine.texts("versions"),
        (machine.optional("load_before"), machine.optional("load_after")),
        {key: str(value) for key, value in asked.data.items() if value is not None}
        | {f"budget, {key}": value for key, value in data.texts("budget").items()},
        asked.count("prompt"),
        {one.text("name"): one.text("full_name", "") for one in devices if one.data.get("present") is True},
        {one.text("name"): one.text("why", "") for one in devices if one.data.get("present") is not True},
        {one.text("engine"): (one.text("why", ""), one.text("fix", "")) for one in data.parts("missing")},
        tuple((one.text("label"), one.text("engine"), one.text("why", "")) for one in data.parts("failed")),
        rows,
        _chosen(data, rows),
    )


def _machine(machine: Fields) -> dict[str, str]:
    found = {"processor": machine.text("processor")}
    found |= {"cores": str(machine.count("cores"))} if machine.has("cores") else {}
    memory, bandwidth = machine.optional("memory_gib"), machine.maybe("bandwidth_gb_s")
    found |= {} if memory is None else {"memory": f"{memory:.1f} GiB"}
    flags = machine.data.get("flags")
    if isinstance(flags, list) and flags:
        found["vector instructions"] = ", ".join(map(str, flags))
    if bandwidth is not None:
        low, middle, high = (bandwidth.number(key) for key in ("min", "median", "max"))
        threads = f", {bandwidth.count('threads')} threads" if bandwidth.has("threads") else ""
        found["memory bandwidth"] = f"{middle:.1f} GB/s [{low:.1f}-{high:.1f}]{threads}"
    found |= {name: machine.text(name) for name in ("system", "python") if machine.has(name)}
    return found


def _chosen(data: Fields, rows: tuple[Row, ...]) -> int | None:
    """Index of the chosen row: a sweep names it by its label, and the evidence in a folder by its settings.

    Raises:
        BadInput: there is no such row.
    """
    sweep = data.maybe("sweep")
    if sweep is not None:
        settings = sweep.texts("settings")
        return next((number for number, row in enumerate(rows) if row.settings == settings), None)
    if not data.has("chosen"):
        return None
    label = data.text("chosen")
    index = next((number for number, row in enumerate(rows) if row.label == label), None)
    if index is None:
        raise BadInput("the chosen row is not there", where=data.where, expected="the label of a row", found=label[:80])
    return index


def machine_name(bench: Bench) -> str:
    """`AMD EPYC, 2 cores`."""
    cores = bench.machine.get("cores")
    return bench.machine["processor"] + (f", {cores} cores" if cores else "")


def _row(row: Fields) -> Row:
    ratio, limit, drift = row.maybe("ratio"), row.maybe("limit"), row.maybe("drift")
    return Row(
        label=row.text("label"),
        model=row.text("model"),
        engine=row.text("engine"),
        device=row.text("device"),
        settings=row.texts("settings"),
        size=row.count("size_bytes"),
        decode=_summary(row.part("decode_tokens_s")),
        prefill=_summary(row.part("prefill_tokens_s")),
        first_token_ms=_summary(row.part("first_token_ms")),
        load_s=_maybe_summary(row, "load_s"),
        peak_mib=_maybe_summary(row, "peak_mib"),
        energy_j=_maybe_summary(row, "energy_j"),
        ratio=None if ratio is None else ratio.optional("decode"),
        limit=None if limit is None else (limit.number("tokens_s"), limit.number("reached")),
        kl=None if drift is None else drift.optional("kl"),
        top1=None if drift is None else drift.optional("top1"),
        max_abs=None if drift is None else drift.optional("max_abs"),
        seal=row.text("certificate_sha256") if row.has("certificate_sha256") else None,
    )


def _maybe_summary(row: Fields, key: str) -> Summary | None:
    return _summary(row.part(key)) if row.has(key) else None


def _summary(fields: Fields) -> Summary:
    median, least, largest = (fields.number(key) for key in ("median", "min", "max"))
    samples = fields.data.get("samples")
    if not least <= median <= largest:
        raise BadInput(
            "the median is not between the least and the largest value",
            where=fields.where,
            expected=f"{least} to {largest}",
            found=median,
        )
    return Summary(median, least, largest, len(samples) if isinstance(samples, list) else 0)
