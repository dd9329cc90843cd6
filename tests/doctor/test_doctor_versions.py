"""Versions and specifiers, held against `packaging`, which does it in full."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sparseport.doctor.versions import key, matches, release

numbers = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
versions = st.builds(
    lambda number, suffix, local: number + suffix + local,
    numbers,
    st.sampled_from(["", "", "", "rc1", "a2", "b1", ".dev3", ".post1"]),
    st.sampled_from(["", "+cpu", "+cu130"]),
)
specifiers = st.lists(
    st.builds(lambda operator, number: operator + number, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers),
    max_size=2,
).map(",".join)


@given(versions, specifiers)
@example("5.6rc1", "<5.6")
@example("2.13.0+cpu", ">2.13")
@example("2.13.0+cpu", "==2.13")
@example("0.8.0", ">=0.8")
@example("1.post1", ">1")
def test_matches_as_packaging_does(version: str, specifier: str) -> None:
    # A local part is left out here: `packaging` lets it pass some of the operators, and rules speak of releases.
    public = version.partition("+")[0]
    assert matches(version, specifier) == SpecifierSet(specifier).contains(public, prereleases=True)


@given(versions, versions)
def test_orders_releases_as_packaging_does(one: str, other: str) -> None:
    plain = [Version(version) for version in (one, other)]
    if plain[0].release != plain[1].release:
        assert (key(one) < key(other)) == (plain[0] < plain[1]) or key(one) == key(other)


def test_the_first_numbers() -> None:
    assert release("2026.4.1.0", 3) == release("2026.4.1", 3) == (2026, 4, 1)
    assert release("2", 3) == (2, 0, 0) and release("2026.4.2rc1", 3) == (2026, 4, 2)


@pytest.mark.parametrize(("version", "specifier"), [("mine", ""), ("1.0", "~=1"), ("1.0", ">=x"), ("", ">1")])
def test_what_cannot_be_read_is_said(version: str, specifier: str) -> None:
    with pytest.raises(ValueError, match=r"no (version|specifier)"):
        matches(version, specifier)
