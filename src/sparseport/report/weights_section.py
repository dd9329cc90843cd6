"""The section on weights: the map of every model, and the same as a table."""

from __future__ import annotations

from sparseport.model_card import words as card_words
from sparseport.model_card.facts import ModelFacts
from sparseport.model_card.numbers import count, percent
from sparseport.report.gather import Gathered
from sparseport.report.heat_map import heat_map, legend
from sparseport.report.html import Markup, details, join, table, tag


def weights_section(gathered: Gathered) -> Markup:
    """Maps and tables; says so where there is no certificate to draw them from."""
    models = [folders[0] for folders in gathered.models()]
    parts = [tag("h2", "Where the zeros and the bits are")]
    if not models:
        return join([*parts, tag("p", "No folder has a certificate that could be read.", class_="empty")])
    for folder in models:
        facts = folder.facts
        assert facts is not None
        parts += [tag("h3", tag("code", folder.name))] if len(models) > 1 else []
        parts += [tag("p", _told(facts)), tag("figure", heat_map(facts), legend(facts))]
        parts.append(details("All layers as a table", _table(facts)))
    return join(parts)


def _told(facts: ModelFacts) -> str:
    shares = sorted({layer.sparsity for layer in facts.layers if layer.sparsity is not None})
    if not shares:
        told = "No layer is pruned."
    elif len(shares) == 1:
        told = f"Every masked layer is pruned to the same share, {percent(shares[0])}."
    else:
        told = f"Layers are pruned to between {percent(shares[0])} and {percent(shares[-1])}."
    ranks = [layer.rank for layer in facts.layers if layer.rank is not None]
    if ranks:
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        told += f" An adapter was merged into {count(len(ranks))} layers, with ranks of {span}."
    return f"One field is one linear layer. {told} {card_words.cut_sentence(facts) or ''}".rstrip()


def _table(facts: ModelFacts) -> Markup:
    heads = ["layer", "shape", "whole model", "stored as", "pruned", "merge rule", "rank"]
    rows = []
    for layer in facts.layers:
        whole = "" if layer.shape == layer.whole else f"{layer.whole[0]}×{layer.whole[1]}"
        pruned = "" if layer.sparsity is None else percent(layer.sparsity)
        rank = layer.rank if layer.rank is not None else layer.beside
        rows.append(
            [
                layer.module,
                f"{layer.shape[0]}×{layer.shape[1]}",
                whole,
                layer.stored,
                pruned,
                layer.rule,
                "" if rank is None else str(rank),
            ]
        )
    if all(not row[2] for row in rows):
        heads, rows = heads[:2] + heads[3:], [row[:2] + row[3:] for row in rows]
    others = [[one.name, "×".join(map(str, one.shape)), one.stored, count(one.changed)] for one in facts.tables]
    tables = [table(heads, rows, "Linear layers")]
    if others:
        tables.append(table(["matrix", "shape", "stored as", "values changed"], others, "Other matrices"))
    return join(tables)
