"""The section on speed: bars with ranges per engine, what drifts beside them, and what was not measured."""

from __future__ import annotations

from sparseport.model_card.numbers import figure, percent, size
from sparseport.report import words
from sparseport.report.bars import bar
from sparseport.report.bench_file import Bench, Row, Summary, machine_name
from sparseport.report.gather import Gathered
from sparseport.report.html import Markup, details, join, table, tag

COLOURS = 6
# A limit far beyond every bar would leave the bars no room; then it stands in words alone.
_FARTHEST_LIMIT = 4.0


def speed_section(gathered: Gathered) -> Markup:
    """One part for each bench file."""
    parts = [tag("h2", "How fast it runs, and how far it drifts")]
    if not gathered.benches:
        how = [
            "Nothing was measured. Make measurements with ",
            tag("code", "sparseport bench FOLDER --output bench.json"),
        ]
        return join([*parts, tag("p", *how, " and give ", tag("code", "--bench bench.json"), ".", class_="empty")])
    return join([*parts, *(_bench(bench, gathered) for bench in gathered.benches)])


def _bench(bench: Bench, gathered: Gathered) -> Markup:
    parts = [tag("h3", machine_name(bench))] if bench.rows else []
    parts.append(tag("p", words.speed_sentence(bench, gathered)))
    if bench.rows:
        decode = [row.limit[0] for row in bench.rows if row.limit is not None]
        parts.append(_plot(bench, gathered, "Decode: tokens per second, one after the other", "decode", decode))
        parts.append(
            _plot(bench, gathered, f"Prefill: tokens per second, reading {bench.prompt} at once", "prefill", [])
        )
        parts.append(details("All figures as a table", _table(bench)))
    parts += _absent(bench)
    return tag("div", *parts, class_="bench")


def _plot(bench: Bench, gathered: Gathered, title: str, what: str, limits: list[float]) -> Markup:
    """Rows grouped by engine; a bar's colour is its engine's."""
    values: list[Summary] = [getattr(row, what) for row in bench.rows]
    top = max(value.largest for value in values)
    near = [limit for limit in limits if limit <= _FARTHEST_LIMIT * top]
    scale = max([top, *near]) * 1.02 or 1.0
    engines = list(dict.fromkeys(row.engine for row in bench.rows))
    groups = []
    for number, engine in enumerate(engines):
        rows = [(index, row) for index, row in enumerate(bench.rows) if row.engine == engine]
        drawn = [
            _row(row, getattr(row, what), scale, number % COLOURS, what, index == bench.chosen, gathered)
            for index, row in rows
        ]
        groups.append(tag("div", tag("h5", words.engine_name(engine)), *drawn, class_="engine"))
    note = []
    if near and what == "decode":
        note = [
            tag(
                "p",
                tag("span", "", class_="limit-key", aria_hidden="true"),
                " the memory's bandwidth allows no more",
                class_="legend",
            )
        ]
    return tag("figure", tag("h4", title), *groups, *note)


def _row(row: Row, value: Summary, top: float, colour: int, what: str, chosen: bool, gathered: Gathered) -> Markup:
    label = f"{row.label}: {figure(value.median)} tokens per second, {figure(value.least)} to {figure(value.largest)}"
    limit = row.limit[0] if row.limit is not None and what == "decode" else None
    spread = tag("span", f" {figure(value.least)}–{figure(value.largest)}", class_="spread")
    head = [
        tag("span", row.label, class_="label"),
        tag("span", tag("b", figure(value.median)), spread, class_="amount"),
    ]
    parts = [tag("div", *head, class_="head"), bar(value, top, label, colour, limit)]
    if what == "decode":
        parts.append(tag("p", *_chips(row, chosen, gathered), class_="chips"))
    return tag("div", *parts, class_="row")


def _chips(row: Row, chosen: bool, gathered: Gathered) -> list[Markup]:
    own = [folder for folder in gathered.folders if folder.measured(row)]
    chips = [("own", f"this report: {own[0].name}")] if own else []
    same_name = any(folder.name.rpartition("/")[2] == row.model for folder in gathered.folders)
    if not own and same_name and row.seal is not None:
        chips.append(("warn", "same name, other certificate"))
    chips += [("own", "chosen by the sweep")] if chosen else []
    chips.append(("", row.device))
    if row.limit is not None:
        chips.append(("", f"{percent(row.limit[1])} of the bandwidth limit"))
    if row.kl is None:
        chips.append(("", "drift not measured"))
    else:
        chips.append(("warn" if row.kl >= 1e-3 else "", f"KL {figure(row.kl)}"))
        if row.top1 is not None:
            chips.append(("warn" if row.top1 < 0.99 else "", f"same top token {percent(row.top1)}"))
    if row.peak_mib is not None:
        chips.append(("", f"peak {figure(row.peak_mib.median)} MiB"))
    return [tag("span", text, class_=f"chip {kind}".rstrip()) for kind, text in chips]


def _table(bench: Bench) -> Markup:
    heads = [
        "model and settings",
        "engine",
        "device",
        "decode, tokens/s",
        "prefill, tokens/s",
        "first token, ms",
        "time by the first row's",
    ]
    heads += [
        "size",
        "peak, MiB",
        "load, s",
        "energy, J per token",
        "bandwidth limit, tokens/s",
        "reached",
        "KL",
        "top-1",
        "settings",
    ]
    rows = []
    for row in bench.rows:
        cells = [
            row.label,
            words.engine_name(row.engine),
            row.device,
            *(_summary(one) for one in (row.decode, row.prefill, row.first_token_ms)),
            "" if row.ratio is None else figure(row.ratio),
            size(row.size),
            *(_summary(one) for one in (row.peak_mib, row.load_s, row.energy_j)),
            "" if row.limit is None else figure(row.limit[0]),
            "" if row.limit is None else percent(row.limit[1]),
            "" if row.kl is None else f"{row.kl:.3e}",
            "" if row.top1 is None else f"{row.top1:.4f}",
            ", ".join(f"{key} {value}" for key, value in sorted(row.settings.items())),
        ]
        rows.append(cells)
    kept = [number for number in range(len(heads)) if any(row[number] for row in rows)]
    caption = f"Medians with the least and the largest value; {bench.name}"
    return table([heads[number] for number in kept], [[row[number] for number in kept] for row in rows], caption)


def _summary(value: Summary | None) -> str:
    return "" if value is None else f"{figure(value.median)} [{figure(value.least)}–{figure(value.largest)}]"


def _absent(bench: Bench) -> list[Markup]:
    """What was not measured, and why."""
    lines = [tag("li", tag("b", f"{device}: "), why or "not there") for device, why in sorted(bench.absent.items())]
    for engine, (why, fix) in sorted(bench.missing.items()):
        way_out = [" To have it: ", tag("code", fix)] if fix else []
        told = f"{(why or 'not installed').rstrip('.')}."
        lines.append(tag("li", tag("b", f"{words.engine_name(engine)}: "), told, *way_out))
    for label, engine, why in bench.failed:
        lines.append(tag("li", tag("b", f"{label} ({words.engine_name(engine)}): "), f"failed: {why}"))
    return [tag("div", tag("h4", "Not measured"), tag("ul", *lines), class_="absent")] if lines else []
