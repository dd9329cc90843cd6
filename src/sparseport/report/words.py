"""Sentences of the report: the verdict, and what a section's figures say."""

from __future__ import annotations

from collections.abc import Sequence

from sparseport.model_card.numbers import count, figure, percent
from sparseport.model_card.words import TARGETS, architecture, base_name, drift_words
from sparseport.report.bench_file import Bench, Row
from sparseport.report.gather import Folder, Gathered
from sparseport.report.naive_file import Naive

ENGINES = {
    "openvino-genai": "OpenVINO GenAI",
    "openvino": "OpenVINO",
    "onnxruntime-genai": "onnxruntime-genai",
    "torch": "PyTorch",
    "llama.cpp": "llama.cpp",
}
SEAL = (
    "The seal is a checksum, no signature: whoever may write a folder may also write another certificate. To be sure "
    "of a copy, compare its seal with the sender's."
)


def verdict(gathered: Gathered) -> tuple[str, str]:
    """The verdict in one line, and what it rests on."""
    wrong = [folder for folder in gathered.folders if not folder.ok]
    if gathered.ok:
        files, linears, tensors = (sum(folder.compared[part] for folder in gathered.folders) for part in range(3))
        what = "This is" if len(gathered.models()) == 1 else "These are"
        which = "the model that was exported" if len(gathered.models()) == 1 else "the models that were exported"
        return (
            f"Verified. {what} {which}, bit for bit.",
            f"For this report {count(files)} files, {count(linears)} linear layers and {count(tensors)} other tensors "
            "were read from disk again and compared with the certificate. Nothing differs.",
        )
    total = sum(len(folder.differences) for folder in wrong) + len(gathered.between)
    names = ", ".join(folder.name for folder in wrong) or "the folders"
    return (
        "Not verified. Do not rely on this model.",
        f"{differences(total)} from the certificate in {names}. What this page says below is what the certificate "
        "says, not what is on disk. Export again, or copy the folder again from where it came from.",
    )


def model_name(folders: Sequence[Folder]) -> str:
    """What to call folders of one model: its base's name, or that of the folder that they lie in, or their own."""
    facts = folders[0].facts
    known = None if facts is None else base_name(facts)
    if known is not None:
        return known
    names = [folder.name.split("/") for folder in folders]
    last = [name[-1] for name in names]
    own = [name[-2] if len(name) > 1 and name[-1] in TARGETS else name[-1] for name in names]
    if len(set(own)) == 1 and own[0] not in TARGETS:
        return own[0]
    return last[0] if len(last) == 1 or facts is None else f"{architecture(facts)} model"


def folder_verdict(folder: Folder) -> str:
    """One folder's verdict in a few words."""
    return "verified" if folder.ok else differences(len(folder.differences))


def differences(number: int) -> str:
    """`1 difference`, `12 differences`."""
    return "1 difference" if number == 1 else f"{count(number)} differences"


def changed_values(folders: list[Folder]) -> tuple[str, str]:
    """How many stored values differ from the merge, as a figure and the words below it."""
    facts = folders[0].facts
    assert facts is not None
    unit = "codes" if set(facts.by_bits) == {4} else "weights"
    wrong = sum(not layer.intact for folder in folders for layer in (folder.facts.layers if folder.facts else ()))
    if any(not folder.ok for folder in folders) or wrong:
        return "?", "the folder does not verify"
    after = "merge and compression" if facts.compress != "none" else "merge"
    return "0", f"of {count(facts.weights)} {unit} differ from the {after}"


def engine_name(engine: str) -> str:
    return ENGINES.get(engine, engine)


def runs_where(row: Row) -> str:
    """`OpenVINO GenAI on CPU`."""
    return f"{engine_name(row.engine)} on {row.device}"


def fastest(gathered: Gathered, folders: list[Folder]) -> Row | None:
    """The row with the most tokens per second among those measured on these folders."""
    rows = [row for folder in folders for _, row in gathered.rows_of(folder)]
    return max(rows, key=lambda row: row.decode.median, default=None)


def speed_sentence(bench: Bench, gathered: Gathered) -> str:
    """Which row of a file is the fastest, and how near the memory's bandwidth it gets."""
    if not bench.rows:
        return "Nothing was measured."
    best = max(bench.rows, key=lambda row: row.decode.median)
    told = f"Fastest: {best.label}, {figure(best.decode.median)} tokens per second"
    if best.limit is not None:
        told += f", {percent(best.limit[1])} of what the memory's bandwidth allows"
    own = sum(folder.measured(row) for folder in gathered.folders for row in bench.rows)
    which = "no row is" if not own else "1 row is" if own == 1 else f"{own} rows are"
    return f"{told}. By their certificates {which} of the folders in this report."


def naive_sentence(naive: Naive) -> str:
    """What the usual ways change, against ours."""
    ours = [way for way in naive.ways if way.ours]
    others = [way for way in naive.ways if not way.ours]
    if not others:
        return "The file has no other way to compare with."
    least, most = (find(way.changed["codes"] for way in others) for find in (min, max))
    told = f"The other ways change {percent(least)} to {percent(most)} of them"
    if len(others) == 1:
        told = f"The other way changes {percent(least)} of them"
    if not ours:
        return f"Of the codes: {told[0].lower()}{told[1:]}."
    kept = max(way.changed["codes"] for way in ours)
    own = "sparseport changes none of the codes" if kept == 0 else f"sparseport changes {percent(kept)} of the codes"
    return f"{own}. {told}."


def drift_note(kl: float) -> str:
    """A KL divergence with what it means."""
    return f"KL {figure(kl)} nats: {drift_words(kl)}"


def target_name(folder: Folder) -> str:
    return TARGETS[folder.facts.target] if folder.facts is not None else "unknown"
