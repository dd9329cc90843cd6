"""The sections on what differs: the usual ways against this one, and logits at full precision and default settings."""

from __future__ import annotations

from sparseport.model_card import words as card_words
from sparseport.model_card.facts import Run
from sparseport.model_card.numbers import count, figure, percent
from sparseport.report import words
from sparseport.report.bars import share_bar
from sparseport.report.dots import axis_row, dot
from sparseport.report.gather import Folder, Gathered
from sparseport.report.html import Markup, details, join, table, tag
from sparseport.report.naive_file import SHARES, Naive, Way
from sparseport.report.scales import Decades, decades

_HEADS = {
    "codes": "codes changed",
    "zero_points": "zero-points changed",
    "scales": "scales changed",
    "revived": "pruned weights not zero",
    "embedding": "embedding changed",
    "head": "head changed",
}


def naive_section(naive: Naive | None) -> Markup:
    """How much the usual ways change; without a file, how to make one."""
    parts = [tag("h2", "Against the usual way")]
    if naive is None:
        how = [
            "Not compared. The usual way dequantises, merges and quantises again, which changes codes, scales and "
            "zeros. Measure it on a model of your own with ",
            tag("code", "python benchmarks/fidelity.py"),
            " and give its file with ",
            tag("code", "--naive FILE"),
            ".",
        ]
        return join([*parts, tag("p", *how, class_="empty")])
    axis = decades(way.kl for way in naive.ways)
    rows = [_way(way, naive, axis) for way in naive.ways]
    figure_ = tag(
        "figure",
        tag("div", *rows, class_="ways"),
        tag("div", axis_row(axis, "KL divergence from the merged model, nats"), class_="ways-axis"),
    )
    told = (
        f"{words.naive_sentence(naive)} The file names no certificate, so nothing here proves that it is of this model."
    )
    return join([*parts, tag("p", told), figure_, details("All figures as a table", _naive_table(naive))])


def _way(way: Way, naive: Naive, axis: Decades) -> Markup:
    colour = 0 if way.ours else 1
    codes = way.changed["codes"]
    exact = "" if way.kl_exact is None or way.kl_exact == way.kl else f", {figure(way.kl_exact)} in float32"
    pieces = [
        tag("div", tag("p", way.name, class_="label"), _accuracy(way, naive)),
        tag(
            "div",
            tag("p", tag("b", percent(codes)), " of the codes changed", class_="measure"),
            share_bar(codes, f"{way.name}: {percent(codes)} of the codes changed", colour),
        ),
        tag(
            "div",
            tag("p", "KL ", tag("b", figure(way.kl)), exact, class_="measure"),
            dot(way.kl, axis, f"{way.name}: KL {figure(way.kl)} nats", colour),
        ),
    ]
    return tag("div", *pieces, class_="way ours" if way.ours else "way")


def _accuracy(way: Way, naive: Naive) -> Markup | None:
    items = "" if naive.items is None else f" on {count(naive.items)} items"
    return None if way.accuracy is None else tag("p", f"accuracy {percent(way.accuracy)}{items}", class_="measure")


def _naive_table(naive: Naive) -> Markup:
    keys = [key for key in SHARES if any(key in way.changed for way in naive.ways)]
    heads = [
        "way",
        *(_HEADS[key] for key in keys),
        "KL",
        "KL in float32",
        "largest difference of logits",
        "top-1",
        "accuracy",
    ]
    rows = [
        [
            way.name,
            *(percent(way.changed[key]) if key in way.changed else "" for key in keys),
            f"{way.kl:.3e}",
            "" if way.kl_exact is None else f"{way.kl_exact:.3e}",
            f"{way.max_abs:.3e}",
            f"{way.top1:.4f}",
            "" if way.accuracy is None else percent(way.accuracy),
        ]
        for way in naive.ways
    ]
    return table(heads, rows, f"Ways from the fine-tuned model to a runtime; {naive.name}")


def numerics_section(gathered: Gathered) -> Markup:
    """Logits of every folder against its reference: both precisions side by side."""
    parts = [tag("h2", "Full precision and default settings")]
    folders = [folder for folder in gathered.folders if folder.facts is not None and folder.facts.runs]
    if not folders:
        return join(
            [
                *parts,
                tag(
                    "p",
                    "No certificate has measured logits (exported with --no-numerics). ",
                    tag("code", "sparseport verify FOLDER --numerics"),
                    " measures them.",
                    class_="empty",
                ),
            ]
        )
    told = (
        "Two questions, two answers. At full precision the runtime has to compute the model itself: that is judged, "
        "and an export that fails is never written. At default settings, which applications get, a runtime may round "
        "on its way: that is only measured. Both are against a torch model in float32 with the same weights."
    )
    values = [
        float(value)
        for folder in folders
        for run in _runs(folder)
        for value in (run.kl, run.largest or run.max_abs, run.allowed)
        if value
    ]
    axis = decades(values)
    rows = [_run(folder, run, axis, len(folders) > 1) for folder in folders for run in _runs(folder)]
    drawn = tag("figure", *rows, axis_row(axis, "KL divergence in nats, and largest difference of logits"), _key())
    return join([*parts, tag("p", told), drawn, details("All figures as a table", _runs_table(folders))])


def _runs(folder: Folder) -> tuple[Run, ...]:
    assert folder.facts is not None
    return folder.facts.runs


def _run(folder: Folder, run: Run, axis: Decades, several: bool) -> Markup:
    name = card_words.run_name(run)
    where = [tag("code", folder.name), " "] if several else []
    verdict = ""
    if run.allowed is not None and run.largest is not None:
        fine = float(run.largest) <= float(run.allowed)
        verdict = f"allowed {float(run.allowed):g}: {'passed' if fine else 'failed'}"
    elif run.top1 is not None:
        verdict = f"same top token {percent(float(run.top1))}"
    head = tag("div", tag("span", *where, name, class_="label"), tag("span", verdict, class_="amount"), class_="head")
    pieces = [head]
    if run.kl is not None:
        pieces += [_measure("KL", run.kl), dot(float(run.kl), axis, f"{name}: KL {run.kl} nats", 0)]
    largest = run.largest or run.max_abs
    if largest is not None:
        allowed = None if run.allowed is None else float(run.allowed)
        pieces += [
            _measure("largest difference", largest),
            dot(float(largest), axis, f"{name}: largest difference of logits {largest}", 1, allowed),
        ]
    return tag("div", *pieces, class_="row run")


def _measure(name: str, value: str) -> Markup:
    return tag("p", name, " ", tag("b", figure(float(value))), class_="measure")


def _key() -> Markup:
    return tag(
        "p",
        tag("span", "", class_="limit-key", aria_hidden="true"),
        " the largest difference that may pass",
        class_="legend",
    )


def _runs_table(folders: list[Folder]) -> Markup:
    heads = ["folder", "run", "KL (nats)", "largest difference", "judged", "allowed", "against", "top-1", "settings"]
    rows = [
        [
            folder.name,
            card_words.run_name(run),
            *((value or "") for value in (run.kl, run.max_abs, run.largest, run.allowed, run.against, run.top1)),
            ", ".join(f"{key} {value}" for key, value in run.settings.items()),
        ]
        for folder in folders
        for run in _runs(folder)
    ]
    return table(heads, rows, "Logits against the dequantised reference, as the certificates have them")
