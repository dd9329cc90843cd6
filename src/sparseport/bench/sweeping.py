"""`sparseport bench --sweep`: the fastest settings of folders on this machine, within a budget of drift."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.bench.drift import drift_tokens, measure_drift, write_reference
from sparseport.bench.knobs import Settings, stages
from sparseport.bench.rounds import Asked, Samples, measure_rounds
from sparseport.bench.run import check_asked, find_devices, measured_bandwidth, row_of, with_peers
from sparseport.bench.settle import settle, unsettled
from sparseport.bench.subjects import Contender, Subject, contenders, subjects_at
from sparseport.bench.sweep import Budget, Drift, Prefer, Tried, faster, sweep
from sparseport.errors import FidelityError, SparseportError, UsageError
from sparseport.machine import describe, load
from sparseport.progress import Progress
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import require, verify

SCHEMA = 1
KIND = "sparseport-sweep"


@dataclass(frozen=True)
class Swept:
    """A folder and what was found for it.

    folder    the folder that gets settings
    subject   what was measured: the folder as it was before any sweep
    tried     everything that was tried
    settings  the fastest: {} for the engine's own, None if none may be used
    """

    folder: Path
    subject: Subject
    engine: str
    tried: list[Tried]
    settings: Settings | None


def sweep_folders(
    paths: Sequence[Path | str],
    budget: Budget,
    *,
    asked: Asked | None = None,
    prefer: Prefer = "decode",
    peers: bool = False,
    write: bool = False,
    numerics: bool = True,
    text: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the fastest settings of exported folders, compare them side by side, and write them into the folders.

    Args:
        paths: folders that sparseport exported from one model: targets, accuracy levels, embeddings of any kind.
        budget: how much drift is allowed, against the dequantised model of the first folder.
        asked: how the last rounds are measured.
        prefer: what has to be fast.
        peers: whether stock ways to INT4 are made from the same weights and measured beside them.
        write: whether each folder gets its settings; see `sparseport.bench.settle`.
        numerics: whether a folder that gets settings is compared with the reference again.
        text: what drift is measured on; sparseport's own text by default.
        progress: where to report.

    Returns:
        Plain data: `rows` as a bench has them, with `drift` in each; `sweeps`, per folder `model`, `engine`,
        `settings`, `tried`, and whether they were `written` or `why` not; `chosen`, the label of the fastest row within
        the budget.

    Raises:
        UsageError: a folder is none of ours, or no settings are within the budget.
        VerificationError: a folder is not as it was certified.
    """
    asked, progress = asked or Asked(), progress or Progress("quiet")
    check_asked(asked)
    budget.check()
    given = subjects_at(paths)
    for subject in given:
        if not subject.certified:
            raise UsageError("only folders that sparseport exported are swept", where=subject.path)
        if write:
            with progress.task(f"verifying {subject.label}"):
                require(verify(subject.path))
    with tempfile.TemporaryDirectory() as name, ExitStack() as copies:
        scratch = Path(name)
        subjects = [replace(one, path=copies.enter_context(unsettled(one.path))) for one in given]
        folders = contenders(subjects, None)
        devices, before = find_devices(folders), load()
        tokens = drift_tokens(subjects[0], text)
        reference = scratch / "reference.npy"
        with progress.task("reference logits"):
            write_reference(subjects[0], tokens, reference)

        def drift_of(row: Contender) -> Drift:
            return measure_drift(row, reference, tokens, scratch)

        swept = []
        for row, original in zip(folders, given, strict=True):
            certificate = Certificate.read(row.subject.path)
            with progress.task(f"trying settings of {row.subject.label}") as step:
                tried, settings = sweep(
                    row,
                    stages(
                        row.engine,
                        group_sizes(certificate),
                        sparsity=float(certificate.totals.get("sparsity") or 0),
                        fixed_threads=asked.threads > 0,
                    ),
                    budget,
                    asked,
                    drift_of,
                    prefer=prefer,
                    on_step=step,
                )
            swept.append(Swept(original.path, row.subject, row.engine, tried, settings))
        _require_any(swept, budget)
        finals = last_rows(swept)
        made, missing = with_peers(finals[0], scratch, progress) if peers else ([], [])
        rows = finals + made
        bandwidth = measured_bandwidth(progress)
        with progress.task("last rounds", len(rows) * asked.rounds) as step:
            samples = measure_rounds(rows, asked, step)
        drifts = _drifts(samples, drift_of)
        good = [one for one in samples if one.failed is None]
        if not good:
            raise UsageError("nothing could be measured", found=samples[0].failed)
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": KIND,
            "sparseport": __version__,
            "machine": {**describe(), "load_before": before, "load_after": load(), "bandwidth_gb_s": bandwidth},
            "asked": asked.as_dict(),
            "budget": {**vars(budget), "tokens": len(tokens), "prefer": prefer},
            "devices": devices,
            "missing": missing,
            "failed": [{"label": one.contender.label, "engine": one.contender.engine, "why": str(one.failed)}
                       for one in samples if one.failed],
            "rows": [{**row_of(one, good[0], bandwidth), "drift": drifts[id(one.contender)]} for one in good],
        }  # fmt: skip
        result["sweeps"] = [_judged(one, good, budget, prefer) for one in swept]
        result["chosen"] = _fastest(result["rows"], [row.label for row in finals], budget, prefer)
        if write:
            _write(swept, result, numerics, budget, drift_of, progress)
    return result


