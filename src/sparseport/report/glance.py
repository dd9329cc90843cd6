"""The top of the page: what this is, the verdict, and the figures that matter."""

from __future__ import annotations

from sparseport.model_card import words as card_words
from sparseport.model_card.numbers import figure, percent, size
from sparseport.report import words
from sparseport.report.bench_file import Row
from sparseport.report.gather import Folder, Gathered
from sparseport.report.html import Markup, details, join, leaf, table, tag


def title_of(gathered: Gathered) -> str:
    """The page's title, as plain text."""
    models = gathered.models()
    if len(models) != 1:
        return f"{len(models)} models" if models else words.model_name(gathered.folders)
    return words.model_name(models[0])


def header(gathered: Gathered) -> Markup:
    """Title, verdict, and the models one by one."""
    models = gathered.models()
    parts = [tag("p", "Model report", class_="kicker"), tag("h1", title_of(gathered))]
    if len(models) == 1:
        parts.append(tag("p", _form(models[0]), class_="form"))
    parts.append(_verdict(gathered))
    parts += [_model(gathered, folders, named=len(models) > 1) for folders in models]
    return tag("header", *parts)


def _form(folders: list[Folder]) -> str:
    facts = folders[0].facts
    assert facts is not None
    return f"{card_words.architecture(facts)}, {card_words.form(facts)}"


def _verdict(gathered: Gathered) -> Markup:
    line, rest = words.verdict(gathered)
    path = "M7 13.5L11.5 18L19.5 8.5" if gathered.ok else "M9 9L17 17M17 9L9 17"
    icon = tag(
        "svg",
        leaf("circle", cx="13", cy="13", r="12"),
        leaf("path", d=path),
        class_="icon",
        viewBox="0 0 26 26",
        width="52",
        height="52",
        aria_hidden="true",
    )
    told = [tag("h2", line), tag("p", rest)]
    lists = [(folder.name, folder.differences) for folder in gathered.folders if folder.differences]
    lists += [("between the folders", gathered.between)] if gathered.between else []
    for name, lines in lists:
        shown = [tag("li", line) for line in lines[:10]]
        more = (
            [tag("li", f"and {len(lines) - 10} more, which ", tag("code", "sparseport verify"), " lists")]
            if len(lines) > 10
            else []
        )
        told.append(details(f"{name}: {len(lines)}", tag("ul", *shown, *more), open_=True))
    kind = "good" if gathered.ok else "bad"
    return tag("section", icon, tag("div", *told), class_=f"verdict {kind}", aria_label="Verdict")


def _model(gathered: Gathered, folders: list[Folder], *, named: bool) -> Markup:
    facts = folders[0].facts
    assert facts is not None
    this = "This is" if all(folder.ok for folder in folders) else "By its certificate this is"
    told = [f"{this} {card_words.kind(facts)}.", card_words.bits_sentence(facts), card_words.sparsity_sentence(facts)]
    told += [one for one in (card_words.cut_sentence(facts), card_words.adapters_sentence(facts)) if one]
    parts = [tag("h2", f"{words.model_name(folders)}: {_form(folders)}", class_="model")] if named else []
    parts += [tag("p", " ".join(told), class_="lead"), _tiles(gathered, folders), _folders(gathered, folders)]
    return join(parts)


def _tiles(gathered: Gathered, folders: list[Folder]) -> Markup:
    facts = folders[0].facts
    assert facts is not None
    changed, of_what = words.changed_values(folders)
    least, unit = size(min(folder.size for folder in folders)).split(" ")
    sparse = ("none", "") if facts.sparsity is None else (percent(facts.sparsity), "")
    tiles = [
        _tile("Sparsity", *sparse, _zeros(folders[0]), _waffle(facts.sparsity)),
        _tile("Weights", card_words.bits_label(facts), "", _stored(folders[0])),
        _tile("Changed", changed, "", of_what),
        _tile("Size", least, unit, _where(folders)),
        _speed(words.fastest(gathered, folders)),
        _drift(folders),
    ]
    return tag("div", *tiles, class_="tiles")


def _tile(name: str, value: str, unit: str, note: object, picture: Markup | None = None) -> Markup:
    small = " words" if len(value) > 11 else ""
    shown = tag("p", value, tag("span", f" {unit}", class_="unit") if unit else None, class_=f"value{small}")
    inside = [tag("p", name, class_="name"), shown, tag("p", note, class_="note")]
    return tag("div", tag("div", *inside), picture, class_="tile")


def _speed(row: Row | None) -> Markup:
    if row is None:
        how = join([tag("code", "sparseport bench"), " measures it; give its file with ", tag("code", "--bench")])
        return _tile("Speed", "not measured", "", how)
    note = f"{figure(row.decode.least)} to {figure(row.decode.largest)}, {words.runs_where(row)}"
    return _tile("Speed", figure(row.decode.median), "tokens/s", note)


def _drift(folders: list[Folder]) -> Markup:
    """The largest divergence at default settings among the folders, and what it means."""
    runs = [run for folder in folders if folder.facts for run in folder.facts.runs if run.label == "default"]
    found = [float(run.kl) for run in runs if run.kl is not None]
    if not found:
        return _tile("Drift", "not measured", "", "exported with --no-numerics")
    note = f"nats of KL from the reference at default settings: {card_words.drift_words(max(found))}"
    return _tile("Drift", figure(max(found)), "", note)


def _zeros(folder: Folder) -> str:
    facts = folder.facts
    assert facts is not None
    if facts.sparsity is None:
        return "no layer has a mask"
    return "pruned, and exactly zero" if not facts.revived else f"pruned; {facts.revived:,} of them not zero"


def _stored(folder: Folder) -> str:
    facts = folder.facts
    assert facts is not None
    forms = sorted({layer.stored for layer in facts.layers})
    told = ", ".join(forms[:3]) + (", ..." if len(forms) > 3 else "")
    tables = sorted({one.stored for one in facts.tables})
    return f"{told}; embedding {', '.join(tables)}" if tables else told


def _where(folders: list[Folder]) -> str:
    if len(folders) == 1:
        return f"{len(folders[0].files)} files for {words.target_name(folders[0])}"
    return ", ".join(f"{size(folder.size)} for {words.target_name(folder)}" for folder in folders)


def _waffle(sparsity: float | None) -> Markup | None:
    """A hundred fields; those of pruned weights are empty."""
    if sparsity is None:
        return None
    empty = int(sparsity * 100 + 0.5)
    fields = [
        leaf(
            "rect",
            class_="full" if number < 100 - empty else "empty",
            x=str(5 * (number % 10)),
            y=str(5 * (number // 10)),
            width="4",
            height="4",
            rx="0.8",
        )
        for number in range(100)
    ]
    label = f"{empty} of 100 fields are empty"
    return tag("svg", *fields, class_="waffle", viewBox="0 0 49 49", role="img", aria_label=label)


def _folders(gathered: Gathered, folders: list[Folder]) -> Markup:
    """One line for each folder."""
    rows = []
    for folder in folders:
        assert folder.facts is not None
        best = words.fastest(gathered, [folder])
        default = next((run.kl for run in folder.facts.runs if run.label == "default"), None)
        rows.append(
            [
                tag("code", folder.name),
                words.target_name(folder),
                tag("span", words.folder_verdict(folder), class_="good" if folder.ok else "bad"),
                size(folder.size),
                "not measured" if best is None else figure(best.decode.median),
                "not measured" if default is None else figure(float(default)),
            ]
        )
    heads = ["folder", "for", "certificate", "size", "tokens/s", "KL, default settings"]
    return table(heads, rows, "The folders of this model")
