"""Write the model cards of finished folders anew, with what was measured. Each folder's certificate is sealed again.

The weights, and everything else in the folder, are the same files as before; the old seal stays in the certificate, so
that measurements that name it still belong to the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparseport.model_card.numbers import figure, percent
from sparseport.model_card.text import Measured, Speed
from sparseport.model_card.words import drift_words
from sparseport.model_card.writing import with_card
from sparseport.publish import copy_linked, staged_output
from sparseport.report.bench_file import Bench, Row, Summary, machine_name
from sparseport.report.gather import SEALS_BEFORE, Folder, Given, looked_at
from sparseport.report.words import engine_name
from sparseport.verify.certificate import FILE_NAME, Certificate, certified_folders


def write_cards(given: Sequence[Given], folders: Sequence[Folder], benches: Sequence[Bench]) -> list[Folder]:
    """Write README.md in every folder; returns the folders as they are now.

    Args:
        given: where they are.
        folders: as they were looked at, in the same order; all of them verify.
        benches: files whose rows of these folders are shown.

    Raises:
        EnvironmentProblem: a folder cannot be written; it is as it was then.
    """
    places = [place for one in given for place in one.places]
    found = []
    for place, folder in zip(places, folders, strict=True):
        write_card(place.path, measured_of(folder, benches))
        found.append(looked_at(place, folder.compared))
    return found


def write_card(folder: Path, measured: Sequence[Measured]) -> Certificate:
    """Write one folder's README.md and its certificate; the folder is made anew from links and takes its own place."""
    with staged_output(folder, overwrite=True, ours=lambda path: bool(certified_folders(path))) as stage:
        copy_linked(folder, stage)
        before = Certificate.read(stage)
        seals = before.body.get(SEALS_BEFORE, [])
        named = Certificate({**before.body, SEALS_BEFORE: [*(seals if isinstance(seals, list) else []), before.seal()]})
        sealed = with_card(named, stage, measured, logits=True)
        (stage / FILE_NAME).unlink()  # a link to the old folder's, which stays as it is
        sealed.write(stage)
    return sealed


def measured_of(folder: Folder, benches: Sequence[Bench]) -> list[Measured]:
    """The rows of bench files that are of this folder, as a card shows them."""
    found = []
    # Seals that the folder had when a sweep measured it: its own settings were others then.
    unswept = set() if folder.evidence is None else {row.seal for row in folder.evidence.rows}
    for bench in benches:
        rows = tuple(_speed(row, row.seal in unswept) for row in bench.rows if folder.measured(row))
        if rows:
            found.append(Measured(machine_name(bench), rows))
    return found


def _speed(row: Row, unswept: bool) -> Speed:
    settings = ", ".join(f"{key} {value}" for key, value in sorted(row.settings.items()))
    settings = settings or ("those before the sweep" if unswept else "the folder's own")
    drift = "not measured" if row.kl is None else f"KL {figure(row.kl)} nats ({drift_words(row.kl)})"
    drift += "" if row.top1 is None else f", same top token {percent(row.top1)}"
    return Speed(engine_name(row.engine), row.device, settings, _range(row.decode), _range(row.prefill), drift)


def _range(value: Summary) -> str:
    return f"{figure(value.median)} [{figure(value.least)} to {figure(value.largest)}]"
