"""The metadata of a README.md: what has the right form is taken over, what has not is told, and nothing can stop us."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.checkpoints.readme import Metadata, read_metadata


def put(folder: Path, text: str | bytes) -> Metadata | None:
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_metadata(folder)


def test_a_hub_card_is_read(tmp_path: Path) -> None:
    found = put(
        tmp_path,
        "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh-Hant\n- no\n"
        "base_model: owner/Some-Model.v2\ntags: [x]\n---\n# Title\n",
    )
    assert found == Metadata(("apache-2.0",), None, None, "owner/Some-Model.v2", ("en", "zh-Hant", "no"))


def test_other_licenses_keep_name_and_link(tmp_path: Path) -> None:
    text = "---\nlicense: other\nlicense_name: Some License 2\nlicense_link: https://example.org/a/LICENSE\n---\n"
    assert put(tmp_path, text) == Metadata(("other",), "Some License 2", "https://example.org/a/LICENSE")


@pytest.mark.parametrize(
    "text", ["", "# only text\n", "text\n---\nlicense: mit\n---\n", "---\n---\n", "---\n# nothing\n---\n"]
)
def test_a_readme_without_metadata_says_nothing(tmp_path: Path, text: str) -> None:
    assert put(tmp_path, text) == Metadata()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("---\nlicense: [\n---\n", "its metadata is not YAML"),
        ("---\n- mit\n---\n", "its metadata is no mapping"),
        ("---\nlicense: <script>\n---\n", "its license cannot be understood"),
        ("---\nlicense: {a: b}\nlanguage: [en, 3]\n---\n", "its license and language cannot be understood"),
        ("---\n" + "[" * 3000 + "\n---\n", "its metadata is not YAML"),
        (b"---\nlicense: \xff\n---\n", "it is not UTF-8"),
        ("---\n!!python/object/apply:os.getcwd []\n---\n", "its metadata is not YAML"),
        ("x" * ((1 << 20) + 1), "it is larger than 1048576 bytes"),
    ],
)
def test_what_cannot_be_understood_is_told(tmp_path: Path, text: str | bytes, problem: str) -> None:
    found = put(tmp_path, text)
    assert found is not None and found.problem == problem and found.licenses == ()


@pytest.mark.parametrize(
    "name", ["a/b/c", "/srv/models/base", "../base", "base", "C:\\models", "a/b c", ["a/b", "c/d"], 3]
)
def test_a_base_model_is_a_hub_name_or_nothing(tmp_path: Path, name: object) -> None:
    """A path of somebody's machine must not end in a card that is published."""
    found = put(tmp_path, f"---\nlicense: mit\nbase_model: {name!r}\n---\n")
    assert found is not None and found.base_model is None and found.licenses == ("mit",)


@pytest.mark.parametrize("link", ["LICENSE", "javascript:alert(1)", "https://x/'><b>", "ftp://x.org/y"])
def test_links_are_web_addresses_or_nothing(tmp_path: Path, link: str) -> None:
    found = put(tmp_path, f"---\nlicense: other\nlicense_link: {link!r}\n---\n")
    assert found is not None and found.license_link is None


def test_no_file_and_a_link_out_of_the_folder(tmp_path: Path) -> None:
    assert read_metadata(tmp_path) is None
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (inside / "README.md").symlink_to(tmp_path / "README.md")
    found = read_metadata(inside)
    assert (
        found is not None
        and found.licenses == ()
        and found.problem is not None
        and "leaves its folder" in found.problem
    )


@given(st.text(max_size=200))
def test_no_text_is_an_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert put(Path(folder), f"---\n{text}\n---\n") is not None
