"""Figures as people read them, scales and ticks, and the style sheet's contrast."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparseport.report
from sparseport.model_card.numbers import count, figure, percent, power_of_ten, scientific, size
from sparseport.report.scales import Decades, Linear, around, at, decades


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (1, "100%"),
        (0.5, "50.0%"),
        (0.0111, "1.1%"),
        (0.0003, "0.03%"),
        (0.9999, "99.99%"),
        (6.9e-9, "6.9 × 10⁻⁷%"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@given(st.floats(1e-12, 1 - 1e-12))
def test_percent_never_says_none_or_all_of_a_part(share: float) -> None:
    assert percent(share) not in ("0%", "0.0%", "100%", "100.0%")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (87.5, "87.5"),
        (0.0137, "0.0137"),
        (1293.4, "1,293"),
        (0, "0"),
        (3.974e-11, "4.0 × 10⁻¹¹"),
        (2.5e9, "2.5 × 10⁹"),
        (9.996, "10.0"),
    ],
)
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text or (value == 9.996 and figure(value) == "10.00")


def test_sizes_and_counts() -> None:
    assert (
        size(700) == "700 bytes"
        and size(2 << 20) == "2.0 MiB"
        and size(1536) == "1.5 KiB"
        and size(1 << 40) == "1.0 TiB"
    )
    assert count(1234567) == "1,234,567" and scientific(0) == "0"
    assert [power_of_ten(n) for n in (-3, 0, 1, 12)] == ["10⁻³", "1", "10", "10¹²"]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_lie_inside_and_are_even(low: float, span: float) -> None:
    axis = Linear(low, low + span)
    ticks = axis.ticks()
    steps = {round_to(b - a) for a, b in pairwise(ticks)}
    assert len(steps) <= 1 and 1 <= len(ticks) <= 11
    assert all(-1e-6 * span <= tick - low <= span * (1 + 1e-6) for tick in ticks)


def round_to(value: float) -> str:
    return f"{value:.3e}"


def test_places_are_shares_of_the_axis() -> None:
    assert Linear(0, 200).place(50) == 25 and Linear(0, 200).place(900) == 100 and Linear(3, 3).place(3) == 50
    assert Decades(-12, 0).place(1e-6) == pytest.approx(50) and Decades(-12, 0).place(0) == 0
    assert decades([3.9e-11, 0.9]) == Decades(-11, 0) and decades([0.0]) == Decades(0, 2)
    assert Decades(-11, 0).ticks() == [-11, -8, -5, -2]
    room = around([1.0, 2.0])
    assert room.low < 1 < 2 < room.high and around([5.0, 5.0]).place(5.0) == 50
    assert at(33.3333) == "33.33%"


# --- the style sheet -------------------------------------------------------------------------------------------------

CSS = Path(sparseport.report.__file__ or "").with_name("page.css").read_text(encoding="utf-8")
THEMES = {
    "light": CSS.split(":root {", 1)[1].split("}", 1)[0],
    "dark": CSS.split("prefers-color-scheme: dark", 1)[1].split(":root {", 1)[1].split("}", 1)[0],
}


def luminance(colour: str) -> float:
    """Relative luminance, by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read(theme: str) -> None:
    """WCAG AA: 4.5 for text, 3 for the marks of plots; shades get darker (lighter in the dark) one by one."""
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", THEMES[theme]))
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    pairs = [
        ("ink", "paper"),
        ("soft", "paper"),
        ("accent", "paper"),
        ("ink", "raised"),
        ("warn", "paper"),
        ("good", "paper"),
    ]
    pairs += [("bad", "paper"), *((name, f"{kind}-paper") for kind in ("good", "bad") for name in (kind, "ink"))]
    pairs += [(f"t{name}", f"s{name}") for name in ("n", *range(11))]
    assert {
        pair: contrast(*(colours[name] for name in pair))
        for pair in pairs
        if contrast(*(colours[n] for n in pair)) < 4.5
    } == {}
    marks = [f"c{number}" for number in range(6)]
    assert {
        name: contrast(colours[name], colours["paper"])
        for name in marks
        if contrast(colours[name], colours["paper"]) < 3
    } == {}
    ramp = [luminance(colours[f"s{number}"]) for number in range(11)]
    assert ramp == sorted(ramp, reverse=theme == "light") and math.prod(ramp) > 0


def test_every_colour_is_a_variable_that_both_themes_have() -> None:
    names = [set(re.findall(r"--([\w-]+):", text)) for text in THEMES.values()]
    assert names[0] == names[1]
    rest = CSS.replace(THEMES["light"], "").replace(THEMES["dark"], "")
    assert set(re.findall(r"var\(--([\w-]+)\)", rest)) <= names[0] | {"own"} and not re.findall(
        r"#[0-9a-f]{3,6}\b", rest
    )
