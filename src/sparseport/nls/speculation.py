"""The arithmetic of speculative decoding with a draft, for greedy decoding (Leviathan et al., arXiv 2211.17192).

A round: the draft says k tokens one after the other, and the main network reads them in one step of k + 1 tokens. The
longest beginning that the main network would have said itself is kept, and one token of its own comes on top. Every
token that is kept is the main network's, so its answer is known before, and what the draft would say at each of its
tokens decides every round, whatever k is: a row of true and false per answer, the `agreement` here. The first token of
an answer has no place in it: it comes of reading the prompt.

Times are in units of one decoding step of the main network:

    c    one step of the draft
    v_k  one step of the main network that reads k + 1 tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparseport.errors import UsageError


@dataclass(frozen=True)
class Rounds:
    """What answers took.

    rounds    steps of the main network
    tokens    tokens that they gave
    proposed  tokens of the draft
    accepted  those that were kept
    """

    rounds: int
    tokens: int
    proposed: int
    accepted: int


def acceptance(agreements: Sequence[Sequence[bool]]) -> float:
    """Share of the main network's tokens that the draft would have said in their places.

    It is the probability that a token is kept if all of its round before it were: a in `tokens_per_round`.

    Raises:
        UsageError: there is no token.
    """
    tokens = sum(map(len, agreements))
    if not tokens:
        raise UsageError("no token to compare", fix="give longer answers or more prompts")
    return sum(map(sum, agreements)) / tokens


def tokens_per_round(a: float, k: int) -> float:
    """Expected tokens of a round, (1 - a^(k + 1)) / (1 - a), if tokens are kept independently of each other.

    Args:
        a: probability that a token is kept, 0 to 1.
        k: tokens that the draft says.
    """
    return float(sum(a**i for i in range(k + 1)))


def speed_up(a: float, k: int, c: float, v: float) -> float:
    """How many times faster than without a draft: tokens of a round by its time, c k + v (`v` is v_k)."""
    return tokens_per_round(a, k) / (c * k + v)


def replay(agreements: Sequence[Sequence[bool]], k: int) -> Rounds:
    """The rounds of whole answers. As in OpenVINO GenAI the draft says no token for the place of an answer's last one.

    Args:
        agreements: per answer, for each of its tokens whether the draft would have said it.
        k: tokens that the draft says in a round, 1 or more.
    """
    rounds = tokens = proposed = accepted = 0
    for row in agreements:
        at = 0
        while at < len(row):
            asked = min(k, len(row) - at - 1)
            kept = next((n for n in range(asked) if not row[at + n]), asked)
            at += kept + 1
            rounds, tokens = rounds + 1, tokens + kept + 1
            proposed, accepted = proposed + asked, accepted + kept
    return Rounds(rounds, tokens, proposed, accepted)


def replayed_speed_up(agreements: Sequence[Sequence[bool]], k: int, c: float, v: float) -> float:
    """As `speed_up`, for these answers: agreements follow each other in runs, and answers end.

    Every step of the main network counts as one of k + 1 tokens, and a token of the draft as c.
    """
    found = replay(agreements, k)
    return found.tokens / (found.rounds * v + found.proposed * c)


def best_length(agreements: Sequence[Sequence[bool]], c: float, verify: Sequence[float]) -> tuple[int, float]:
    """The k with the largest speed-up of these answers, and that speed-up; verify[k - 1] is v_k."""
    found = [(replayed_speed_up(agreements, k, c, v), -k) for k, v in enumerate(verify, 1)]
    best, length = max(found)
    return -length, best


def break_even(c: float, verify: Sequence[float]) -> float | None:
    """The smallest a, to a thousandth, at which some k makes it faster; None if none does (k = 1 ... len(verify))."""
    for thousandths in range(1001):
        a = thousandths / 1000
        if any(speed_up(a, k, c, v) > 1 for k, v in enumerate(verify, 1)):
            return a
    return None
