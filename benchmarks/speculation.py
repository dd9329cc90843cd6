"""Does a sub-network that drafts for its own super-network make it faster, and is every token the same?

    python benchmarks/speculation.py --base DIR --adapter DIR --scratch DIR [--chosen sub_adapter.json]
    python benchmarks/speculation.py --costs MAIN DRAFT [DRAFT ...]

The first form exports the whole super-network with each draft (minimal, heuristic, the minimal one in INT4, and what a
search chose), lets the runtime generate without a draft and with 1 to 5 drafted tokens, all ways in another order for
each prompt, and compares: tokens, the runtime's own counts of proposed and accepted ones, times. Half of the prompts
are the demo task's (answers end where they end), half are beginnings of sentences (generation goes on to the full
length). Beside that: how often the draft would have said the main network's tokens, what a step of each network costs,
and the speed-up that follows from both, replayed on these answers and by the formula (see sparseport.nls.speculation).
Steps are timed in the models alone; generation has its scheduler and its paged attention on top.

The second form only measures costs of folders that exist already, such as those of sub_networks.py, and shows from
which acceptance on it pays.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
from same_tokens import _prompts as make_prompts
from speculation_engines import ENGINES, Generated

from sparseport.offline import go_offline

go_offline()

from sparseport.figures import paired_ratio, summary  # noqa: E402
from sparseport.layout import folder_name  # noqa: E402
from sparseport.nls.drafting import agreements_of  # noqa: E402
from sparseport.nls.engines import open_session  # noqa: E402
from sparseport.nls.latency import measure_draft_costs  # noqa: E402
from sparseport.nls.speculation import acceptance, break_even, replay, replayed_speed_up, speed_up  # noqa: E402
from sparseport.pipeline import export  # noqa: E402
from sparseport.recipe import make_recipe  # noqa: E402

INT4 = {"mode": "int4_sym", "group_size": 64}
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
COSTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass
class Tally:
    """Sums over prompts for one draft, one number of drafted tokens and one kind of prompts."""

    prompts: int = 0
    identical: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0
    steps: int = 0
    stepped: int = 0
    plain_ms: list[float] = field(default_factory=list)
    draft_ms: list[float] = field(default_factory=list)

    def add(self, plain: Generated, drafted: Generated, different: dict[str, Any] | None) -> None:
        self.prompts += 1
        self.identical += different is None
        self.different += [] if different is None else [different]
        self.proposed, self.accepted = self.proposed + drafted.proposed, self.accepted + drafted.accepted
        self.steps, self.stepped = self.steps + drafted.steps, self.stepped + drafted.stepped
        self.plain_ms.append(plain.decode_ms)
        self.draft_ms.append(drafted.decode_ms)

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "identical": self.identical,
            "different": self.different,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "accepted_share": self.accepted / self.proposed if self.proposed else None,
            "steps": self.steps,
            "tokens_per_step": self.stepped / self.steps if self.steps else None,
            "plain_ms": summary(self.plain_ms),
            "draft_ms": summary(self.draft_ms),
            "speed_up": sum(self.plain_ms) / sum(self.draft_ms),
            "speed_up_median": 1 / paired_ratio(self.draft_ms, self.plain_ms),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model that the super-adapter was trained on")
    parser.add_argument("--adapter", type=Path, help="super-adapter with its search space")
    parser.add_argument("--scratch", type=Path, help="folder for the exports; kept, and used again")
    parser.add_argument("--chosen", type=Path, help="JSON list of sizes that a search chose")
    parser.add_argument("--drafts", nargs="+", default=["minimal", "heuristic", "minimal INT4"])
    parser.add_argument("--target", choices=sorted(ENGINES), default="openvino")
    parser.add_argument("--settings", nargs="+", choices=["full", "default"], default=["full", "default"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="tokens drafted at once")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="of measuring the costs")
    parser.add_argument("--costs", type=Path, nargs="+", help="only measure the costs of these folders, main first")
    parser.add_argument("--name", default="speculation", help="of the result's file")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": common.machine()}
    if options.costs:
        first, *rest = options.costs
        found = costs(first, rest, max(options.lengths), options.rounds, "default")
        result |= {"costs": found}
        print(costs_table({"default": found}), pays_table(found), sep="\n\n")
        print(f"written to {common.save(f'{options.name}_costs', result).name}")
        return
    for name in ("base", "adapter", "scratch"):
        if getattr(options, name) is None:
            parser.error(f"--{name} is missing")
    drafts = {label: _choice(label) for label in options.drafts}
    if options.chosen is not None:
        drafts["chosen"] = (str(options.chosen), {})
    result |= {"asked": {name: getattr(options, name) for name in ("target", "lengths", "prompts", "tokens", "rounds")}}
    result |= {"sizes": {}, "costs": {}, "rows": []}
    pairs = {}
    for number, (label, (choice, compress)) in enumerate(drafts.items()):
        pairs[label] = exported(options, number, choice, compress)
        result["sizes"][label] = sizes(pairs[label], options.target)
    first = next(iter(pairs.values())) / options.target
    networks = {label: pair / folder_name(options.target, draft=True) for label, pair in pairs.items()}
    for settings in options.settings:
        result["costs"][settings] = costs(first, [*networks.values()], max(options.lengths), options.rounds, settings)
        for index, (label, network) in enumerate(networks.items()):
            print(f"{label}, {settings}", file=sys.stderr, flush=True)
            main_folder = network.with_name(options.target)
            result["rows"] += compared(options, settings, label, main_folder, network, result["costs"][settings], index)
            common.save(options.name, result)
    print(rows_table(result["rows"]), costs_table(result["costs"], list(networks)), sep="\n\n")
    print()
    print(pays_table(result["costs"][options.settings[-1]]))


def _choice(label: str) -> tuple[str, dict[str, Any]]:
    choice, _, int4 = label.partition(" ")
    return choice, INT4 if int4 else {}


def exported(options: argparse.Namespace, number: int, choice: str, compress: dict[str, Any]) -> Path:
    """The folder of a pair; one that is there is taken as it is."""
    folder = options.scratch / f"{options.target}-{number}-{Path(choice).stem}{'-int4' if compress else ''}"
    if not folder.is_dir():
        fields = {"base": options.base, "adapter": options.adapter, "target": [options.target], "numerics": False}
        fields |= {"draft": choice, **({"draft_compress": compress} if compress else {}), "output": folder}
        export(make_recipe(fields))
    return folder


def sizes(pair: Path, target: str) -> dict[str, int]:
    """Bytes of both networks' folders."""
    folders = {"main": pair / target, "draft": pair / folder_name(target, draft=True)}
    return {name: sum(file.stat().st_size for file in folder.iterdir()) for name, folder in folders.items()}


