"""The last sections: how to load each folder, and where everything comes from."""

from __future__ import annotations

from sparseport.model_card.loading import snippets
from sparseport.model_card.numbers import size
from sparseport.report import words
from sparseport.report.bench_file import Bench
from sparseport.report.gather import Folder, Gathered
from sparseport.report.html import Markup, details, join, table, tag


def loading_section(gathered: Gathered) -> Markup:
    """Code for every runtime that reads one of the folders."""
    parts = [tag("h2", "Load it")]
    folders = [folder for folder in gathered.folders if folder.facts is not None]
    if not folders:
        return join([*parts, tag("p", "There is nothing that should be loaded.", class_="empty")])
    if not gathered.ok:
        parts.append(tag("p", "The verdict above is bad: this is for a copy that verifies.", class_="empty"))
    for folder in folders:
        assert folder.facts is not None
        facts = folder.facts
        for snippet in snippets(facts.target, folder.name, facts.tokenizer, list(facts.adapters), chat=facts.chat):
            told = [tag("code", folder.name), " with ", tag("b", snippet.runtime)]
            inside = [tag("h4", *told), tag("pre", tag("code", snippet.code), tabindex="0")]
            inside.append(tag("p", tag("code", snippet.install), class_="install"))
            parts.append(tag("div", *inside, tag("p", snippet.note) if snippet.note else None, class_="snippet"))
    return join(parts)


def provenance_section(gathered: Gathered) -> Markup:
    """Seals, inputs, files, versions and machines."""
    parts = [tag("h2", "Where it comes from"), tag("p", words.SEAL)]
    sealed = [folder for folder in gathered.folders if folder.seal]
    if sealed:
        rows = [[tag("code", folder.name), tag("code", folder.seal), tag("code", folder.proof)] for folder in sealed]
        heads = ["folder", "seal of its certificate", "proof (the same on every machine)"]
        parts.append(table(heads, rows, "SHA-256 of the certificates"))
    for folder in sealed:
        parts += _folder(folder)
    parts += [_machine(bench) for bench in gathered.benches]
    if gathered.naive is not None and gathered.naive.machine:
        named = [*gathered.naive.machine.items(), *sorted(gathered.naive.versions.items())]
        parts.append(
            details(f"Machine and versions of {gathered.naive.name}", table(["what", "value"], named, "Machine"))
        )
    if gathered.search is not None:
        name, result = gathered.search
        digests = [
            ("search space", result.space),
            ("evaluation", result.evaluation),
            ("journal", result.journal_sha256),
        ]
        parts.append(details(f"Digests of {name}", table(["what", "SHA-256"], digests, "Search")))
    return join(parts)


def _folder(folder: Folder) -> list[Markup]:
    facts, name = folder.facts, tag("code", folder.name)
    found = []
    if facts is not None:
        inputs = [
            (role.replace("_", " "), file, digest)
            for role, files in sorted(facts.inputs.items())
            for file, digest in (sorted(files.items()) if isinstance(files, dict) else [("", files)])
        ]
        settings = [(key, _plain(value)) for key, value in sorted(facts.recipe.items())]
        versions = [("sparseport", facts.version), *sorted(facts.versions.items())]
        if inputs:
            shown = table(["input", "file", "SHA-256"], inputs, "Inputs")
            found.append(details(join(["Inputs of ", name]), shown))
        tables = [table(["package", "version"], versions, "Versions")]
        tables += [table(["setting", "value"], settings, "Settings of the export")] if settings else []
        found.append(details(join(["Versions and settings of ", name]), *tables))
    files = [(file, size(length), digest) for file, (length, digest) in folder.files.items()]
    found.append(details(join(["Files of ", name]), table(["file", "size", "SHA-256"], files, "Files")))
    return found


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "not given" if value is None else str(value)


def _machine(bench: Bench) -> Markup:
    load = [f"{one:.2f}" if one is not None else "unknown" for one in bench.load]
    rows = [*bench.machine.items(), ("waiting processes before and after", f"{load[0]} and {load[1]}")]
    rows += [(f"device {name}", full or "there") for name, full in sorted(bench.devices.items())]
    rows += [(f"asked: {key}", value) for key, value in sorted(bench.asked.items())]
    tables = [
        table(["what", "value"], rows, "Machine"),
        table(["package", "version"], sorted(bench.versions.items()), "Versions"),
    ]
    return details(f"Machine and versions of {bench.name}", *tables)
