"""The documentation as a site: it builds without a warning, and the result needs nothing from the web."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs.markdown_text import REPO

# Attributes that a browser follows by itself, by tag; a plain link is followed by the reader.
_FETCHED = {
    **dict.fromkeys(
        ("script", "img", "iframe", "source", "video", "audio", "embed", "track", "input"), ("src", "srcset")
    ),
    "link": ("href",),
    "object": ("data",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}
_NOT_FETCHED = {"canonical", "prev", "next", "alternate"}
_WEB = re.compile(r"^(?:\w+:)?//")


@dataclass
class Read(HTMLParser):
    """What a page fetches, links to, and offers as anchors; the text of its paragraphs and of its navigation."""

    fetched: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    paragraphs: list[str] = field(default_factory=list)
    navigation: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)
    _in_paragraph: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "p":
            self.paragraphs.append("")
            self._in_paragraph = True
        if tag == "nav":
            self._open.append(given.get("class", ""))
        if tag == "a" and "href" in given:
            self.linked.append(given["href"])
            if any("md-nav--primary" in name for name in self._open):
                self.navigation.append(given["href"])
        if tag != "link" or given.get("rel") not in _NOT_FETCHED:
            self.fetched += [given[name] for name in _FETCHED.get(tag, ()) if name in given]
        self.fetched += re.findall(r"url\(([^)]+)\)", given.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "nav" and self._open:
            self._open.pop()
        if tag == "p":
            self._in_paragraph = False

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.paragraphs[-1] += data


def read(text: str) -> Read:
    reader = Read()
    reader.feed(text)
    return reader


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, as `make docs` does."""
    for name in ("mkdocs", "material"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'sparseport[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).strip() == ""
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Read]:
    return {path: read(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(site: Path, pages: dict[Path, Read]) -> None:
    docs = REPO / "docs"
    wanted = {path.relative_to(docs).with_suffix(".html").as_posix() for path in docs.rglob("*.md")}
    wanted = {name.replace("README.html", "index.html") for name in wanted} | {"contributing.html", "changelog.html"}
    wanted |= {f"examples/{path.stem}.html" for path in (REPO / "examples").glob("*.py")}
    assert wanted <= {path.relative_to(site).as_posix() for path in pages}


def test_nothing_is_fetched_from_the_web(site: Path, pages: dict[Path, Read]) -> None:
    found = [f"{path.name}: {target}" for path, page in pages.items() for target in page.fetched if _WEB.match(target)]
    for path in site.rglob("*.css"):
        found += [f"{path.name}: {target}" for target in from_css(path.read_text(encoding="utf-8"))]
    assert found == []


def from_css(text: str) -> list[str]:
    """Addresses on the web that a style sheet fetches."""
    targets = re.findall(r"url\(\s*[\"']?([^)\"']+)|@import\s+[\"']([^\"']+)", text)
    return [one or other for one, other in targets if _WEB.match(one or other)]


def test_scripts_have_no_reason_to_fetch_anything(site: Path, pages: dict[Path, Read]) -> None:
    """The theme's script knows four addresses: each is only asked for by something that no page has."""
    (bundle,) = (site / "assets" / "javascripts").glob("bundle.*.min.js")
    known = set(re.findall(r"https://(?:unpkg\.com|api\.github\.com)/[\w./-]+", bundle.read_text(encoding="utf-8")))
    assert {address.split("/")[2] for address in known} <= {"unpkg.com", "api.github.com"}
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in text and "data-md-component=source" not in text, path.name


def test_links_of_the_site_lead_somewhere(site: Path, pages: dict[Path, Read]) -> None:
    wrong = []
    for path, page in pages.items():
        for target in page.linked + page.fetched:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            anchor = unquote(parts.fragment)
            if not place.is_file() or (anchor and place in pages and anchor not in pages[place].anchors | {"__skip"}):
                wrong.append(f"{path.relative_to(site)}: {target}")
    assert wrong == []


def test_every_page_of_docs_is_in_the_navigation(site: Path, pages: dict[Path, Read]) -> None:
    home = pages[site / "index.html"]
    named = {(site / urlsplit(target).path).resolve() for target in home.navigation if urlsplit(target).path}
    docs = REPO / "docs"
    for path in docs.rglob("*.md"):
        page = (site / path.relative_to(docs)).with_suffix(".html")
        page = page.with_name("index.html") if path.name == "README.md" else page
        assert page in named or path.name == "index.md", path.name


def test_search_has_the_pages_and_works_from_the_disk(site: Path) -> None:
    """Opened from the disk a browser may fetch no JSON: the index comes as a script, and a frame is the worker."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"api.html", "cli.html", "certificate.html", "examples/export_and_ask.html"} <= places
    script = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert script.startswith("var __index = ") and json.loads(script.removeprefix("var __index = ")) == index
    assert '<script src="assets/iframe-worker.js">' in (site / "index.html").read_text(encoding="utf-8")


def test_lists_are_lists(site: Path, pages: dict[Path, Read]) -> None:
    """GitHub starts a list right below a paragraph; the site's Markdown wants an empty line, or shows the dashes."""
    wrong = [
        f"{path.relative_to(site)}: {line[:60]}"
        for path, page in pages.items()
        for text in page.paragraphs
        for line in list(_lines(text))[1:]
        if re.match(r"(?:[-*]|\d+\.) \w", line)
    ]
    assert wrong == []


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.strip().splitlines())


def test_the_readers_find_what_they_look_for() -> None:
    page = read(
        '<script src="//web/x.js"></script><link rel="stylesheet" href="https://web/y.css">'
        '<link rel="canonical" href="https://web/"><a href="https://web/z">z</a><i style="background:url(http://a/b)"></i>'
    )
    assert page.fetched == ["//web/x.js", "https://web/y.css", "http://a/b"] and all(map(_WEB.match, page.fetched))
    assert from_css('@import "https://web/f.css"; a{b:url(//web/g.woff)} c{d:url(data:x)}') == [
        "https://web/f.css",
        "//web/g.woff",
    ]