def _drifts(samples: Sequence[Samples], drift_of: Callable[[Contender], Drift]) -> dict[int, Drift]:
    """The drift of each row that was measured, by the row's id; one that cannot be had makes its row a failed one."""
    found: dict[int, Drift] = {}
    for one in samples:
        if one.failed is None:
            try:
                found[id(one.contender)] = drift_of(one.contender)
            except SparseportError as error:
                one.failed = error
    return found


def last_rows(swept: Sequence[Swept]) -> list[Contender]:
    """Each folder at its engine's own settings, and at those that were found if they are others."""
    rows = []
    for one in swept:
        if one.settings is None:
            continue
        rows.append(Contender(one.subject, one.engine, name=f"{one.subject.label}, {one.engine}, its own settings"))
        if one.settings:
            rows.append(replace(rows[-1], settings=one.settings, name=f"{one.subject.label}, {one.engine}, swept"))
    return rows


def group_sizes(certificate: Certificate) -> list[int]:
    """Group sizes that a folder's INT4 layers are stored in."""
    linears = certificate.linears.values()
    return sorted({int(facts["stored_group_size"]) for facts in linears if facts.get("stored_group_size")})


def _require_any(swept: Sequence[Swept], budget: Budget) -> None:
    """Refuse to go on without any settings.

    Raises:
        UsageError: no folder has some within the budget.
    """
    if all(one.settings is None for one in swept):
        tried = [each for one in swept for each in one.tried]
        broken = [each.failed for each in tried if each.failed is not None and (each.within or each.drift is None)]
        drifts = [each.drift for each in tried if each.drift is not None]
        if broken or not drifts:
            raise UsageError("no settings of any folder could be measured", found=broken[0] if broken else None)
        least = min(drifts, key=lambda drift: drift["kl"])
        raise UsageError(
            "no settings of any folder stay within the budget",
            expected=f"KL <= {budget.kl}, top-1 >= {budget.top1}",
            found=f"at least KL {least['kl']:.1e}, top-1 {least['top1']:.3f}",
            fix="allow more drift, or export with products in float32 (--onnx-accuracy exact)",
        )


def _judged(one: Swept, samples: Sequence[Samples], budget: Budget, prefer: Prefer) -> dict[str, Any]:
    """What was found for a folder; settings that were not worth it in the last rounds are taken back."""
    own = [row for row in samples if row.contender.subject is one.subject]
    default = next((row for row in own if not row.contender.settings), None)
    chosen = next((row for row in own if row.contender.settings), None)
    at_default = next((tried.drift for tried in one.tried if not tried.settings), None)
    # Without settings, the folder would drift too far, or nobody knows.
    needed = at_default is None or not budget.allows(at_default)
    worth_it = chosen is not None and (needed or default is None or faster(chosen, default, prefer))
    settings = dict(one.settings or {}) if worth_it else {}
    return {
        "model": one.subject.label,
        "engine": one.engine,
        "within": one.settings is not None and (chosen is not None or not needed),
        "settings": settings,
        "written": False,
        "why": None,
        "tried": [vars(tried) for tried in one.tried],
    }


def _fastest(rows: list[dict[str, Any]], ours: Sequence[str], budget: Budget, prefer: Prefer) -> str | None:
    """The label of our fastest row within the budget."""
    figure = "decode_ms" if prefer == "decode" else "first_token_ms"
    inside = [row for row in rows if row["label"] in ours and budget.allows(row["drift"])]
    return min(inside, key=lambda row: row[figure]["median"])["label"] if inside else None


def _write(
    swept: Sequence[Swept],
    result: dict[str, Any],
    numerics: bool,
    budget: Budget,
    drift_of: Callable[[Contender], Drift],
    progress: Progress,
) -> None:
    """Write every folder's settings, with what was measured of it; a folder that cannot get them says why."""
    for one, found in zip(swept, result["sweeps"], strict=True):
        if not found["within"]:
            found["why"] = "no settings are within the budget"
            continue

        def at_rest(stage: Path, one: Swept = one) -> Drift:
            return _allowed(drift_of(Contender(replace(one.subject, path=stage), one.engine)), budget, one)

        labels = {row["label"] for row in result["rows"] if row["model"] == one.subject.label}
        evidence = {
            **{key: result[key] for key in ("schema", "kind", "sparseport", "machine", "asked", "budget")},
            "rows": [row for row in result["rows"] if row["label"] in labels],
            "sweep": {**found, "written": True},
        }
        try:
            settle(one.folder, found["settings"], evidence, at_rest=at_rest, numerics=numerics, progress=progress)
        except SparseportError as error:
            found["why"] = str(error)
        else:
            found["written"] = True


def _allowed(drift: Drift, budget: Budget, one: Swept) -> Drift:
    """The drift of a folder that an application loads without settings of its own.

    Raises:
        FidelityError: it is outside of the budget, because a setting that would be needed cannot be written into it.
    """
    if not budget.allows(drift):
        raise FidelityError(
            "the folder's own settings are outside of the budget: applications have to give the rest themselves",
            where=one.subject.label,
            expected=f"KL <= {budget.kl}, top-1 >= {budget.top1}",
            found=f"KL {drift['kl']:.1e}, top-1 {drift['top1']:.3f}",
            fix="allow more drift, or give the settings above to the runtime yourself",
        )
    return drift
