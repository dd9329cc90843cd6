"""The model card: README.md with the metadata that model hubs read, made from a certificate's facts.

An export writes it before the certificate is sealed, from what is the same on every machine: no path, no time, no
measured value. `sparseport report --card` writes it again with measured logits and speeds.

Metadata: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseport.checkpoints.readme import FILE_NAME
from sparseport.errors import printable
from sparseport.model_card import words
from sparseport.model_card.facts import Layer, ModelFacts
from sparseport.model_card.loading import snippets
from sparseport.model_card.markdown import block, code, plain, table
from sparseport.model_card.numbers import count, percent

__all__ = ["FILE_NAME", "Measured", "Speed", "model_card"]

FOLDER = "path/to/this/folder"
_RULE_TAGS = {
    "qa_sparse_peft": "qa-sparsepeft",
    "sparse_peft": "sparsepeft",
    "fq_lora": "nncf",
    "lora": "lora",
    "branch": "lora",
}


@dataclass(frozen=True)
class Speed:
    """A measured row, as text: what ran where, tokens per second with their range, and how far the answers drift."""

    engine: str
    device: str
    settings: str
    decode: str
    prefill: str
    drift: str


@dataclass(frozen=True)
class Measured:
    """Rows measured on one machine."""

    machine: str
    rows: tuple[Speed, ...]


def model_card(facts: ModelFacts, measured: Sequence[Measured] = (), *, logits: bool = False) -> str:
    """The text of README.md.

    Args:
        facts: of the folder.
        measured: speeds to show; without them the card says nothing of speed.
        logits: whether the measured logits are shown. They differ in their last digits from machine to machine, so an
            export leaves them out: the certificate proves this file as well.
    """
    target = words.TARGETS[facts.target]
    name = words.base_name(facts) or f"{words.architecture(facts)} model"
    told = [f"This is {words.kind(facts)}.", words.bits_sentence(facts), words.sparsity_sentence(facts)]
    told += [
        line
        for line in (words.cut_sentence(facts), words.draft_sentence(facts), words.adapters_sentence(facts))
        if line
    ]
    parts = [
        f"---\n{_metadata(facts)}---",
        f"# {plain(name)}: {plain(words.form(facts))}, for {target}",
        "\n".join(map(_sentence, told)),
        f"The folder was exported by sparseport {plain(facts.version)}, which read it back from disk and compared "
        "every weight with the merged model. Its certificate, `sparseport.json`, says what each file and each weight "
        "has to be; any copy can be held against it again:",
        block("sh", f"sparseport verify {FOLDER}"),
        "## Load it",
        *_loading(facts),
        "## What is in it",
        _contents(facts),
        *([_tables(facts)] if facts.tables else []),
        *_logits(facts if logits else None),
        *_speeds(measured),
        "## How it was made",
        _made(facts),
        "## License and origin",
        _origin(facts),
        "What the model was trained for, on what, and where its limits are, is for the authors of its base and its "
        "adapter to say; exporting changes none of it.",
    ]
    return "\n\n".join(parts) + "\n"


def metadata(facts: ModelFacts) -> dict[str, Any]:
    """The keys of the card's YAML head, in their order."""
    origin = facts.origin
    licenses = _licenses(facts)
    found: dict[str, Any] = {"license": licenses[0] if len(licenses) == 1 else "other" if licenses else "unknown"}
    if len(licenses) == 1:
        found |= {key: origin[key] for key in ("license_name", "license_link") if isinstance(origin.get(key), str)}
    elif licenses:
        found["license_name"] = "several, see below"
    languages = origin.get("languages")
    if isinstance(languages, list) and languages:
        found["language"] = [str(language) for language in languages]
    found |= {"library_name": facts.target, "pipeline_tag": "text-generation"}
    base = origin.get("base_model")
    if isinstance(base, dict) and isinstance(base.get("name"), str):
        found["base_model"] = base["name"]
        relation = (
            "quantized" if min(facts.by_bits, default=16) <= 8 else "finetune" if set(facts.rules) != {"carry"} else ""
        )
        found |= {"base_model_relation": relation} if relation else {}
    found["tags"] = _tags(facts)
    return found


def _metadata(facts: ModelFacts) -> str:
    import yaml

    shown = {
        key: [printable(one) for one in value] if isinstance(value, list) else printable(value)
        for key, value in metadata(facts).items()
    }
    return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, default_flow_style=False))


def _tags(facts: ModelFacts) -> list[str]:
    tags = ["sparseport", facts.target]
    tags += [f"int{bits}" for bits in facts.by_bits if bits <= 8]
    tags += ["sparse"] if facts.sparsity else []
    tags += [_RULE_TAGS[rule] for rule in _RULE_TAGS if rule in facts.rules]
    tags += ["lora"] if facts.adapters else []
    tags += ["sub-network"] if facts.cut_blocks or facts.narrower else []
    tags += [facts.model_type] if facts.model_type.replace("_", "").replace("-", "").isalnum() else []
    return list(dict.fromkeys(tags))


