"""Which packages are there: read from metadata alone, and compared with the tested versions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparseport.doctor import packages
from sparseport.doctor.packages import NAMED, PURPOSES, Installed, abilities, canonical, read_installed, unmet

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


def install(folder: Path, name: str, version: str, *requires: str, stem: str | None = None) -> None:
    metadata = folder / f"{(stem or name).replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    lines = [f"Requires-Dist: {line}" for line in requires]
    metadata.write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of everything that is installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_the_tested_versions_are_those_of_the_repository(repo_root: Path) -> None:
    """They travel inside the package, where constraints.txt is not."""
    there, here = repo_root / "src" / "sparseport" / "doctor" / "tested.txt", repo_root / "constraints.txt"
    assert there.read_bytes() == here.read_bytes(), "cp constraints.txt src/sparseport/doctor/tested.txt"
    pins = [Requirement(line) for line in here.read_text().splitlines() if line and line[0] != "#"]
    expected = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert packages.read_tested() == expected and len(expected) > 100


def test_what_is_named_is_what_the_project_asks_for(repo_root: Path) -> None:
    project: dict[str, Any] = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
    asked = {canonicalize_name(Requirement(line).name) for lines in extras.values() for line in lines}
    asked |= {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert asked <= set(NAMED) and {extra for _, _, extra in PURPOSES} == set(extras)
    assert set(NAMED) <= set(packages.read_tested())


def test_metadata_is_read(site: Path) -> None:
    install(site, "Some_Package", "1.2+cpu", "numpy>=1", 'rich; extra == "x"')
    install(site, "numpy", "2.0")
    (site / "left_behind-1.dist-info").mkdir()
    found = read_installed()
    assert found.versions == {"some-package": "1.2+cpu", "numpy": "2.0"} and found.doubled == {}
    assert len(found.requirements["some-package"]) == 2


def test_two_versions_of_one_package(site: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    install(site, "numpy", "2.0")
    later = tmp_path_factory.mktemp("later")
    sys.path.append(str(later))
    install(later, "NumPy", "1.0", stem="NumPy")
    found = read_installed()
    assert found.versions == {"numpy": "2.0"} and found.doubled == {"numpy": ("2.0", "1.0")}


def test_requirements_that_do_not_hold() -> None:
    requires = ("numpy<2.5,>=1", "absent", 'windows-only; sys_platform == "nowhere"', 'rich; extra == "x"', "Some_B>=2")
    installed = Installed(
        {"a": "1", "numpy": "2.5.0", "some-b": "2.0rc1", "c": "own build"},
        {"a": requires, "numpy": (), "some-b": ("not a requirement at all",), "c": ("c>=1",)},
        {},
    )
    assert unmet(installed) == [
        ("a", "numpy<2.5,>=1", "2.5.0"),
        ("a", "absent", "absent"),
        ("a", "Some_B>=2", "2.0rc1"),
    ]


def test_without_packaging_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert unmet(Installed({"a": "1"}, {"a": ("b",)}, {})) is None


def test_what_is_missing_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in ("nncf", "openvino_genai") else object())
    by_purpose = {one["purpose"]: one for one in abilities()}
    export = by_purpose["export to OpenVINO, verify such folders"]
    assert export["missing"] == ["nncf"] and not export["ready"] and "sparseport[openvino]" in str(export["install"])
    assert by_purpose["chat with OpenVINO folders"]["missing"] == ["openvino_genai"]
    assert by_purpose["push to a hub"]["ready"]


@pytest.mark.parametrize("name", ["Foo", "foo-bar", "foo_bar", "Foo.Bar", "foo__bar", "a-_-b"])
def test_names_are_compared_as_indexes_do(name: str) -> None:
    assert canonical(name) == canonicalize_name(name)