def costs(main: Path, drafts: list[Path], longest: int, rounds: int, settings: str) -> dict[str, Any]:
    """c of each draft and v_1 ... of the main network, with the milliseconds that they come from."""
    found = measure_draft_costs(main, drafts, longest=longest, rounds=rounds, precision=settings)  # type: ignore[arg-type]
    for draft in found["drafts"]:
        draft["path"] = Path(draft["path"]).name
    verify = [found["step_ms"][str(k + 1)]["ratio"] for k in range(1, longest + 1)]
    return {**found, "verify": verify, "c": [draft["step_ms"]["ratio"] for draft in found["drafts"]]}


def compared(
    options: argparse.Namespace,
    settings: str,
    label: str,
    main_folder: Path,
    draft_folder: Path,
    measured: dict[str, Any],
    index: int,
) -> list[dict[str, Any]]:
    """One row per number of drafted tokens."""
    from transformers import AutoTokenizer

    prompts = make_prompts(AutoTokenizer.from_pretrained(main_folder), options.prompts)
    kinds = ["task" if number < options.prompts // 2 else "text" for number in range(len(prompts))]
    engine = ENGINES[options.target](main_folder, draft_folder, settings)
    engine.generate(prompts[0], 4, 0, True)
    engine.generate(prompts[0], 4, options.lengths[0], True)  # both have compiled what they need
    tallies = {(k, kind): Tally() for k in options.lengths for kind in ("task", "text")}
    answers = []
    shuffle = random.Random(0).shuffle
    for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        # Another order for every prompt: the first to read a new prompt pays for it.
        ways = [0, *options.lengths]
        shuffle(ways)
        said = {k: engine.generate(prompt, options.tokens, k, kind == "text") for k in ways}
        plain = said[0]
        answers.append(plain.tokens)
        for k in options.lengths:
            drafted = said[k]
            wrong = None if drafted.tokens == plain.tokens else difference(main_folder, number, prompt, plain, drafted)
            tallies[k, kind].add(plain, drafted, wrong)
        print(f"\r{number + 1} of {len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    session, _ = open_session(draft_folder, settings)  # type: ignore[arg-type]
    agreed = agreements_of(session, prompts, answers)
    rows = []
    for k in options.lengths:
        row: dict[str, Any] = {"draft": label, "settings": settings, "k": k}
        for kind in ("task", "text"):
            own = [row for row, one in zip(agreed, kinds, strict=True) if one == kind]
            a, c, v = acceptance(own), measured["c"][index], measured["verify"][k - 1]
            replayed = replay(own, k)
            row[kind] = {
                **tallies[k, kind].as_dict(),
                "agreement": a,
                "replayed": vars(replayed),
                "replayed_speed_up": replayed_speed_up(own, k, c, v),
                "formula_speed_up": speed_up(a, k, c, v),
            }
        rows.append(row)
    return rows


def difference(folder: Path, number: int, prompt: list[int], plain: Generated, drafted: Generated) -> dict[str, Any]:
    """Where two answers part, and how far apart the two tokens' logits are there at full precision."""
    pairs = zip(plain.tokens, drafted.tokens, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(plain.tokens), len(drafted.tokens)))
    found = {"prompt": number, "place": place, "margin": None}
    if place < min(len(plain.tokens), len(drafted.tokens)):
        session, _ = open_session(folder, "full")
        logits = session.read([*prompt, *plain.tokens[:place]])[-1].astype(np.float64)
        found["margin"] = float(logits[plain.tokens[place]] - logits[drafted.tokens[place]])
    return found


def rows_table(rows: list[dict[str, Any]]) -> str:
    head = ["draft", "settings", "k", "prompts", "same tokens", "agreement", "accepted of proposed"]
    head += ["steps / replayed", "tokens a step", "speed-up", "replayed", "formula"]
    lines = []
    for row in rows:
        for kind in ("task", "text"):
            one = row[kind]
            share = "-" if one["accepted_share"] is None else f"{one['accepted_share']:.0%}"
            line = [row["draft"], row["settings"], str(row["k"]), kind, f"{one['identical']} of {one['prompts']}"]
            line += [f"{one['agreement']:.0%}", share, f"{one['steps']} / {one['replayed']['rounds']}"]
            line += ["-" if one["tokens_per_step"] is None else f"{one['tokens_per_step']:.2f}"]
            speeds = (one[name] for name in ("speed_up", "replayed_speed_up", "formula_speed_up"))
            lines.append([*line, *(f"{speed:.2f}x" for speed in speeds)])
    return common.table(head, lines)


def costs_table(found: dict[str, dict[str, Any]], labels: list[str] | None = None) -> str:
    """A row per network: milliseconds of a step, c, and v_k of the main network."""
    lines = []
    for settings, one in found.items():
        longest = len(one["verify"])
        v = ", ".join(f"{value:.2f}" for value in one["verify"])
        lines.append([settings, "main network", f"{one['step_ms']['1']['median']:.2f}", "1", v])
        for index, draft in enumerate(one["drafts"]):
            label = draft["path"] if labels is None else labels[index]
            pays = break_even(one["c"][index], one["verify"])
            pays_text = f"never, up to k = {longest}" if pays is None else f"pays from a = {pays:.2f} on"
            lines.append([settings, label, f"{draft['step_ms']['median']:.2f}", f"{one['c'][index]:.2f}", pays_text])
    return common.table(["settings", "network", "ms a token", "c", "v_1, v_2, ..."], lines)


def pays_table(found: dict[str, Any]) -> str:
    """Predicted speed-up with the best k, for acceptances and draft costs, at the verify costs that were measured."""
    verify = found["verify"]
    lines = [
        [f"{c:.1f}", *(f"{max(speed_up(a, k, c, v) for k, v in enumerate(verify, 1)):.2f}x" for a in SHARES)]
        for c in COSTS
    ]
    return common.table(["c \\ a", *(f"{a:.0%}" for a in SHARES)], lines)


if __name__ == "__main__":
    main()