def _sentence(text: str) -> str:
    """A sentence of our own; names of files in it are escaped."""
    return plain(text).replace("\\(", "(").replace("\\)", ")").replace("\\-", "-")


def _loading(facts: ModelFacts) -> list[str]:
    parts = []
    for snippet in snippets(facts.target, FOLDER, facts.tokenizer, list(facts.adapters), chat=facts.chat):
        parts += [f"{snippet.runtime} (`{snippet.install}`):", block("python", snippet.code)]
        parts += [snippet.note] if snippet.note else []
    return parts


def _contents(facts: ModelFacts) -> str:
    """One row for each kind of layer: same place in a block, same form."""
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in facts.layers:
        groups.setdefault((layer.part, layer.stored, layer.rule), []).append(layer)
    rows = []
    for (part, stored, rule), layers in groups.items():
        weights = sum(layer.weights for layer in layers)
        masked = [layer for layer in layers if layer.pruned is not None]
        pruned = (
            percent(sum(layer.pruned or 0 for layer in masked) / sum(layer.weights for layer in masked))
            if masked
            else ""
        )
        ranks = [layer.rank for layer in layers if layer.rank is not None]
        rank = "" if not ranks else _range(min(ranks), max(ranks))
        rows.append([code(part), count(len(layers)), code(stored), count(weights), pruned, code(rule), rank])
    return table(["layer", "number", "stored as", "weights", "pruned", "merge rule", "rank merged"], rows)


def _tables(facts: ModelFacts) -> str:
    rows = [
        [code(one.name), " × ".join(map(str, one.shape)), code(one.stored), count(one.changed)] for one in facts.tables
    ]
    return table(["other matrix", "shape", "stored as", "values changed by storing"], rows)


def _logits(facts: ModelFacts | None) -> list[str]:
    if facts is None or not facts.runs:
        return []
    rows = [
        [
            plain(words.run_name(run)),
            run.max_abs or run.largest or "",
            run.kl or "",
            percent(float(run.top1)) if run.top1 else "",
        ]
        for run in facts.runs
    ]
    heads = ["run", "largest difference of logits", "KL (nats)", "same most likely token"]
    told = f"Logits of {count(facts.sample)} tokens against a torch model with the same weights in float32."
    return ["## Logits", told, table(heads, rows)]


def _speeds(measured: Sequence[Measured]) -> list[str]:
    parts = []
    heads = ["engine", "device", "settings", "decode (tokens/s)", "prefill (tokens/s)", "drift"]
    for one in measured:
        rows = [
            [plain(cell) for cell in (row.engine, row.device, row.settings, row.decode, row.prefill, row.drift)]
            for row in one.rows
        ]
        parts += [
            f"Measured on {plain(one.machine)}; medians, with the least and the largest value in brackets.",
            table(heads, rows),
        ]
    return ["## Speed", *parts] if parts else []


def _made(facts: ModelFacts) -> str:
    shown = ("sub_adapter", "rounding", "embedding", "mask_policy", "branches", "branch_dtype")
    settings = [f"{key} {code(facts.recipe[key])}" for key in shown if isinstance(facts.recipe.get(key), str)]
    rules = ", ".join(f"{code(rule)} {count(layers)}" for rule, layers in facts.rules.items())
    lines = [f"Layers by merge rule: {rules}."] + ([f"Settings: {', '.join(settings)}."] if settings else [])
    rows = [
        [plain(role.replace("_", " ")), code(name), code(digest)]
        for role, files in sorted(facts.inputs.items())
        for name, digest in (sorted(files.items()) if isinstance(files, dict) else ())
    ]
    return "\n\n".join([*lines, table(["input", "file", "SHA-256"], rows)]).rstrip()


def _origin(facts: ModelFacts) -> str:
    lines = []
    base = facts.origin.get("base_model")
    if isinstance(base, dict) and isinstance(base.get("name"), str):
        lines.append(f"Base model: {code(base['name'])}, as the inputs' {code(base.get('source', ''))} names it.")
    else:
        lines.append("Base model: the inputs do not name it.")
    named = facts.origin.get("licenses")
    if _licenses(facts) and isinstance(named, dict):
        parts = [
            f"{plain(role.replace('_', ' '))}: {', '.join(map(code, found))}" for role, found in sorted(named.items())
        ]
        lines.append(f"License, as the inputs name it: {'; '.join(parts)}.")
    else:
        lines.append("License: unknown. No input names one; ask the authors of the base and of the adapter before use.")
    return "\n".join(lines)


def _licenses(facts: ModelFacts) -> list[str]:
    named = facts.origin.get("licenses")
    if not isinstance(named, dict):
        return []
    return sorted({str(one) for found in named.values() if isinstance(found, list) for one in found})


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
