"""Relative links in the Markdown files lead somewhere, as GitHub follows them; the site has a test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.markdown_text import REPO, anchors, documents, links


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    assert [link for link in links(path) if not leads_somewhere(path, link)] == []


def leads_somewhere(page: Path, link: str) -> bool:
    if "://" in link or link.startswith("mailto:"):
        return True
    target, _, anchor = link.partition("#")
    place = (page.parent / target).resolve() if target else page
    if not place.is_relative_to(REPO) or not place.exists():
        return False
    return not anchor or (place.suffix == ".md" and anchor in anchors(place))


def test_links_and_headings_are_read(tmp_path: Path) -> None:
    """A reader that finds nothing would find nothing wrong."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three\n\n[a](b.md#c) ![d](e.svg) `[no](link)`\n\n## Twice\n\n## Twice\n\n    [no](code)\n",
        encoding="utf-8",
    )
    assert links(page) == ["b.md#c", "e.svg"]
    assert anchors(page) == {"one-two-three", "twice", "twice-1"}
    assert sum(len(links(path)) for path in documents()) > 50
    assert not leads_somewhere(REPO / "README.md", "docs/nowhere.md")
    assert not leads_somewhere(REPO / "README.md", "docs/api.md#nowhere")
    assert not leads_somewhere(REPO / "README.md", "../outside.md")
